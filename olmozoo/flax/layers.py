"""Blocks that families share: norm, rotary positions, masks, attention, gated MLP.

Shapes in comments: b batch, s positions in this call, t positions with the cache, h query heads, g key/value heads,
d head_dim, c hidden size, f MLP width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from olmozoo.errors import InputError
from olmozoo.families.rope import Rope
from olmozoo.memory import MIN_ROWS, SCORE_BYTES, quarters

ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "silu": nn.silu,
    "swish": nn.silu,
}


def concrete(x: Any) -> np.ndarray | None:
    """The values of an array where they are at hand: on the CPU, and not traced."""
    if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and {d.platform for d in x.devices()} != {"cpu"}):
        return None
    return np.asarray(x)


def at_least_float32(dtype: Any) -> Any:
    """float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def matrix_product(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`lax.dot_general` of x (..., in) and a kernel (in, out), as the product of two matrices.

    For the gradient of the kernel, XLA's CPU would transpose a copy of an output (b, s, out) of three dimensions.
    """
    out = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return out.reshape(*x.shape[:-1], kernel.shape[1])


Dense = partial(nn.Dense, dot_general=matrix_product)


class RMSNorm(nn.Module):
    """`w * x / sqrt(mean(x^2) + eps)` in at least float32, cast back after the product (arXiv:1910.07467)."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        wide = x.astype(at_least_float32(x.dtype))
        wide = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (scale * wide).astype(x.dtype)


class LayerNorm(nn.Module):
    """`w * (x - mean) / sqrt(var + 1e-5) + b` in at least float32, cast back (arXiv:1607.06450); w, b if `affine`."""

    affine: bool
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = x.astype(at_least_float32(x.dtype))
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
            wide = scale * wide + bias
        return wide.astype(x.dtype)


def rotary(rope: Rope, positions: Array, dtype: Any) -> tuple[Array, Array]:
    """Cosines and sines, each (b, 1, s, d), for positions (b, s), in at least float32; see `Rope.frequencies`."""
    dtype = at_least_float32(dtype)
    inv_freq = jnp.array(rope.inv_freq, dtype)
    if rope.growth is not None:
        past = jnp.maximum(positions.max() + 1 - rope.length, 0).astype(dtype)
        inv_freq = inv_freq * (1 + rope.factor * past / rope.length) ** -jnp.array(rope.growth, dtype)
    elif rope.long_inv_freq is not None:
        is_long = positions.max() + 1 > rope.length
        inv_freq = jnp.where(is_long, jnp.array(rope.long_inv_freq, dtype), inv_freq)
    angles = positions[:, None, :, None].astype(dtype) * inv_freq
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate each pair (i, i + d/2) of x (b, h, s, d) by its angle (arXiv:2104.09864, in the half-split layout)."""
    wide = x.astype(cos.dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    return (wide * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)


def causal_mask(
    attention_mask: Array | None,
    batch: int,
    length: int,
    past: Any,
    keys: int,
    window: int | None = None,
    end: Any = None,
) -> Array:
    """Which keys each query sees: bool (b or 1, 1, s, t).

    A query sees the real keys up to its own position, in a window the last of these alone. One that would see none
    (padding on the left) sees itself, so that no softmax is over nothing. Positions of a `KVCache` that are not written
    yet come after every query's own, so none sees them.

    Args:
        attention_mask: (b, past + s), 1 for real tokens; it may be as wide as (b, t). Or (b or 1, h or 1, s, past + s
            to t), which is the answer itself, with no window: true where a query sees a key, or floats, which
            `attention` adds to the scores.
        batch: b.
        length: s.
        past: positions in the cache before this call; it may be traced.
        keys: t; past + s, but for a `KVCache` its `max_length`.
        window: how many positions a query sees, padding and its own included; None for all.
        end: None where key i is that of position i. For a layer of a `WindowCache`, the number of positions cached
            after this call; key i is then that of the last position before `end` that is i modulo t.

    Raises:
        InputError: attention_mask has another shape.
    """
    least = length if isinstance(past, jax.core.Tracer) else int(past) + length
    if attention_mask is not None and jnp.ndim(attention_mask) == 4:
        return whole_mask(attention_mask, length, least, keys)
    query = past + jnp.arange(length)[:, None]
    key = jnp.arange(keys)[None, :]
    if end is not None:
        key = end - 1 - (end - 1 - key) % keys  # below 0 where nothing is written yet
    causal = (key <= query)[None, None]
    if window is not None:
        causal &= key > query - window
    if end is not None:
        causal &= key >= 0
    if attention_mask is None:
        return causal
    real = jnp.asarray(attention_mask).astype(bool)
    if end is None:
        check_mask(real, batch, least, keys)
        real = jnp.pad(real, ((0, 0), (0, keys - real.shape[1])))
    else:
        real = real[:, jnp.maximum(key[0], 0)]
    seen = causal & real[:, None, None, :]
    return seen | (~seen.any(-1, keepdims=True) & (key == query))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["attention_mask", "past", "end"],
    meta_fields=["batch", "keys", "window", "rows"],
)
@dataclass(frozen=True)
class QueryBlocks:
    """The masks of a long call, made for `rows` queries at a time; the other fields are arguments of `causal_mask`."""

    attention_mask: Array | None
    past: Any
    batch: int
    keys: int
    window: int | None
    end: Any
    rows: int

    def run(self, attend: Callable[..., Array], query: Array, key: Array, value: Array) -> Array:
        """`attend(query, key, value, mask)` by blocks of queries, in memory linear in s and t (arXiv:2112.05682).

        In a window, a block is given the keys in it alone; without one, a quarter of the queries is given the keys up
        to its own last, where the positions are known to the program. The backward pass computes each block again.
        """
        if self.window is not None or self.end is not None or isinstance(self.past, jax.core.Tracer):
            return self.blocks(attend, query, key, value)
        first, out = int(self.past), []
        for start, stop in quarters(query.shape[2], self.rows):
            keys = first + stop
            mask = None if self.attention_mask is None else self.attention_mask[:, :keys]
            part = replace(self, attention_mask=mask, past=first + start, keys=keys)
            out.append(part.blocks(attend, query[:, :, start:stop], key[:, :, :keys], value[:, :, :keys]))
        return jnp.concatenate(out, 1)

    def blocks(self, attend: Callable[..., Array], query: Array, key: Array, value: Array) -> Array:
        """See `run`; all queries are given the same keys, but for a window."""
        batch, heads, length, head_dim = query.shape
        count = -(-length // self.rows)
        query = jnp.pad(query, ((0, 0), (0, 0), (0, count * self.rows - length), (0, 0)))
        blocks = query.reshape(batch, heads, count, self.rows, head_dim).transpose(2, 0, 1, 3, 4)
        in_order = self.window is not None and self.end is None
        width = min(self.keys, self.window + self.rows - 1) if in_order else self.keys

        @jax.checkpoint
        def one(start: Array, block: Array) -> Array:
            first = self.past + start
            mask = causal_mask(self.attention_mask, self.batch, self.rows, first, self.keys, self.window, self.end)
            if width == self.keys:
                return attend(block, key, value, mask)
            begin = jnp.clip(first - self.window + 1, 0, self.keys - width)
            return attend(
                block,
                *(lax.dynamic_slice_in_dim(x, begin, width, axis) for x, axis in ((key, 2), (value, 2), (mask, 3))),
            )

        out = lax.map(lambda args: one(*args), (jnp.arange(count) * self.rows, blocks))  # (count, b, rows, h * d)
        return out.transpose(1, 0, 2, 3).reshape(batch, count * self.rows, -1)[:, :length]


def query_mask(
    attention_mask: Array | None,
    batch: int,
    length: int,
    past: Any,
    keys: int,
    window: int | None,
    end: Any,
    heads: int,
) -> Array | QueryBlocks:
    """`causal_mask`, or `QueryBlocks` where the scores of `heads` heads would take more than `SCORE_BYTES`.

    In a program that serves any length (`jax.export`), it is the former.
    """
    if not all(isinstance(size, int) for size in (batch, length, keys)):
        return causal_mask(attention_mask, batch, length, past, keys, window, end)
    width = keys if window is None else min(keys, 2 * window)
    at_once = SCORE_BYTES // (4 * batch * heads * width)  # queries
    if length <= max(at_once, 1) or (attention_mask is not None and jnp.ndim(attention_mask) == 4):
        return causal_mask(attention_mask, batch, length, past, keys, window, end)
    if attention_mask is not None and end is None:
        attention_mask = jnp.asarray(attention_mask)
        check_mask(attention_mask, batch, length if isinstance(past, jax.core.Tracer) else int(past) + length, keys)
    return QueryBlocks(attention_mask, past, batch, keys, window, end, max(at_once // 4, MIN_ROWS["flax"]))


def check_mask(mask: Array, batch: int, least: int, keys: int) -> None:
    """Check the shape of an attention_mask of two dimensions; see `causal_mask`."""
    if mask.ndim != 2 or mask.shape[0] != batch or not least <= mask.shape[1] <= keys:
        raise InputError(
            f"attention_mask has shape {mask.shape}, expected ({batch}, {least}"
            f"{'' if least == keys else f' to {keys}'}), the cached positions and the new ones"
        )


def whole_mask(mask: Array, length: int, least: int, keys: int) -> Array:
    """An attention_mask of four dimensions, as wide as the keys: bool, or floats to add to the scores."""
    mask = jnp.asarray(mask)
    if mask.shape[2] != length or not least <= mask.shape[3] <= keys:
        raise InputError(
            f"attention_mask has shape {mask.shape}, expected (batch, 1 or heads, {length}, {least}"
            f"{'' if least == keys else f' to {keys}'})"
        )
    floating = jnp.issubdtype(mask.dtype, jnp.floating)
    pad = ((0, 0), (0, 0), (0, 0), (0, keys - mask.shape[3]))
    return jnp.pad(mask if floating else mask.astype(bool), pad, constant_values=-jnp.inf if floating else False)


def clip(x: Array, limit: float | None) -> Array:
    """Clamp x to [-limit, limit]; as it is for None."""
    return x if limit is None else x.clip(-limit, limit)


def split_heads(x: Array, head_dim: int) -> Array:
    """(b, s, h * d) -> (b, h, s, d)."""
    return x.reshape(*x.shape[:2], -1, head_dim).transpose(0, 2, 1, 3)


def attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | QueryBlocks,
    scale: float,
    dropout: Callable[[Array], Array],
    head_mask: Array | None = None,
) -> tuple[Array, Array | None]:
    """Softmax attention of query (b, h, s, d) on key and value (b, g, t, d); key head i serves h/g query heads.

    A mask of floats is added to the scores. A head_mask (h,) multiplies each head's weights. `dropout` is a function
    of the weights.

    Returns:
        The heads' outputs, side by side, (b, s, h * d); and the weights (b, h, s, t). For `QueryBlocks` these are None,
        and there is no dropout.
    """
    if isinstance(mask, QueryBlocks):
        attend = partial(attention, scale=scale, dropout=lambda weights: weights, head_mask=head_mask)
        return mask.run(lambda *args: attend(*args)[0], query, key, value), None
    batch, heads, length, head_dim = query.shape
    groups, keys = key.shape[1:3]
    wide = at_least_float32(query.dtype)
    key, value = key.astype(query.dtype), value.astype(query.dtype)  # a cache may be of another dtype
    # Queries of heads that share a key head lie one after another, as one longer run.
    run = heads // groups * length
    query = query.reshape(batch, groups, run, head_dim)
    scores = jnp.einsum("bgqd,bgtd->bgqt", query, key, preferred_element_type=wide) * scale
    scores = scores.reshape(batch, heads, length, keys)
    if jnp.issubdtype(mask.dtype, jnp.floating):
        scores += jnp.maximum(mask.astype(wide), jnp.finfo(query.dtype).min)  # no row of infinities alone
    else:
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
    weights = dropout(nn.softmax(scores).astype(query.dtype))
    if head_mask is not None:
        weights = weights * head_mask[:, None, None].astype(weights.dtype)
    out = jnp.einsum("bgqt,bgtd->bgqd", weights.reshape(batch, groups, run, keys), value)
    out = out.reshape(batch, heads, length, head_dim).transpose(0, 2, 1, 3)
    return out.reshape(batch, length, -1), weights


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (arXiv:2002.05202), no biases."""

    hidden_size: int
    intermediate_size: int
    activation: str
    dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        dense = partial(Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        self.gate_proj = dense(self.intermediate_size)
        self.up_proj = dense(self.intermediate_size)
        self.down_proj = dense(self.hidden_size)
        self.act = ACTIVATIONS[self.activation]

    def __call__(self, x: Array) -> Array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def tied_head(hidden: Array, embedding: Array) -> Array:
    """Logits (b, s, v) of hidden (b, s, c) by the token embedding (v, c), of which no transposed copy is made."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = lax.dot_general(rows, embedding.astype(hidden.dtype), (((1,), (1,)), ((), ())))
    return logits.reshape(*hidden.shape[:-1], len(embedding))
