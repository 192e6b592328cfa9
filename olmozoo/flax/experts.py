"""A sparse MLP: a router sends each token to a few of many gated MLPs (arXiv:1701.06538, arXiv:2409.02060).

Shapes in comments: n tokens (batch times positions), e experts, k of them a token, m = n * k rows, c hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from olmozoo.families.olmoe import ExpertsConfig
from olmozoo.flax.layers import ACTIVATIONS, at_least_float32
from olmozoo.flax.quantization import dequantize

MOST_ROWS = 64  # of one product of a tile with an expert; as many as twice an expert's mean, if that is less
LEAST_ROWS = 2  # XLA would look up the kernel of a vector within the product, for each value of the kernel


class SparseMLP(nn.Module):
    """The sum of the outputs of a token's k experts, each times the weight that the router gives it.

    Each expert is computed on the tokens that are sent to it.
    """

    config: ExpertsConfig
    dtype: Any
    param_dtype: Any
    mesh: Mesh | None = None

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.gate = nn.Dense(self.config.num_experts, use_bias=False, **types)
        self.experts = Experts(self.config, **types)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Return the outputs (b, s, c) for x (b, s, c), and the router's logits (b * s, e)."""
        tokens = x.reshape(-1, x.shape[-1])  # (n, c)
        logits = self.gate(tokens)
        if self.mesh is None:
            out = mixture(tokens, logits, self.experts, self.config)
        else:
            mixed = split_mixture(self.mesh, self.config, len(x))
            out = mixed(tokens.astype(self.dtype), logits, *self.experts.kernels())
        return out.reshape(x.shape), logits


def mixture(
    tokens: Array,
    logits: Array,
    experts: Callable[[Array, Array], Array],
    config: ExpertsConfig,
    first: int | Array = 0,
    count: int | None = None,
) -> Array:
    """The sums (n, c) of the outputs of experts of each token.

    Args:
        tokens: (n, c).
        logits: (n, e), of the router.
        experts: from rows (m, c) sorted by expert, and the numbers of rows of each, to outputs (m, c).
        config: of the model.
        first: the first expert that counts.
        count: how many of them count; default all.
    """
    chosen = config.num_experts_per_tok
    weights, indices = route(logits, chosen, config.norm_topk_prob)
    numbers = (indices.reshape(-1) - first) % config.num_experts  # (m,)
    order = numbers.argsort()  # stable; the experts that count come first
    sizes = jnp.bincount(numbers, length=config.num_experts).astype(jnp.int32)[:count]  # rows of each expert
    out = experts(tokens[order // chosen], sizes)
    if count is not None:  # the rows of other experts
        out = jnp.where(jnp.arange(len(order))[:, None] < sizes.sum(), out, 0)
    out = out[order.argsort()]  # (m, c), by token again
    return jnp.einsum("nkc,nk->nc", out.reshape(-1, chosen, tokens.shape[-1]), weights)


def split_mixture(mesh: Mesh, config: ExpertsConfig, rows: int) -> Callable[..., Array]:
    """`mixture` of a mesh, as a function of tokens, logits and the kernels of `Experts`.

    Each device computes its experts, and of each its part of the MLP, on the tokens of its rows. What is gathered are
    the parts of the kernels along `fsdp`; the outputs are added up along `experts` and `tensor`.

    Args:
        mesh: the devices.
        config: of the model.
        rows: of the batch; where `fsdp` does not divide them, each device has the tokens of all.
    """
    own, inner = (axis if axis in mesh.shape else None for axis in ("experts", "tensor"))
    of_rows = PartitionSpec("fsdp" if rows % mesh.shape.get("fsdp", rows + 1) == 0 else None)
    wide, narrow = PartitionSpec(own, None, inner), PartitionSpec(own, inner)

    def part(tokens: Array, logits: Array, *kernels: Array) -> Array:
        count = len(kernels[0])
        first = 0 if own is None else lax.axis_index(own) * count
        experts = partial(gated_mlps, kernels, ACTIVATIONS[config.hidden_act])
        out = mixture(tokens, logits, experts, config, first, count)
        return lax.psum(out, tuple(axis for axis in (own, inner) if axis is not None))

    # Loops start from zeros, which are the same on all devices, and end with values that are not: JAX would refuse it.
    return jax.shard_map(
        part, mesh=mesh, in_specs=(of_rows, of_rows, wide, wide, narrow), out_specs=of_rows, check_vma=False
    )


def gated_mlps(kernels: tuple[Array, ...], act: Callable[[Array], Array], rows: Array, sizes: Array) -> Array:
    """`Experts` as a function of its kernels."""
    gate, up, down = kernels
    return grouped_product(act(grouped_product(rows, gate, sizes)) * grouped_product(rows, up, sizes), down, sizes)


def route(logits: Array, chosen: int, normalized: bool) -> tuple[Array, Array]:
    """Weights and indices (n, k) of the experts of each token, from logits (n, e).

    The softmax is over all experts, in at least float32, so that the weights of the chosen ones sum to less than 1.

    Args:
        logits: of the router.
        chosen: k.
        normalized: whether the weights are divided by their sum.
    """
    weights, experts = lax.top_k(nn.softmax(logits.astype(at_least_float32(logits.dtype))), chosen)
    if normalized:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights.astype(logits.dtype), experts


class Experts(nn.Module):
    """All gated MLPs of a layer, `down(act(gate(x)) * up(x))`, without biases."""

    config: ExpertsConfig
    dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        linear = partial(ExpertLinear, self.config.num_experts, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)
        self.act = ACTIVATIONS[self.config.hidden_act]

    def __call__(self, rows: Array, sizes: Array) -> Array:
        """Rows (m, c), the first `sizes[0]` of them for expert 0, the next `sizes[1]` for expert 1, ..."""
        return self.down_proj(self.act(self.gate_proj(rows, sizes)) * self.up_proj(rows, sizes), sizes)

    def kernels(self) -> tuple[Array, Array, Array]:
        """The kernels (e, in, out) of `gate_proj`, `up_proj` and `down_proj`."""
        return self.gate_proj.kernel, self.up_proj.kernel, self.down_proj.kernel


class ExpertLinear(nn.Module):
    """A linear layer of each expert, their kernels (e, in, out) stacked."""

    experts: int
    inputs: int
    features: int
    dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        self.quantized = self.has_variable("params", "values")  # integers: see `olmozoo.flax.quantization`
        if not self.quantized:
            shape = (self.experts, self.inputs, self.features)
            self.kernel = self.param("kernel", nn.initializers.lecun_normal(batch_axis=0), shape, self.param_dtype)

    def __call__(self, rows: Array, sizes: Array) -> Array:
        rows = rows.astype(self.dtype)
        if self.quantized:
            parts = (self.get_variable("params", name) for name in ("values", "scale", "zero"))
            return integer_product(rows, *parts, sizes)
        return grouped_product(rows, self.kernel, sizes)


@jax.custom_vjp
def grouped_product(rows: Array, kernel: Array, sizes: Array) -> Array:
    """Rows (m, in), sorted by expert, times each one's own kernel (in, out): (m, out).

    On a TPU this is `lax.ragged_dot`. Elsewhere XLA would make that a product of all rows with all experts; here it is
    a loop over tiles of rows that have one expert. How many there are is known when it runs: at most e tiles are not
    full. It has a first derivative, in reverse mode.

    Args:
        rows: (m, in).
        kernel: (e, in, out), of any dtype.
        sizes: int32 (e,), the rows of each expert; they sum to m.
    """
    if jax.default_backend() == "tpu":
        return lax.ragged_dot(rows, kernel.astype(rows.dtype), sizes)
    return tiled_product(rows, lambda expert: kernel[expert], kernel.shape[2], sizes, 0)


def grouped_product_forward(rows: Array, kernel: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_product(rows, kernel, sizes), (rows, kernel, sizes)


def grouped_product_backward(saved: tuple[Array, Array, Array], grad: Array) -> tuple[Array, Array, None]:
    rows, kernel, sizes = saved
    tiles = Tiles(rows.shape[0], sizes)
    padded_rows, padded_grad = tiles.pad(rows), tiles.pad(grad)

    def add(i: Array, total: Array) -> Array:
        expert, start, real = tiles[i]
        tile = jnp.where(real[:, None], tiles.cut(padded_rows, start), 0)
        part = jnp.einsum("ni,no->io", tile, tiles.cut(padded_grad, start), preferred_element_type=total.dtype)
        return total.at[expert].add(part)

    of_kernel = lax.fori_loop(0, tiles.count, add, jnp.zeros_like(kernel))
    return tiled_product(grad, lambda expert: kernel[expert], kernel.shape[1], sizes, 1), of_kernel, None


grouped_product.defvjp(grouped_product_forward, grouped_product_backward)


@jax.custom_vjp
def integer_product(rows: Array, values: Array, scale: Array, zero: Array | None, sizes: Array) -> Array:
    """`grouped_product` with kernels of integers, which do not train; an expert's are dequantized for its tiles.

    Args:
        rows: (m, in).
        values: (e, ...), of each expert as of `olmozoo.quantization.to_columns`.
        scale: (e, groups, out).
        zero: (e, groups, out); None for zeros.
        sizes: int32 (e,).
    """
    return tiled_product(rows, integer_kernels(values, scale, zero, rows.dtype), scale.shape[2], sizes, 0)


def integer_kernels(values: Array, scale: Array, zero: Array | None, dtype: Any) -> Callable[[Array], Array]:
    """A function from an expert to its kernel (in, out); the barrier keeps the product on XLA's fast path."""

    def own(expert: Array) -> Array:
        of_expert = None if zero is None else zero[expert]
        return lax.optimization_barrier(dequantize(values[expert], scale[expert], of_expert, dtype))

    return own


def integer_product_forward(rows: Array, *parts: Any) -> tuple[Array, tuple[Any, ...]]:
    return integer_product(rows, *parts), parts


def integer_product_backward(saved: tuple[Any, ...], grad: Array) -> tuple[Array, None, None, None, None]:
    values, scale, zero, sizes = saved
    width = values.shape[1] * (2 if values.dtype == jnp.uint8 else 1)
    own = integer_kernels(values, scale, zero, grad.dtype)
    return tiled_product(grad, own, width, sizes, 1), None, None, None, None


integer_product.defvjp(integer_product_forward, integer_product_backward)


class Tiles:
    """Runs of rows that have one expert, in the order of the rows; of all rows of an expert, only the last is short.

    Args:
        rows: how many there are, m.
        sizes: (e,), the rows of each expert.
    """

    def __init__(self, rows: int, sizes: Array) -> None:
        share = 2 * rows // len(sizes)
        self.rows = min(max(1 << max(share - 1, 0).bit_length(), LEAST_ROWS), MOST_ROWS)  # a power of two
        counts = -(-sizes // self.rows)
        self.sizes = sizes
        self.ends = jnp.cumsum(counts)
        self.firsts, self.starts = self.ends - counts, jnp.cumsum(sizes) - sizes
        self.count = self.ends[-1]

    def __getitem__(self, i: Array) -> tuple[Array, Array, Array]:
        """The expert of tile i, its first row, and which of its rows are the expert's own."""
        expert = jnp.searchsorted(self.ends, i, side="right")
        done = (i - self.firsts[expert]) * self.rows
        return expert, self.starts[expert] + done, jnp.arange(self.rows) < self.sizes[expert] - done

    def pad(self, x: Array) -> Array:
        """Add to x (m, ...) as many rows as a tile has, so that the last tile is not cut off."""
        return jnp.pad(x, ((0, self.rows), (0, 0)))

    def cut(self, x: Array, start: Array) -> Array:
        """The rows of one tile of a padded x."""
        return lax.dynamic_slice_in_dim(x, start, self.rows)


def tiled_product(rows: Array, own: Callable[[Array], Array], width: int, sizes: Array, axis: int) -> Array:
    """`grouped_product` by a loop, to `width` values.

    Args:
        rows: (m, in).
        own: the kernel of an expert.
        width: out.
        sizes: (e,), the rows of each expert.
        axis: of the kernel, the one of the rows' values.
    """
    tiles = Tiles(rows.shape[0], sizes)
    padded = tiles.pad(rows)

    def write(i: Array, out: Array) -> Array:
        expert, start, _ = tiles[i]
        part = lax.dot_general(tiles.cut(padded, start), own(expert).astype(rows.dtype), (((1,), (axis,)), ((), ())))
        return lax.dynamic_update_slice_in_dim(out, part, start, 0)  # the next tile overwrites what is not its own

    out = jnp.zeros((padded.shape[0], width), rows.dtype)
    return lax.fori_loop(0, tiles.count, write, out)[: rows.shape[0]]
