"""Linear layers with weights of 8 or 4 bits (see `olmozoo.quantization`).

In the tree of parameters such a layer has the leaves `values`, `scale` and, where it is not symmetric, `zero`, in place
of `kernel`; of experts, each has a first dimension more. The modules are the same: `quantized_dense` intercepts the
calls of their `nn.Dense` layers.

XLA's CPU would fuse the cast of the integers into the product, which then leaves its fast path. There, a block of rows
is dequantized at a time, small enough for the cache, and a barrier keeps the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from olmozoo.flax.layers import at_least_float32
from olmozoo.quantization import QuantizedTensor, from_columns, to_columns

BLOCK = 128  # rows that are dequantized at a time, where a group has more
Path = tuple[str, ...]


def quantized_dense(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> Any:
    """An interceptor (`nn.intercept_methods`) that computes `nn.Dense` layers whose weights are integers."""
    layer = context.module
    is_dense = isinstance(layer, nn.Dense) and context.method_name == "__call__"
    if not is_dense or not layer.has_variable("params", "values"):
        return call(*args, **kwargs)
    values, scale, zero, bias = (layer.get_variable("params", name) for name in ("values", "scale", "zero", "bias"))
    (x,) = args
    out = multiply(x if layer.dtype is None else x.astype(layer.dtype), values, scale, zero)
    return out if bias is None else out + bias.astype(out.dtype)


def multiply(x: Array, values: Array, scale: Array, zero: Array | None) -> Array:
    """`x W` for x (..., in) and a weight W (in, out) of integers, computed in at least float32.

    Args:
        x: the input.
        values: as of `olmozoo.quantization.to_columns`.
        scale: (groups, out).
        zero: (groups, out); None for zeros.
    """
    if jax.default_backend() != "cpu":
        return x @ dequantize(values, scale, zero, x.dtype)
    wide, halves = at_least_float32(x.dtype), 2 if values.dtype == jnp.uint8 else 1
    (groups, out), width = scale.shape, x.shape[-1]
    rows = width // groups // halves  # of `values` in a group
    block = next(size for size in range(min(rows, BLOCK), 0, -1) if rows % size == 0)
    per_group = rows // block
    values = values.reshape(groups * per_group, block, out)
    inputs = x.astype(wide).reshape(-1, groups, halves, per_group, block)
    inputs = inputs.transpose(1, 3, 2, 0, 4).reshape(groups * per_group, halves, -1, block)
    scale = scale.astype(wide)

    def add_block(i: Any, total: Array) -> Array:
        parts = [values[i]] if halves == 1 else [values[i] & 15, values[i] >> 4]
        offset: Any = 8 if halves == 2 else 0
        if zero is not None:
            offset = zero[i // per_group].astype(wide) + offset
        for half, part in enumerate(parts):
            dequantized = lax.optimization_barrier(part.astype(wide) - offset)  # (block, out)
            total += inputs[i, half] @ dequantized * scale[i // per_group]
        return total

    total = lax.fori_loop(0, groups * per_group, add_block, jnp.zeros((inputs.shape[2], out), wide))
    return total.reshape(*x.shape[:-1], out).astype(x.dtype)


def dequantize(values: Array, scale: Array, zero: Array | None, dtype: Any) -> Array:
    """A weight (in, out), computed in at least float32 and rounded to a dtype; arguments as of `multiply`."""
    (groups, out), wide = scale.shape, at_least_float32(dtype)
    grouped = values.reshape(groups, -1, out)
    if values.dtype == jnp.uint8:
        grouped = jnp.concatenate([grouped & 15, grouped >> 4], 1).astype(jnp.int8) - 8
    weight = grouped.astype(wide)
    if zero is not None:
        weight -= zero[:, None].astype(wide)
    return (weight * scale[:, None].astype(wide)).reshape(-1, out).astype(dtype)


def to_leaves(tensor: QuantizedTensor) -> dict[str, Array]:
    """The leaves of a layer's weight."""
    parts = {"values": to_columns(tensor), "scale": tensor.scale.T}
    if tensor.zero is not None:
        parts["zero"] = tensor.zero.T
    return {name: jax.device_put(np.array(part, order="C")) for name, part in parts.items()}


def from_leaves(leaves: Mapping[Path, Any], kernel: Path, expert: int | None = None) -> QuantizedTensor | None:
    """The weight of a layer, by the path that its kernel would have; None where it is not quantized.

    Args:
        leaves: of the tree, by path.
        kernel: the path.
        expert: which one, where the layer has the weights of all experts.
    """
    parts = [leaves.get((*kernel[:-1], name)) for name in ("values", "scale", "zero")]
    if parts[0] is None:
        return None
    bits = 4 if parts[0].dtype == jnp.uint8 else 8
    values, scale, zero = (None if x is None else np.asarray(x if expert is None else x[expert]) for x in parts)
    return from_columns(values, scale, zero, bits)


def shapes_in_floats(leaves: Mapping[Path, Any]) -> Iterable[tuple[Path, tuple[int, ...]]]:
    """The paths of leaves and their shapes, with a kernel for the leaves of each quantized weight."""
    layers = {path[:-1] for path in leaves if path[-1] == "values"}
    for path, leaf in leaves.items():
        shape = np.shape(leaf)
        if path[:-1] not in layers or path[-1] == "bias":
            yield path, shape
        elif path[-1] == "values":
            *experts, width, out = shape
            yield (*path[:-1], "kernel"), (*experts, width * (2 if leaf.dtype == jnp.uint8 else 1), out)
