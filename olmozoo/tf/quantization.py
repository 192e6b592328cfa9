"""Linear layers with weights of 8 or 4 bits (see `olmozoo.quantization`), which are dequantized for each call.

XLA would dequantize all weights at once, those of a loop before it, and keep them as floats. In its programs a block of
a weight is therefore dequantized at a time, small enough for the cache.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from olmozoo.quantization import Quantization, QuantizedTensor, from_columns, is_packed, to_columns
from olmozoo.tf.experts import frozen_product
from olmozoo.tf.layers import Tensor, at_least_float32, no_values

BLOCK = 128  # rows of a weight that are dequantized at a time, where a group has more


class QuantizedDense(keras.layers.Layer):
    """`x W + b` for a weight W (in, out) of integers, which does not train.

    Args:
        size: out.
        width: in.
        scheme: how the weight is quantized.
        scale_dtype: of the scales, "float32" or "bfloat16".
        use_bias: whether there is a bias.
        name: of the layer.

    Attributes:
        values: as of `olmozoo.quantization.to_columns`.
        scale: (groups, out).
        zero: int8 (groups, out), or None for zeros.
        bias: (out,), or None.
    """

    stack: tuple[int, ...] = ()  # dimensions of the variables before these

    def __init__(
        self, size: int, width: int, scheme: Quantization, scale_dtype: str, use_bias: bool, name: str
    ) -> None:
        super().__init__(name=name)
        self.size, self.width, self.scheme, self.scale_dtype, self.use_bias = size, width, scheme, scale_dtype, use_bias

    def build(self, input_shape: Any = None) -> None:
        groups = self.scheme.groups(self.width)
        packed = is_packed(self.scheme.bits, self.width // groups)
        rows, dtype = (self.width // 2, "uint8") if packed else (self.width, "int8")
        fixed: dict[str, Any] = {"initializer": "zeros", "trainable": False, "autocast": False}
        grouped = (*self.stack, groups, self.size)
        self.values = self.add_weight(name="values", shape=(*self.stack, rows, self.size), dtype=dtype, **fixed)
        self.scale = self.add_weight(name="scale", shape=grouped, dtype=self.scale_dtype, **fixed)
        self.zero = self.bias = None
        if not self.scheme.symmetric:
            self.zero = self.add_weight(name="zero", shape=grouped, dtype="int8", **fixed)
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.size,), initializer=no_values)
        self.built = True

    def assign(self, tensor: QuantizedTensor, expert: int | None = None) -> None:
        """Set the weight, or that of an expert."""
        zero = None if tensor.zero is None else tensor.zero.T
        for variable, part in ((self.values, to_columns(tensor)), (self.scale, tensor.scale.T), (self.zero, zero)):
            if variable is not None:
                (variable if expert is None else variable.value[expert]).assign(part)

    def tensor(self, expert: int | None = None) -> QuantizedTensor:
        """The weight in NumPy, or that of an expert."""
        parts = (part if part is None or expert is None else part[expert] for part in self.parts())
        values, scale, zero = (None if part is None else part.numpy() for part in parts)
        return from_columns(values, scale, zero, self.scheme.bits)

    @property
    def kernel(self) -> Tensor:
        """The dequantized weight (in, out), in the compute dtype."""
        return self.dequantize(self.compute_dtype)

    def dequantize(self, dtype: str) -> Tensor:
        """The weight (in, out), computed in at least float32 and rounded to a dtype."""
        return dequantize(*self.parts(), dtype)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The values, scales and zero points, as arguments of `dequantize`."""
        zero = None if self.zero is None else tf.convert_to_tensor(self.zero)
        return tf.convert_to_tensor(self.values), tf.convert_to_tensor(self.scale), zero

    def call(self, x: Tensor) -> Tensor:
        values, scale, zero = self.parts()
        if None not in x.shape and not tf.executing_eagerly():

            @tf.custom_gradient
            def product(x: Tensor) -> tuple[Tensor, Any]:
                out = multiply(x, values, scale, zero)
                return out, lambda upstream: tf.tensordot(upstream, self.dequantize(x.dtype), [[-1], [1]])

            out = product(x)
        elif scale.shape[0] == 1 and zero is None:  # a scale for each output: applied there, to fewer values
            out = ops.matmul(x, ops.cast(integers(values, 1)[0], x.dtype)) * ops.cast(scale, x.dtype)[0]
        else:
            out = ops.matmul(x, self.dequantize(x.dtype))
        return out if self.bias is None else out + ops.cast(self.bias, out.dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...], *others: Any) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.size)


class QuantizedExpertDense(QuantizedDense):
    """`ExpertDense` with weights of integers, which do not train; an expert's are dequantized when it is computed.

    Args:
        experts: how many.
        size: out.
        width: in.
        scheme: how all weights are quantized.
        scale_dtype: of the scales.
        name: of the layer.
    """

    def __init__(self, experts: int, size: int, width: int, scheme: Quantization, scale_dtype: str, name: str) -> None:
        super().__init__(size, width, scheme, scale_dtype, False, name)
        self.stack = (experts,)

    def dequantize(self, dtype: str) -> Tensor:
        """The weights (experts, in, out), computed in at least float32 and rounded to a dtype."""
        values, scale, zero = self.parts()
        zeros = [None] * self.stack[0] if zero is None else tf.unstack(zero)
        parts = zip(tf.unstack(values), tf.unstack(scale), zeros, strict=True)
        return tf.stack([dequantize(*part, dtype) for part in parts])

    def call(self, rows: Tensor, sizes: Tensor) -> Tensor:
        values, scale, zero = self.parts()

        def own(expert: Tensor) -> Tensor:
            of_expert = None if zero is None else tf.gather(zero, expert)
            return dequantize(tf.gather(values, expert), tf.gather(scale, expert), of_expert, rows.dtype)

        return frozen_product(rows, own, self.width, self.size, sizes)


def multiply(x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """`x W` for x (..., in) and a weight W (in, out) of integers, block by block, computed in at least float32.

    Args:
        x: the input; its shape is known.
        values, scale, zero: as in `QuantizedDense`.
    """
    wide, is_packed, (groups, out) = at_least_float32(x.dtype), values.dtype == tf.uint8, scale.shape
    count, size = math.prod(x.shape[:-1]), x.shape[-1] // groups
    halves = 2 if size % 2 == 0 else 1  # of what is multiplied at a time
    block = next(rows for rows in range(min(size // halves, BLOCK // 2), 0, -1) if size // halves % rows == 0)
    per_group = size // halves // block
    # Packed values have the halves of a group in the same bytes; of others, halves of a block are neighbours.
    split, order = ((halves, per_group), (1, 3, 2, 0, 4)) if is_packed else ((per_group, halves), (1, 2, 3, 0, 4))
    inputs = tf.transpose(tf.reshape(tf.cast(x, wide), (count, groups, *split, block)), order)
    inputs = tf.reshape(inputs, (groups * per_group, halves, count, block))
    values = tf.reshape(values, (groups * per_group, 1 if is_packed else halves, block, out))
    shifts, scale = tf.constant([0, 4], "uint8")[:, None, None], tf.cast(scale, wide)

    def add_block(i: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        integers, offset = values[i], tf.constant(8 if is_packed else 0, wide)
        if is_packed:
            integers = tf.bitwise.bitwise_and(tf.bitwise.right_shift(integers, shifts), 15)
        if zero is not None:
            offset += tf.cast(zero[i // per_group], wide)
        weight = tf.cast(integers, wide) - offset  # (halves, block, out)
        if count == 1:  # XLA would compute the weight within the product of a vector, slowly, but not within a batch
            product = tf.reduce_sum(inputs[i] @ weight, 0)
        else:
            product = tf.add_n([inputs[i, half] @ weight[half] for half in range(halves)])
        return i + 1, total + product * scale[i // per_group]

    blocks = groups * per_group
    start = tf.constant(0), tf.zeros((count, out), wide)
    total = tf.while_loop(lambda i, _: i < blocks, add_block, start)[1]
    return tf.cast(tf.reshape(total, (*x.shape[:-1], out)), x.dtype)


def integers(values: Tensor, groups: int) -> Tensor:
    """A weight's integers (groups, in / groups, out) in 8 bits, from the values of `QuantizedDense`."""
    is_packed = values.dtype == tf.uint8
    values = ops.reshape(values, (groups, -1, values.shape[-1]))
    if is_packed:
        halves = tf.bitwise.bitwise_and(values, 15), tf.bitwise.right_shift(values, 4)
        values = ops.cast(ops.concatenate(halves, 1), "int8") - 8
    return values


def dequantize(values: Tensor, scale: Tensor, zero: Tensor | None, dtype: Any) -> Tensor:
    """A weight (in, out), computed in at least float32 and rounded to a dtype; arguments as in `QuantizedDense`."""
    (groups, out), wide = scale.shape, at_least_float32(dtype)
    grouped = ops.cast(integers(values, groups), wide)
    if zero is not None:
        grouped -= ops.cast(zero, wide)[:, None]
    grouped *= ops.cast(scale, wide)[:, None]
    return ops.cast(ops.reshape(grouped, (-1, out)), dtype)


def scale_dtype(tensor: QuantizedTensor) -> str:
    """The dtype of a weight's scales by its name."""
    return np.dtype(tensor.scale.dtype).name
