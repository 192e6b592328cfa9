"""One step of training in JAX: the gradients of micro-batches, and the optimizer's update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter
from olmozoo.flax.base import from_numpy, to_numpy
from olmozoo.flax.losses import target_losses
from olmozoo.quantization import Quantization, is_quantizable, rounded

if TYPE_CHECKING:
    from olmozoo.training.config import TrainConfig
    from olmozoo.training.data import Batch

DTYPES = {"fp32": "float32", "amp_bf16": "bfloat16", "fp64": "float64"}  # of what is computed


@contextlib.contextmanager
def scope(run: TrainConfig, device: Any) -> Iterator[None]:
    """What training on a device runs in: float64 is enabled where the run is in it."""
    wide = jax.enable_x64(True) if run.precision == "fp64" else contextlib.nullcontext()
    with jax.default_device(device), wide:
        yield


def make_model(
    cls: Any, config: ModelConfig, weights: Iterable[tuple[Parameter, np.ndarray]], run: TrainConfig, device: Any
) -> Any:
    """A model of the class with these weights, in the run's precision."""
    param_dtype = "float64" if run.precision == "fp64" else "float32"
    model = cls(config, dtype=DTYPES[run.precision], param_dtype=param_dtype, _do_init=False)
    model.bind_parameters(weights)
    return model


class TrainStep:
    """The model, its gradients and its optimizer.

    Args:
        model: a causal language model with parameters.
        trained: the parameters that are trained; the others are frozen.
        decays: the weight decay of each.
        config: the run's. With `lora`, the kernels are those of the model plus scaled products of `trained`.
    """

    def __init__(self, model: Any, trained: Sequence[Parameter], decays: Sequence[float], config: TrainConfig) -> None:
        self.model, self.trained, self.config = model, list(trained), config
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable()
        frozen = flatten_dict(model.params)
        self.params: list[Array]
        if config.lora is None:
            self.params = [frozen.pop(model._leaf(parameter)) for parameter in self.trained]
        else:
            dtype = np.dtype(model.param_dtype)
            self.params = [from_numpy(parameter, parameter.initial(config.seed, dtype)) for parameter in self.trained]
        self.frozen = frozen
        self.optimizer = make_optimizer(decays, config)
        self.state = self.optimizer.init(self.params)
        self.grads: list[Array] | None = None
        self._gradients = jax.jit(self._compute)
        self._add = jax.jit(partial(jax.tree.map, jnp.add), donate_argnums=0)
        self._norms = jax.jit(lambda grads: jnp.stack([jnp.linalg.norm(grad.reshape(-1)) for grad in grads]))
        self._update = jax.jit(self._apply, donate_argnums=(0, 1))
        self._losses = jax.jit(self._evaluate)

    def _tree(self, params: Sequence[Array], frozen: Mapping[tuple[str, ...], Array]) -> dict[str, Any]:
        """The tree of the module's parameters."""
        lora = self.config.lora
        if lora is None:
            leaves = {self.model._leaf(p): value for p, value in zip(self.trained, params, strict=True)}
            return unflatten_dict({**frozen, **leaves})
        leaves = dict(frozen)
        for first, a, b in zip(self.trained[::2], params[::2], params[1::2], strict=True):
            path = (*first.name.removesuffix(".lora_A.weight").split("."), "kernel")
            leaves[path] = leaves[path] + (lora.alpha / lora.rank) * (a @ b)  # (in, rank) @ (rank, out)
        return unflatten_dict(leaves)

    def _compute(
        self,
        params: list[Array],
        frozen: Any,
        ids: Array,
        targets: Array,
        mask: Array | None,
        divisor: Array,
        key: Array,
    ) -> tuple[list[Array], Array, Array]:
        z_factor = self.config.z_factor

        def loss_of(params: list[Array]) -> tuple[Array, tuple[Array, Array]]:
            tree = self._tree(params, frozen)
            logits = self.model.module.apply(
                {"params": tree}, ids, mask, use_cache=False, deterministic=False, rngs={"dropout": key}
            ).logits
            cross_entropy, z = (rows.sum() for rows in target_losses(logits, targets, z_factor > 0))
            return (cross_entropy + z_factor * z) / divisor, (cross_entropy, z)

        grads, sums = jax.grad(loss_of, has_aux=True)(params)
        return grads, *sums

    def _apply(
        self, params: list[Array], state: Any, grads: list[Array], rate: Array, scales: Array | None
    ) -> tuple[list[Array], Any]:
        if scales is not None:
            grads = [grad * scale for grad, scale in zip(grads, scales, strict=True)]
        updates, state = self.optimizer.update(grads, state, params)
        return [param - rate * update for param, update in zip(params, updates, strict=True)], state

    def _evaluate(self, params: list[Array], frozen: Any, ids: Array, targets: Array, mask: Array | None) -> Array:
        tree = self._tree(params, frozen)
        logits = self.model.module.apply({"params": tree}, ids, mask, use_cache=False, deterministic=True).logits
        return target_losses(logits, targets, False)[0]

    def gradients(self, batch: Batch, divisor: float, seed: int) -> tuple[Array, Array]:
        """Add the gradients of a micro-batch to those of the step.

        Args:
            batch: the micro-batch.
            divisor: of the summed loss.
            seed: of dropout.

        Returns:
            The sums of the cross-entropy and of the squared log-partition, before the division.
        """
        dtype = self.params[0].dtype
        key = jax.random.key(seed)
        grads, cross_entropy, z = self._gradients(
            self.params, self.frozen, *_arrays(batch), jnp.asarray(divisor, dtype), key
        )
        self.grads = grads if self.grads is None else self._add(self.grads, grads)
        return cross_entropy, z

    def norms(self) -> np.ndarray:
        """The norm of each parameter's gradient."""
        return np.asarray(self._norms(self.grads))

    def update(self, learning_rate: float, scales: np.ndarray | None) -> None:
        """Update the parameters by their gradients, each times its scale, and forget the gradients."""
        dtype = self.params[0].dtype
        rate = jnp.asarray(learning_rate, dtype)
        factors = None if scales is None else jnp.asarray(scales, dtype)
        self.params, self.state = self._update(self.params, self.state, self.grads, rate, factors)
        self.grads = None

    def evaluate(self, batch: Batch) -> np.ndarray:
        """The summed cross-entropy of each row, (batch,)."""
        return np.asarray(self._losses(self.params, self.frozen, *_arrays(batch)))

    @contextlib.contextmanager
    def rounded(self, quantization: Quantization) -> Iterator[None]:
        """Round the weights that quantization makes integers to what these keep, until the block ends.

        Adapters are merged into them before.
        """
        lora, kept = self.config.lora, (self.params, self.frozen)
        params: dict[str, Any] = {p.name: (p, leaf) for p, leaf in zip(self.trained, self.params, strict=True)}
        frozen = dict(self.frozen)

        def change(parameter: Parameter, values: np.ndarray) -> None:
            leaf = from_numpy(parameter, values)
            if parameter.name in params:
                params[parameter.name] = parameter, leaf
            else:
                frozen[self.model._leaf(parameter)] = leaf

        for parameter in filter(is_quantizable, self.model._parameter_table()):
            module = parameter.name.removesuffix(".weight")
            _, leaf = params.get(parameter.name) or (parameter, frozen[self.model._leaf(parameter)])
            weight = to_numpy(parameter, leaf)
            if f"{module}.lora_A.weight" not in params:
                change(parameter, rounded(weight, quantization))
                continue
            a, b = (params[f"{module}.{name}.weight"] for name in ("lora_A", "lora_B"))
            pair = to_numpy(*a), to_numpy(*b)
            change(parameter, rounded(weight, quantization, pair, lora.alpha / lora.rank))
            change(b[0], np.zeros_like(pair[1]))
        self.params, self.frozen = [leaf for _, leaf in params.values()], frozen
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

    def values(self) -> dict[str, np.ndarray]:
        """The trained parameters by name."""
        return {p.name: to_numpy(p, leaf) for p, leaf in zip(self.trained, self.params, strict=True)}

    def moments(self) -> dict[str, np.ndarray]:
        """The optimizer's running means, by names such as `exp_avg.model.norm.weight`."""
        means = self.state[0]
        kept = {"exp_avg": means.mu, "exp_avg_sq": getattr(means, "nu", None)}
        return {
            f"{moment}.{parameter.name}": to_numpy(parameter, leaf)
            for moment in self.config.optimizer.moments
            for parameter, leaf in zip(self.trained, kept[moment], strict=True)
        }

    def restore(self, values: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray], count: int) -> None:
        """Set trained parameters and the optimizer's running means, after `count` of its updates."""

        def leaf(parameter: Parameter, array: np.ndarray, old: Array) -> Array:
            return from_numpy(parameter, np.asarray(array)).astype(old.dtype)

        self.params = [
            leaf(parameter, values[parameter.name], old) if parameter.name in values else old
            for parameter, old in zip(self.trained, self.params, strict=True)
        ]
        if moments:
            fields = dict(zip(("exp_avg", "exp_avg_sq"), ("mu", "nu"), strict=True))
            found = {
                fields[moment]: [
                    leaf(parameter, moments[f"{moment}.{parameter.name}"], old)
                    for parameter, old in zip(self.trained, self.params, strict=True)
                ]
                for moment in self.config.optimizer.moments
            }
            means = self.state[0]._replace(count=jnp.asarray(count, self.state[0].count.dtype), **found)
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


def _arrays(batch: Batch) -> tuple[Array, Array, Array | None]:
    mask = None if batch.attention_mask is None else jnp.asarray(batch.attention_mask)
    return jnp.asarray(batch.input_ids), jnp.asarray(batch.targets), mask
