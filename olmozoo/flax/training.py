"""One step of training in JAX: the gradients of micro-batches, and the optimizer's update."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from olmozoo.checkpoint.tensors import aligned_copy
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter, by_variable, stack_indices
from olmozoo.flax.base import from_numpy, oriented, stacked
from olmozoo.flax.losses import load_balancing_loss, target_losses
from olmozoo.flax.sharding import batch_sharding, from_slices, make_mesh, optimizer_shardings, replicated, to_host
from olmozoo.quantization import Quantization, is_quantizable, rounded
from olmozoo.world import World, mesh_of_run

if TYPE_CHECKING:
    from olmozoo.training.config import TrainConfig
    from olmozoo.training.data import Batch

DTYPES = {"fp32": "float32", "amp_bf16": "bfloat16", "fp64": "float64"}  # of what is computed


@contextlib.contextmanager
def scope(run: TrainConfig, choose_device: Callable[[], Any]) -> Iterator[World]:
    """What training runs in: the processes of `jax.distributed`, their devices, and float64 where the run is in it.

    Raises:
        InputError: the mesh of the run has another number of devices.
    """
    begins = "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized()
    if begins:
        numbers = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        count, index = (None if number is None else int(number) for number in numbers)
        jax.distributed.initialize(num_processes=count, process_id=index)  # which finds the address, and a cluster
    try:
        device, size = choose_device(), jax.process_count()
        devices = jax.devices(None if device is None else device.platform)
        found = f"JAX has {len(devices)} of this kind"
        sizes = mesh_of_run(run.mesh, len(devices), found, whole=size > 1)
        devices = devices[: math.prod(sizes.values())]
        mesh = make_mesh(**sizes, devices=devices) if sizes else None
        wide = jax.enable_x64(True) if run.precision == "fp64" else contextlib.nullcontext()
        with jax.default_device(device if mesh is None else None), wide:
            yield World(device, sizes, mesh, jax.process_index(), size, multihost_utils.process_allgather)
    finally:
        if begins:
            jax.distributed.shutdown()


def make_model(
    cls: Any, config: ModelConfig, weights: Iterable[tuple[Parameter, np.ndarray]], run: TrainConfig, world: World
) -> Any:
    """A model of the class with these weights, in the run's precision.

    Raises:
        InputError: the mesh does not fit the model.
    """
    dtype = np.dtype("float64" if run.precision == "fp64" else "float32")
    model = cls(config, dtype=DTYPES[run.precision], param_dtype=dtype, _do_init=False, mesh=world.mesh)
    if world.mesh is None:
        model.bind_parameters((parameter, array.astype(dtype, copy=False)) for parameter, array in weights)
    else:
        model.params = model._split((parameter, lambda array=array: array) for parameter, array in weights)
    return model


class TrainStep:
    """The model, its gradients and its optimizer.

    Args:
        model: a causal language model with parameters.
        trained: the parameters that are trained; the others are frozen.
        decays: the weight decay of each.
        config: the run's. With `lora`, the kernels are those of the model plus scaled products of `trained`.
        world: its devices. The compiler splits what is computed over them.

    Attributes:
        aux_factor: of the load-balancing loss of a mixture of experts; 0 without one.
        groups: the trained parameters, those of each leaf together.
        params: the leaves of the groups. One that has some of a layer's experts alone is a copy of their part.
        frozen: the other leaves, and those that have such parts, by path.
    """

    def __init__(
        self, model: Any, trained: Sequence[Parameter], decays: Sequence[float], config: TrainConfig, world: World
    ) -> None:
        self.model, self.groups, self.config, self.world = model, by_variable(trained), config, world
        self.aux_factor = getattr(model.config, "router_aux_loss_coef", 0.0)
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable()
        frozen = flatten_dict(model.params)
        self.params: list[Array]
        if config.lora is None:
            self.params = [_taken(frozen, model._leaf(group[0]), group) for group in self.groups]
        else:
            dtype = np.dtype(model.param_dtype)
            initial = ([p.initial(config.seed, dtype) for p in group] for group in self.groups)
            self.params = [self._on_devices(*both, None) for both in zip(self.groups, initial, strict=True)]
        self.frozen = frozen
        self.starts = np.cumsum([0, *map(len, self.groups)])[:-1]  # of each group in `trained`
        self.optimizer = make_optimizer([decays[start] for start in self.starts], config)
        split = None if world.mesh is None else optimizer_shardings(self.optimizer, model, self.params)
        self.state = jax.jit(self.optimizer.init, out_shardings=split)(self.params)
        self.grads: list[Array] | None = None
        self._gradients = jax.jit(self._compute)
        self._add = jax.jit(partial(jax.tree.map, jnp.add), donate_argnums=0)
        self._norms = jax.jit(self._norms_of)
        self._update = jax.jit(self._apply, donate_argnums=(0, 1))
        self._losses = jax.jit(self._evaluate)

    def _path(self, group: Sequence[Parameter]) -> tuple[str, ...]:
        """The path of a group's leaf; of an adapter, that of the kernel that it changes."""
        if self.config.lora is None:
            path: tuple[str, ...] = self.model._leaf(group[0])
            return path
        return (*self.model._variable_path(group[0])[:-2], "kernel")  # without lora_A.weight

    def _tree(self, params: Sequence[Array], frozen: Mapping[tuple[str, ...], Array]) -> dict[str, Any]:
        """The tree of the module's parameters."""
        lora = self.config.lora
        leaves = dict(frozen)
        if lora is None:
            for group, value in zip(self.groups, params, strict=True):
                path = self.model._leaf(group[0])
                leaves[path] = leaves[path].at[stack_indices(group)].set(value) if path in leaves else value
            return unflatten_dict(leaves)
        for group, a, b in zip(self.groups[::2], params[::2], params[1::2], strict=True):
            path = self._path(group)
            leaves[path] = leaves[path] + (lora.alpha / lora.rank) * (a @ b)  # (in, rank) @ (rank, out)
        return unflatten_dict(leaves)

    def _on_devices(self, group: Sequence[Parameter], arrays: Sequence[np.ndarray], like: Array | None) -> Array:
        """The leaf of a group, in the dtype and on the devices of another; without one, in its own dtype on all."""
        dtype = arrays[0].dtype if like is None else like.dtype
        if self.world.mesh is None:
            return _joined(group, arrays).astype(dtype)
        parts = list(map(oriented, group, arrays))
        values = parts[0] if group[0].stack is None else np.stack(parts)
        sharding = NamedSharding(self.world.mesh, PartitionSpec()) if like is None else like.sharding
        return from_slices(values.shape, dtype, sharding, lambda part: np.array(values[part], dtype))

    def _split(self, arrays: list[Array]) -> list[Array]:
        """Arrays such as the parameters, split as they are, while jit traces."""
        if self.world.mesh is None:
            return arrays
        return [lax.with_sharding_constraint(x, p.sharding) for x, p in zip(arrays, self.params, strict=True)]

    def _compute(
        self,
        params: list[Array],
        frozen: Any,
        ids: Array,
        targets: Array,
        mask: Array | None,
        counted: Array | None,
        divisor: Array,
        share: Array,
        seed: Array,
    ) -> tuple[list[Array], Array, Array, Array]:
        z_factor, key = self.config.z_factor, jax.random.key(seed)
        inputs = {"output_router_logits": True} if self.aux_factor else {}

        def loss_of(params: list[Array]) -> tuple[Array, tuple[Array, Array, Array]]:
            tree = self._tree(params, frozen)
            output = self.model.module.apply(
                {"params": tree}, ids, mask, use_cache=False, deterministic=False, rngs={"dropout": key}, **inputs
            )
            cross_entropy, z = (rows.sum() for rows in target_losses(output.logits, targets, z_factor > 0))
            aux = jnp.zeros_like(z)
            if self.aux_factor:
                chosen = self.model.config.num_experts_per_tok
                aux = load_balancing_loss(output.router_logits, counted, chosen) * share
            return (cross_entropy + z_factor * z) / divisor + self.aux_factor * aux, (cross_entropy, z, aux)

        grads, sums = jax.grad(loss_of, has_aux=True)(params)
        return self._split(grads), *replicated(sums, self.world.mesh)

    def _norms_of(self, grads: list[Array]) -> Array:
        rows = (grad.reshape(len(group), -1) for grad, group in zip(grads, self.groups, strict=True))
        return replicated(jnp.concatenate([jnp.linalg.norm(row, axis=1) for row in rows]), self.world.mesh)

    def _apply(
        self, params: list[Array], state: Any, grads: list[Array], rate: Array, scales: Array | None
    ) -> tuple[list[Array], Any]:
        if scales is not None:
            parts = jnp.split(scales, self.starts[1:])
            grads = [g * part.reshape(-1, *[1] * (g.ndim - 1)) for g, part in zip(grads, parts, strict=True)]
        updates, state = self.optimizer.update(grads, state, params)
        return self._split([param - rate * update for param, update in zip(params, updates, strict=True)]), state

    def _evaluate(self, params: list[Array], frozen: Any, ids: Array, targets: Array, mask: Array | None) -> Array:
        tree = self._tree(params, frozen)
        logits = self.model.module.apply({"params": tree}, ids, mask, use_cache=False, deterministic=True).logits
        return replicated(target_losses(logits, targets, False)[0], self.world.mesh)

    def gradients(self, batch: Batch, divisor: float, seed: int) -> tuple[Array, Array, Array]:
        """Add the gradients of a micro-batch to those of the step.

        Args:
            batch: the micro-batch.
            divisor: of the summed loss.
            seed: of dropout.

        Returns:
            The sums of the cross-entropy and of the squared log-partition, before the division; and the load-balancing
            loss times the micro-batch's share of tokens.
        """
        dtype = self.params[0].dtype
        numbers = np.asarray(divisor, dtype), np.asarray(batch.share, dtype), np.uint32(seed)
        arrays = *self._arrays(batch), self._counted(batch)
        grads, cross_entropy, z, aux = self._gradients(self.params, self.frozen, *arrays, *numbers)
        self.grads = grads if self.grads is None else self._add(self.grads, grads)
        return cross_entropy, z, aux

    def norms(self) -> np.ndarray:
        """The norm of each parameter's gradient."""
        return np.asarray(self._norms(self.grads))

    def update(self, learning_rate: float, scales: np.ndarray | None) -> None:
        """Update the parameters by their gradients, each times its scale, and forget the gradients."""
        dtype = self.params[0].dtype
        rate = np.asarray(learning_rate, dtype)
        factors = None if scales is None else np.asarray(scales, dtype)
        self.params, self.state = self._update(self.params, self.state, self.grads, rate, factors)
        self.grads = None

    def evaluate(self, batch: Batch) -> np.ndarray:
        """The summed cross-entropy of each row, (batch,)."""
        return np.asarray(self._losses(self.params, self.frozen, *self._arrays(batch)))[: len(batch.indices)]

    def _array(self, values: np.ndarray | None) -> Any:
        mesh = self.world.mesh
        if mesh is None or values is None:
            return None if values is None else jnp.asarray(values)
        return from_slices(values.shape, values.dtype, batch_sharding(mesh), lambda part: values[part])

    def _arrays(self, batch: Batch) -> tuple[Array, Array, Array | None]:
        batch = batch.padded(self.world.rows)
        return self._array(batch.input_ids), self._array(batch.targets), self._array(batch.attention_mask)

    def _counted(self, batch: Batch) -> Array | None:
        """The tokens of the load-balancing loss; None for all, and where there is none."""
        counted: Array | None = self._array(batch.padded(self.world.rows).counted) if self.aux_factor else None
        return counted

    @contextlib.contextmanager
    def rounded(self, quantization: Quantization) -> Iterator[None]:
        """Round the weights that quantization makes integers to what these keep, until the block ends.

        Adapters are merged into them before.
        """
        lora, kept = self.config.lora, (self.params, self.frozen)
        params, frozen = list(self.params), dict(self.frozen)
        numbers = {self._path(group): n for n, group in enumerate(self.groups)}  # with lora, of B, which is after A
        for group in by_variable(filter(is_quantizable, self.model._parameter_table())):
            path = self.model._leaf(group[0])
            n = numbers.get(path)
            weights = dict(_named([group], [frozen[path]])) if path in frozen else {}
            pairs: dict[str, Any] = {}
            if n is not None and lora is None:
                weights |= dict(_named([self.groups[n]], [params[n]]))
            elif n is not None:
                a, b = ([array for _, array in _named([self.groups[i]], [params[i]])] for i in (n - 1, n))
                pairs = dict(zip(weights, zip(a, b, strict=True), strict=True))
                params[n] = jnp.zeros_like(params[n])
            scale = 1.0 if lora is None else lora.alpha / lora.rank
            new = {name: rounded(w, quantization, pairs.get(name), scale) for name, w in weights.items()}
            if path in frozen:
                frozen[path] = _joined(group, [new[parameter.name] for parameter in group])
            if n is not None and lora is None:
                params[n] = _joined(self.groups[n], [new[parameter.name] for parameter in self.groups[n]])
        self.params, self.frozen = params, frozen
        try:
            yield
        finally:
            self.params, self.frozen = kept
            self.sync()

    # -- state ----------------------------------------------------------------------------------------------------

    def sync(self) -> Any:
        """The model with the weights as they are now."""
        self.model.params = self._tree(self.params, self.frozen)
        return self.model

    def values(self) -> Iterator[tuple[str, np.ndarray]]:
        """The trained parameters by name, each gathered by all processes."""
        return _named(self.groups, self.params)

    def moments(self) -> Iterator[tuple[str, np.ndarray]]:
        """The optimizer's running means, by names such as `exp_avg.model.norm.weight`."""
        means = self.state[0]
        kept = {"exp_avg": means.mu, "exp_avg_sq": getattr(means, "nu", None)}
        for moment in self.config.optimizer.moments:
            for name, array in _named(self.groups, kept[moment]):
                yield f"{moment}.{name}", array

    def restore(self, values: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray], count: int) -> None:
        """Set trained parameters and the optimizer's running means, after `count` of its updates."""

        def leaf(group: Sequence[Parameter], arrays: Mapping[str, np.ndarray], prefix: str, old: Array) -> Array:
            return self._on_devices(group, [arrays[prefix + p.name] for p in group], old)

        self.params = [
            leaf(group, values, "", old) if group[0].name in values else old
            for group, old in zip(self.groups, self.params, strict=True)
        ]
        if moments:
            fields = dict(zip(("exp_avg", "exp_avg_sq"), ("mu", "nu"), strict=True))
            found = {
                fields[moment]: [
                    leaf(group, moments, f"{moment}.", old) for group, old in zip(self.groups, self.params, strict=True)
                ]
                for moment in self.config.optimizer.moments
            }
            old_count = self.state[0].count
            counted = from_slices((), old_count.dtype, old_count.sharding, lambda _: np.asarray(count, old_count.dtype))
            means = self.state[0]._replace(count=counted, **found)
            self.state = (means, *self.state[1:])


def make_optimizer(decays: Sequence[float], config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer of the run, without the learning rate, which comes with each update."""
    settings = config.optimizer
    beta_1, beta_2 = settings.betas
    if settings.name == "lionw":
        means = optax.scale_by_lion(beta_1, beta_2)
    else:
        means = optax.scale_by_adam(beta_1, beta_2, settings.eps)
    added = [optax.add_decayed_weights(decay, [d == decay for d in decays]) for decay in sorted(set(decays)) if decay]
    return optax.chain(means, *added)


def _taken(leaves: dict[tuple[str, ...], Array], path: tuple[str, ...], group: Sequence[Parameter]) -> Array:
    """A leaf, which is taken out of `leaves`; or a copy of the experts of the group, where they are not all of it."""
    if group[0].stack is None or len(group) == len(leaves[path]):
        return leaves.pop(path)
    return leaves[path][stack_indices(group)]


def _joined(group: Sequence[Parameter], arrays: Sequence[np.ndarray]) -> Array:
    """The leaf of a group, from its parameters as they are in a checkpoint."""
    parts = [from_numpy(parameter, np.asarray(array)) for parameter, array in zip(group, arrays, strict=True)]
    return parts[0] if group[0].stack is None else stacked(parts)


def _named(groups: Sequence[Sequence[Parameter]], leaves: Sequence[Array]) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters in leaves, by name, as they are in a checkpoint."""
    for group, leaf in zip(groups, leaves, strict=True):
        array = to_host(leaf)
        for index, parameter in enumerate(group):
            part = array if parameter.stack is None else array[index]
            yield parameter.name, aligned_copy(part, transposed=True) if parameter.kind == "linear" else part
