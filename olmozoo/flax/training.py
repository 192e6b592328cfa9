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

from olmozoo.checkpoint.tensors import aligned_copy
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter, by_variable
from olmozoo.flax.base import from_numpy, stacked
from olmozoo.flax.losses import target_losses
from olmozoo.flax.sharding import to_host
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

    Attributes:
        aux_factor: of the load-balancing loss of a mixture of experts; 0 without one.
        groups: the trained parameters, those of each leaf together.
        params: the leaves of the groups. One that has some of a layer's experts alone is a copy of their part.
        frozen: the other leaves, and those that have such parts, by path.
    """

    def __init__(self, model: Any, trained: Sequence[Parameter], decays: Sequence[float], config: TrainConfig) -> None:
        self.model, self.groups, self.config = model, by_variable(trained), config
        self.aux_factor = getattr(model.config, "router_aux_loss_coef", 0.0)
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable()
        frozen = flatten_dict(model.params)
        self.params: list[Array]
        if config.lora is None:
            self.params = [_taken(frozen, model._leaf(group[0]), group) for group in self.groups]
        else:
            dtype = np.dtype(model.param_dtype)
            self.params = [_joined(group, [p.initial(config.seed, dtype) for p in group]) for group in self.groups]
        self.frozen = frozen
        self.starts = np.cumsum([0, *map(len, self.groups)])[:-1]  # of each group in `trained`
        self.optimizer = make_optimizer([decays[start] for start in self.starts], config)
        self.state = self.optimizer.init(self.params)
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
                leaves[path] = leaves[path].at[_indices(group)].set(value) if path in leaves else value
            return unflatten_dict(leaves)
        for group, a, b in zip(self.groups[::2], params[::2], params[1::2], strict=True):
            path = self._path(group)
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
        share: Array,
        key: Array,
    ) -> tuple[list[Array], Array, Array, Array]:
        z_factor = self.config.z_factor
        inputs = {"output_router_logits": True} if self.aux_factor else {}

        def loss_of(params: list[Array]) -> tuple[Array, tuple[Array, Array, Array]]:
            tree = self._tree(params, frozen)
            output = self.model.module.apply(
                {"params": tree}, ids, mask, use_cache=False, deterministic=False, rngs={"dropout": key}, **inputs
            )
            cross_entropy, z = (rows.sum() for rows in target_losses(output.logits, targets, z_factor > 0))
            aux = output.aux_loss * share if self.aux_factor else jnp.zeros_like(z)
            return (cross_entropy + z_factor * z) / divisor + self.aux_factor * aux, (cross_entropy, z, aux)

        grads, sums = jax.grad(loss_of, has_aux=True)(params)
        return grads, *sums

    def _norms_of(self, grads: list[Array]) -> Array:
        rows = (grad.reshape(len(group), -1) for grad, group in zip(grads, self.groups, strict=True))
        return jnp.concatenate([jnp.linalg.norm(row, axis=1) for row in rows])

    def _apply(
        self, params: list[Array], state: Any, grads: list[Array], rate: Array, scales: Array | None
    ) -> tuple[list[Array], Any]:
        if scales is not None:
            parts = jnp.split(scales, self.starts[1:])
            grads = [g * part.reshape(-1, *[1] * (g.ndim - 1)) for g, part in zip(grads, parts, strict=True)]
        updates, state = self.optimizer.update(grads, state, params)
        return [param - rate * update for param, update in zip(params, updates, strict=True)], state

    def _evaluate(self, params: list[Array], frozen: Any, ids: Array, targets: Array, mask: Array | None) -> Array:
        tree = self._tree(params, frozen)
        logits = self.model.module.apply({"params": tree}, ids, mask, use_cache=False, deterministic=True).logits
        return target_losses(logits, targets, False)[0]

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
        key = jax.random.key(seed)
        numbers = jnp.asarray(divisor, dtype), jnp.asarray(batch.share, dtype)
        grads, cross_entropy, z, aux = self._gradients(self.params, self.frozen, *_arrays(batch), *numbers, key)
        self.grads = grads if self.grads is None else self._add(self.grads, grads)
        return cross_entropy, z, aux

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

    def values(self) -> dict[str, np.ndarray]:
        """The trained parameters by name."""
        return dict(_named(self.groups, self.params))

    def moments(self) -> dict[str, np.ndarray]:
        """The optimizer's running means, by names such as `exp_avg.model.norm.weight`."""
        means = self.state[0]
        kept = {"exp_avg": means.mu, "exp_avg_sq": getattr(means, "nu", None)}
        return {
            f"{moment}.{name}": array
            for moment in self.config.optimizer.moments
            for name, array in _named(self.groups, kept[moment])
        }

    def restore(self, values: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray], count: int) -> None:
        """Set trained parameters and the optimizer's running means, after `count` of its updates."""

        def leaf(group: Sequence[Parameter], arrays: Mapping[str, np.ndarray], prefix: str, old: Array) -> Array:
            return _joined(group, [np.asarray(arrays[prefix + p.name]) for p in group]).astype(old.dtype)

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


def _indices(group: Sequence[Parameter]) -> np.ndarray:
    """The indices of experts in the leaf of their layer."""
    return np.array([parameter.stack[1] for parameter in group if parameter.stack is not None])


def _taken(leaves: dict[tuple[str, ...], Array], path: tuple[str, ...], group: Sequence[Parameter]) -> Array:
    """A leaf, which is taken out of `leaves`; or a copy of the experts of the group, where they are not all of it."""
    if group[0].stack is None or len(group) == len(leaves[path]):
        return leaves.pop(path)
    return leaves[path][_indices(group)]


def _joined(group: Sequence[Parameter], arrays: Sequence[np.ndarray]) -> Array:
    """The leaf of a group, from its parameters as they are in a checkpoint."""
    parts = [from_numpy(parameter, array) for parameter, array in zip(group, arrays, strict=True)]
    return parts[0] if group[0].stack is None else stacked(parts)


def _named(groups: Sequence[Sequence[Parameter]], leaves: Sequence[Array]) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters in leaves, by name, as they are in a checkpoint."""
    for group, leaf in zip(groups, leaves, strict=True):
        array = to_host(leaf)
        for index, parameter in enumerate(group):
            part = array if parameter.stack is None else array[index]
            yield parameter.name, aligned_copy(part, transposed=True) if parameter.kind == "linear" else part


def _arrays(batch: Batch) -> tuple[Array, Array, Array | None]:
    mask = None if batch.attention_mask is None else jnp.asarray(batch.attention_mask)
    return jnp.asarray(batch.input_ids), jnp.asarray(batch.targets), mask
