"""One step of training in Keras: the gradients of micro-batches, and the optimizer's update."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from olmozoo.checkpoint.tensors import aligned
from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter, by_variable, stack_indices
from olmozoo.quantization import Quantization, is_quantizable, rounded
from olmozoo.tf.layers import Tensor, from_numpy
from olmozoo.tf.losses import target_losses
from olmozoo.world import World, mesh_of_run

if TYPE_CHECKING:
    from olmozoo.training.config import TrainConfig
    from olmozoo.training.data import Batch

POLICIES = {"fp32": "float32", "amp_bf16": "mixed_bfloat16", "fp64": "float64"}


@contextlib.contextmanager
def scope(run: TrainConfig, choose_device: Callable[[], str | None]) -> Iterator[World]:
    """What training runs in: a device, or a `MirroredStrategy` over several, each of which has the whole model.

    Raises:
        InputError: the mesh of the run has another number of devices, or another axis than `fsdp`.
    """
    device = choose_device()
    on_cpu = "CPU" in device if device else not tf.config.list_logical_devices("GPU")
    devices = [found.name for found in tf.config.list_logical_devices("CPU" if on_cpu else "GPU")]
    sizes = mesh_of_run(run.mesh, len(devices), f"TensorFlow has {len(devices)} of this kind", whole=False)
    if others := [axis for axis in sizes if axis != "fsdp"]:
        raise InputError(f"mesh.{others[0]} is for PyTorch and JAX: in Keras every device has the whole model")
    if not sizes:
        with tf.device(device):
            yield World(device)
        return
    strategy = mirrored(tuple(devices[: sizes["fsdp"]]))
    with strategy.scope():
        yield World(device, sizes, strategy)


@functools.cache
def mirrored(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    """The strategy over these devices, one for all runs of a process: another would number its collectives anew."""
    return tf.distribute.MirroredStrategy(list(devices))


def make_model(
    cls: Any, config: ModelConfig, weights: Iterable[tuple[Parameter, np.ndarray]], run: TrainConfig, world: World
) -> Any:
    """A model of the class with these weights, in the run's precision."""
    model = cls(config, seed=None, dtype=POLICIES[run.precision])
    dtype = np.dtype(model.variable_dtype)
    model.bind_parameters((parameter, np.array(array, dtype)) for parameter, array in weights)
    return model


class AdamW(keras.optimizers.AdamW):
    """Keras's AdamW with the epsilon of PyTorch and optax: added to the root of the mean square *after* its correction.

    Keras adds its own before, where it weighs 1 / sqrt(1 - beta_2 ** step) times as much.
    """

    @property
    def epsilon(self) -> Tensor:
        """What Keras adds."""
        dtype = self._epsilon.dtype
        step = tf.cast(tf.convert_to_tensor(self.iterations) + 1, dtype)
        return tf.constant(self._epsilon) * tf.sqrt(1 - tf.constant(self.beta_2, dtype) ** step)

    @epsilon.setter
    def epsilon(self, value: Any) -> None:
        self._epsilon = np.asarray(value)


class Seeds:
    """The seeds of dropout, in place of Keras's generator: they are set, and no replica changes them."""

    def __init__(self) -> None:
        self.state = tf.Variable([0, 0], trainable=False, dtype=tf.int64)

    def next(self) -> Tensor:
        """The seed of a call, another one on each replica."""
        context = tf.distribute.get_replica_context()
        return self.state + tf.stack([0, tf.cast(context.replica_id_in_sync_group, tf.int64)])


class TrainStep:
    """The model, its gradients and its optimizer.

    Args:
        model: a causal language model.
        trained: the parameters that are trained; the others are frozen.
        decays: the weight decay of each.
        config: the run's. With `lora`, adapters are added to the model.
        world: its devices. Each one computes its rows of a batch.

    Attributes:
        aux_factor: of the load-balancing loss of a mixture of experts; 0 without one.
        groups: the trained parameters, those of each variable together.
        variables: of the groups. One that has some of a layer's experts alone is a copy of their part.
    """

    def __init__(
        self, model: Any, trained: Sequence[Parameter], decays: Sequence[float], config: TrainConfig, world: World
    ) -> None:
        self.model, self.groups, self.config, self.world = model, by_variable(trained), config, world
        self.aux_factor = getattr(model.config, "router_aux_loss_coef", 0.0)
        if config.lora is not None:
            model.enable_lora(config.lora.rank, config.lora.alpha, config.lora.target_modules)
        self.sources = [self._variable(group[0]) for group in self.groups]
        self.variables = list(map(_trained_part, self.groups, self.sources))
        if config.lora is not None:
            for group, variable in zip(self.groups, self.variables, strict=True):
                initial = [parameter.initial(config.seed, variable.dtype).T for parameter in group]
                variable.assign(initial[0] if group[0].stack is None else np.stack(initial))
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable()
        firsts = np.cumsum([0, *map(len, self.groups)])[:-1]  # of each group in `trained`
        self.optimizer = make_optimizer(self.variables, [decays[first] for first in firsts], config)
        self.grads: list[Tensor] | None = None
        self.seeds = Seeds()
        model.base_model.seeds = self.seeds
        alone = world.mesh is None  # else functions run on several devices, which XLA does not compile
        gradients, losses = (self._compute, self._evaluate) if alone else (self._compute_all, self._evaluate_all)
        self._gradients = tf.function(gradients, jit_compile=alone, autograph=False)
        self._norms = tf.function(self._norms_of, jit_compile=True, autograph=False)
        self._update = tf.function(self._apply, jit_compile=alone, autograph=False)
        self._losses = tf.function(losses, jit_compile=alone, autograph=False)

    def _variable(self, parameter: Parameter) -> keras.Variable:
        module, _, factor = parameter.name.removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B"):
            return self.model._find(parameter)
        layer = self.model._layer(Parameter(f"{module}.weight", (), (), "linear"))
        return layer.lora_kernel_a if factor == "lora_A" else layer.lora_kernel_b

    def _compute(
        self, ids: Tensor, targets: Tensor, mask: Tensor | None, divisor: Tensor, share: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        values = [variable.value for variable in self.sources]
        z_factor = self.config.z_factor
        inputs: dict[str, Any] = {"output_router_logits": True} if self.aux_factor else {}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            output = self.model(input_ids=ids, attention_mask=mask, use_cache=False, training=True, **inputs)
            cross_entropy, z = (tf.reduce_sum(rows) for rows in target_losses(output.logits, targets, z_factor > 0))
            aux = output.aux_loss * tf.cast(share, output.aux_loss.dtype) if self.aux_factor else tf.zeros_like(z)
            loss = (cross_entropy + z_factor * z) / tf.cast(divisor, cross_entropy.dtype) + self.aux_factor * aux
        found = [tf.convert_to_tensor(grad) for grad in tape.gradient(loss, values)]
        grads = [
            tf.gather(grad, stack_indices(group)) if variable is not source else grad
            for grad, group, variable, source in zip(found, self.groups, self.variables, self.sources, strict=True)
        ]
        return grads, cross_entropy, z, aux

    def _norms_of(self, grads: list[Tensor]) -> Tensor:
        rows = (tf.reshape(grad, (len(group), -1)) for grad, group in zip(grads, self.groups, strict=True))
        return tf.concat([tf.norm(row, axis=1) for row in rows], 0)

    def _compute_all(self, *arguments: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """`_compute` on every device, with the sums over them."""
        strategy = self.world.mesh
        grads, *sums = strategy.run(self._compute, arguments)
        cross_entropy, z, aux = (strategy.reduce("SUM", each, None) for each in sums)
        return [strategy.reduce("SUM", grad, None) for grad in grads], cross_entropy, z, aux

    def _apply(self, grads: list[Tensor], rate: Tensor, scales: Tensor | None) -> None:
        if scales is not None:
            parts = tf.split(scales, [len(group) for group in self.groups])
            grads = [
                g * tf.reshape(part, (-1, *[1] * (len(g.shape) - 1))) for g, part in zip(grads, parts, strict=True)
            ]
        self.optimizer.learning_rate.assign(rate)
        if self.world.mesh is None:
            self.optimizer.apply(grads, self.variables)
            self._write_back()
            return
        rows = self.world.rows  # Keras adds up the gradients of all replicas
        self.world.mesh.run(lambda: self.optimizer.apply([grad / rows for grad in grads], self.variables))

    def _write_back(self) -> None:
        """Set the experts that are trained in the variables of all of a layer's experts."""
        for group, variable, source in zip(self.groups, self.variables, self.sources, strict=True):
            if variable is not source:
                source.assign(tf.tensor_scatter_nd_update(source.value, stack_indices(group)[:, None], variable.value))

    def _evaluate(self, ids: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, training=False).logits
        return target_losses(logits, targets, False)[0]

    def _evaluate_all(self, *arguments: Any) -> Tensor:
        """`_evaluate` on every device, with the rows of all of them."""
        strategy = self.world.mesh
        return tf.concat(strategy.experimental_local_results(strategy.run(self._evaluate, arguments)), 0)

    def _tensors(self, batch: Batch) -> tuple[Any, Any, Any]:
        """Ids, targets and mask; over several devices the rows of each."""
        strategy, parts = self.world.mesh, self.world.rows

        def tensor(name: str) -> Any:
            if getattr(batch, name) is None:
                return None
            if strategy is None:
                return tf.constant(getattr(batch, name))
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(getattr(batch.rows_for(context.replica_id_in_sync_group, parts), name))
            )

        return tensor("input_ids"), tensor("targets"), tensor("attention_mask")

    def gradients(self, batch: Batch, divisor: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Add the gradients of a micro-batch to those of the step.

        Args:
            batch: the micro-batch.
            divisor: of the summed loss.
            seed: of dropout.

        Returns:
            The sums of the cross-entropy and of the squared log-partition, before the division; and the load-balancing
            loss times the micro-batch's share of tokens.
        """
        self.seeds.state.assign([seed, 0])
        numbers = tf.constant(divisor, tf.float64), tf.constant(batch.share, tf.float64)
        grads, cross_entropy, z, aux = self._gradients(*self._tensors(batch), *numbers)
        self.grads = grads if self.grads is None else [a + b for a, b in zip(self.grads, grads, strict=True)]
        return cross_entropy, z, aux

    def norms(self) -> np.ndarray:
        """The norm of each parameter's gradient."""
        return self._norms(self.grads).numpy()

    def update(self, learning_rate: float, scales: np.ndarray | None) -> None:
        """Update the parameters by their gradients, each times its scale, and forget the gradients."""
        dtype = self.variables[0].dtype
        rate = tf.constant(learning_rate, self.optimizer.learning_rate.dtype)
        self._update(self.grads, rate, None if scales is None else tf.constant(scales, dtype))
        self.grads = None

    def evaluate(self, batch: Batch) -> np.ndarray:
        """The summed cross-entropy of each row, (batch,)."""
        return self._losses(*self._tensors(batch)).numpy()[: len(batch.indices)]

    @contextlib.contextmanager
    def rounded(self, quantization: Quantization) -> Iterator[None]:
        """Round the weights that quantization makes integers to what these keep, until the block ends.

        Adapters are merged into them before.
        """
        lora = self.config.lora
        factors = {group[0].name: n for n, group in enumerate(self.groups)}
        kept: list[tuple[keras.Variable, Tensor]] = []

        def change(variable: keras.Variable) -> keras.Variable:
            kept.append((variable, tf.identity(variable.value)))
            return variable

        try:
            for group in by_variable(filter(is_quantizable, self.model._parameter_table())):
                kernel = self.model._layer(group[0])._kernel  # without adapters
                weights = dict(_arrays([group], [kernel]))
                pairs: dict[str, Any] = {}
                n = factors.get(f"{group[0].name.removesuffix('.weight')}.lora_B.weight")  # which is after A
                if n is not None:
                    a, b = ([array for _, array in _arrays([self.groups[i]], [self.variables[i]])] for i in (n - 1, n))
                    pairs = dict(zip(weights, zip(a, b, strict=True), strict=True))
                    change(self.variables[n]).assign(tf.zeros_like(self.variables[n]))
                scale = 1.0 if lora is None else lora.alpha / lora.rank
                new = [rounded(weight, quantization, pairs.get(name), scale) for name, weight in weights.items()]
                _assign(change(kernel), group, new)
            yield
        finally:
            for variable, value in kept:
                variable.assign(value)

    # -- state ----------------------------------------------------------------------------------------------------

    def sync(self) -> Any:
        """The model with the weights as they are now."""
        return self.model

    def values(self) -> Iterator[tuple[str, np.ndarray]]:
        """The trained parameters by name."""
        return _arrays(self.groups, self.variables)

    def moments(self) -> Iterator[tuple[str, np.ndarray]]:
        """The optimizer's running means, by names such as `exp_avg.model.norm.weight`."""
        for moment, variables in self._moments().items():
            for name, array in _arrays(self.groups, variables):
                yield f"{moment}.{name}", array

    def _moments(self) -> dict[str, list[keras.Variable]]:
        kept = (self.optimizer._momentums, getattr(self.optimizer, "_velocities", None))
        return dict(zip(self.config.optimizer.moments, kept, strict=False))

    def restore(self, values: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray], count: int) -> None:
        """Set trained parameters and the optimizer's running means, after `count` of its updates."""
        for group, variable in zip(self.groups, self.variables, strict=True):
            if group[0].name in values:
                _assign(variable, group, [values[parameter.name] for parameter in group])
        self._write_back()
        if moments:
            self.optimizer.iterations.assign(count)
            for moment, variables in self._moments().items():
                for group, variable in zip(self.groups, variables, strict=True):
                    _assign(variable, group, [moments[f"{moment}.{parameter.name}"] for parameter in group])


def make_optimizer(
    variables: list[keras.Variable], decays: Sequence[float], config: TrainConfig
) -> keras.optimizers.Optimizer:
    """The optimizer of the run for these variables.

    Raises:
        InputError: more than one weight decay, besides 0, is asked for.
    """
    settings = config.optimizer
    found = sorted({decay for decay in decays if decay})
    if len(found) > 1:
        raise InputError(f"weight decays are {found}, expected one besides 0: Keras's optimizers have one")
    is_double = variables[0].dtype == "float64"
    exact = np.float64 if is_double else float  # Keras rounds Python's floats to float32
    decay = exact(found[0]) if found else exact(0)
    beta_1, beta_2 = map(exact, settings.betas)
    floatx = keras.config.floatx()
    keras.config.set_floatx("float64" if is_double else floatx)  # of the learning rate's variable
    try:
        optimizer: keras.optimizers.Optimizer
        if settings.name == "lionw":
            optimizer = keras.optimizers.Lion(0.0, beta_1, beta_2, weight_decay=decay)
        else:
            epsilon = np.asarray(settings.eps, "float64" if is_double else "float32")
            optimizer = AdamW(0.0, decay, beta_1, beta_2, epsilon)
        still = [variable for variable, decay in zip(variables, decays, strict=True) if not decay]
        if still:
            optimizer.exclude_from_weight_decay(var_list=still)
        optimizer.build(variables)
    finally:
        keras.config.set_floatx(floatx)
    return optimizer


def _trained_part(group: Sequence[Parameter], source: keras.Variable) -> keras.Variable:
    """The variable, or a new one for some of the experts that it has."""
    if group[0].stack is None or len(group) == source.shape[0]:
        return source
    return keras.Variable(tf.gather(source.value, stack_indices(group)), dtype=source.dtype, name=source.name)


def _arrays(
    groups: Sequence[Sequence[Parameter]], variables: Sequence[keras.Variable]
) -> Iterator[tuple[str, np.ndarray]]:
    """Variables as they are in a checkpoint, by name: linear weights are (in, out) here and (out, in) there."""
    for group, variable in zip(groups, variables, strict=True):
        tensor = tf.convert_to_tensor(variable)
        for index, parameter in enumerate(group):
            part = tensor if parameter.stack is None else tensor[index]
            yield parameter.name, (tf.transpose(part) if parameter.kind == "linear" else part).numpy()


def _assign(variable: keras.Variable, group: Sequence[Parameter], arrays: Sequence[np.ndarray]) -> None:
    """Set a variable to the values of its parameters, as they are in a checkpoint."""
    is_linear = group[0].kind == "linear"
    parts = [ops.cast(from_numpy(aligned(array, transposed=is_linear)), variable.dtype) for array in arrays]
    variable.assign(parts[0] if group[0].stack is None else tf.stack(parts))
