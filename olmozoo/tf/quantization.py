"""Linear layers with weights of 8 or 4 bits (see `olmozoo.quantization`), which are dequantized for each call."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from olmozoo.quantization import Quantization, QuantizedTensor, from_columns, is_packed, to_columns
from olmozoo.tf.layers import Tensor, at_least_float32, no_values


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
        self.values = self.add_weight(name="values", shape=(rows, self.size), dtype=dtype, **fixed)
        self.scale = self.add_weight(name="scale", shape=(groups, self.size), dtype=self.scale_dtype, **fixed)
        self.zero = self.bias = None
        if not self.scheme.symmetric:
            self.zero = self.add_weight(name="zero", shape=(groups, self.size), dtype="int8", **fixed)
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.size,), initializer=no_values)
        self.built = True

    def assign(self, tensor: QuantizedTensor) -> None:
        """Set the weight."""
        self.values.assign(to_columns(tensor))
        self.scale.assign(tensor.scale.T)
        if self.zero is not None:
            self.zero.assign(tensor.zero.T)

    def tensor(self) -> QuantizedTensor:
        """The weight in NumPy."""
        zero = None if self.zero is None else self.zero.numpy()
        return from_columns(self.values.numpy(), self.scale.numpy(), zero, self.scheme.bits)

    @property
    def kernel(self) -> Tensor:
        """The dequantized weight (in, out), in the compute dtype."""
        return self.dequantize(self.compute_dtype)

    def integers(self) -> Tensor:
        """The weight's integers (groups, in / groups, out), in 8 bits."""
        values = ops.reshape(tf.convert_to_tensor(self.values), (self.scale.shape[0], -1, self.size))
        if self.values.dtype == "uint8":
            halves = tf.bitwise.bitwise_and(values, 15), tf.bitwise.right_shift(values, 4)
            values = ops.cast(ops.concatenate(halves, 1), "int8") - 8
        return values

    def dequantize(self, dtype: str) -> Tensor:
        """The weight (in, out), computed in at least float32 and rounded to a dtype."""
        wide = at_least_float32(dtype)
        values = ops.cast(self.integers(), wide)
        if self.zero is not None:
            values -= ops.cast(self.zero, wide)[:, None]
        values *= ops.cast(self.scale, wide)[:, None]
        return ops.cast(ops.reshape(values, (self.width, self.size)), dtype)

    def call(self, x: Tensor) -> Tensor:
        if self.scale.shape[0] == 1 and self.zero is None:  # a scale for each output: applied there, to fewer values
            out = ops.matmul(x, ops.cast(self.integers()[0], x.dtype)) * ops.cast(self.scale, x.dtype)[0]
        else:
            out = ops.matmul(x, self.dequantize(x.dtype))
        return out if self.bias is None else out + ops.cast(self.bias, out.dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.size)


def scale_dtype(tensor: QuantizedTensor) -> str:
    """The dtype of a weight's scales by its name."""
    return np.dtype(tensor.scale.dtype).name
