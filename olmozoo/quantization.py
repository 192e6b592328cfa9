"""Linear weights as integers of 8 or 4 bits, in NumPy: the three wings hold the same ones.

A weight W (out, in) is split along its rows into groups of `group_size` values, each with a scale s:

    s = m / -2^(b-1)        m the value of largest magnitude in the group, so that it becomes the least integer
    q = clip(round(W / s), -2^(b-1), 2^(b-1) - 1)
    W' = s (q - z)          z is 0; weights that other programs have quantized may have zero points

Scales have the sign of -m: all 2^b integers are used, where the usual s = |m| / (2^(b-1) - 1) leaves one out, which
counts in 4 bits. Activations stay in floating point, and so do embeddings, norms, biases and heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from olmozoo.errors import InputError, raise_problems
from olmozoo.families.parameter import Parameter
from olmozoo.typing import Array

NAMES = ("int8", "int4")
GROUP_SIZE = 128
ROWS = 512  # rows of a matrix that are quantized at a time
BLOCK = re.compile(r"\.layers\.\d+\.")


@dataclass(frozen=True)
class Quantization:
    """How linear weights are quantized.

    Attributes:
        bits: 8 or 4.
        group_size: values along a row that share a scale; None for one scale a row.
        symmetric: whether zero points are 0; those of `quantize` are.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    @classmethod
    def of(cls, name: str, group_size: int = GROUP_SIZE) -> Quantization:
        """The quantization of a name: `int8` has a scale a row, `int4` a scale a group.

        Raises:
            InputError: there is no such name, or `group_size` is no positive integer.
        """
        if name not in NAMES:
            raise InputError(f"quantization is {name!r}, expected one of {', '.join(NAMES)}, or none for floats")
        if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
            raise InputError(f"group_size is {group_size!r}, expected a positive integer")
        return cls(8) if name == "int8" else cls(4, group_size)

    def groups(self, width: int) -> int:
        """The number of groups in a row of `width` values."""
        return 1 if self.group_size is None else width // self.group_size

    def __str__(self) -> str:
        groups = "a scale a row" if self.group_size is None else f"groups of {self.group_size}"
        return f"int{self.bits}, {groups}, {'symmetric' if self.symmetric else 'with zero points'}"


@dataclass(frozen=True)
class QuantizedTensor:
    """A linear weight as integers.

    Attributes:
        values: int8 (out, in), also where they have 4 bits.
        scale: (out, groups), float32 or bfloat16.
        zero: int8 (out, groups); None for zeros.
        bits: 8 or 4.
    """

    values: Array
    scale: Array
    zero: Array | None
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, (out, in)."""
        return tuple(self.values.shape)

    @property
    def scheme(self) -> Quantization:
        """How it is quantized."""
        groups = self.scale.shape[1]
        return Quantization(self.bits, None if groups == 1 else self.shape[1] // groups, self.zero is None)

    def dequantize(self, dtype: Any) -> Array:
        """The weight (out, in), computed in at least float32 and rounded to that dtype."""
        (out, width), groups = self.shape, self.scale.shape[1]
        wide = np.result_type(np.float32, np.float64 if dtype == np.float64 else np.float32)
        values = self.values.reshape(out, groups, width // groups).astype(wide)
        if self.zero is not None:
            values -= self.zero[:, :, None]
        values *= self.scale[:, :, None].astype(wide)
        return values.reshape(out, width).astype(dtype, copy=False)


def as_floats(values: Array | QuantizedTensor, dtype: Any) -> Array:
    """An array as it is, and a quantized weight dequantized in a dtype."""
    return values.dequantize(dtype) if isinstance(values, QuantizedTensor) else values


def scale_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the scales of a weight in `dtype`: bfloat16 for bfloat16, else float32."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    return bfloat16 if dtype == bfloat16 else np.dtype(np.float32)


def is_quantizable(parameter: Parameter) -> bool:
    """Whether a parameter is a linear weight of a block: not a head, an embedding, a norm or a bias.

    Weights of experts are among them. Those of routers, which are small and decide where a token goes, are not.
    """
    is_of_block = parameter.kind == "linear" and BLOCK.search(parameter.name) is not None
    return is_of_block and parameter.group != "router"


def check_groups(parameters: Iterable[Parameter], quantization: Quantization) -> None:
    """Check that groups divide the rows of every weight that is quantized.

    Raises:
        InputError: they do not; every such layer is named, with a size that divides all.
    """
    size = quantization.group_size
    weights = [parameter for parameter in parameters if is_quantizable(parameter)]
    if size is None:
        return
    common = int(np.gcd.reduce([parameter.shape[1] for parameter in weights] or [size]))
    wrong = [
        f"{parameter.name.removesuffix('.weight')} has rows of {parameter.shape[1]}"
        for parameter in weights
        if parameter.shape[1] % size
    ]
    raise_problems(f"group_size {size} does not divide every layer, {common} does", wrong, InputError)


def quantize(weight: Array, quantization: Quantization, scale: np.dtype[Any] | None = None) -> QuantizedTensor:
    """A weight (out, in) as integers, by rounding to nearest.

    Scales are rounded to their dtype before the integers are chosen, so that these fit the scales that are kept. A
    group of zeros has the scale 1.

    Args:
        weight: the weight.
        quantization: how.
        scale: the dtype of the scales; default that of `scale_dtype(weight.dtype)`.

    Raises:
        InputError: a value is not finite.
    """
    (out, width), least = weight.shape, -(1 << quantization.bits - 1)
    groups = quantization.groups(width)
    values = np.empty((out, groups, width // groups), np.int8)
    scales = np.empty((out, groups), scale_dtype(weight.dtype) if scale is None else scale)
    wide = np.result_type(np.float32, weight.dtype) if weight.dtype.kind == "f" else np.dtype(np.float32)
    for start in range(0, out, ROWS):
        rows = slice(start, start + ROWS)
        part = weight[rows].astype(wide, copy=False).reshape(-1, *values.shape[1:])
        if not np.isfinite(part).all():
            raise InputError("a weight that is not finite cannot be quantized")
        low, high = part.min(-1), part.max(-1)
        s = (np.where(-low > high, low, high) / least).astype(scales.dtype)
        s[s == 0] = 1
        scales[rows] = s
        values[rows] = np.clip(np.rint(part / s.astype(wide)[..., None]), least, -least - 1)
    return QuantizedTensor(values.reshape(out, width), scales, None, quantization.bits)


def rounded(
    weight: Array, quantization: Quantization, factors: tuple[Array, Array] | None = None, scale: float = 1.0
) -> Array:
    """A weight (out, in) as its integers have it, in its own dtype.

    Args:
        weight: the weight.
        quantization: how it is quantized.
        factors: A (rank, in) and B (out, rank) of an adapter; W + scale B A is quantized then.
        scale: see `factors`.

    Raises:
        InputError: a value is not finite.
    """
    if factors is not None:
        a, b = factors
        weight = weight + (b @ a) * weight.dtype.type(scale)
    return quantize(weight, quantization).dequantize(weight.dtype)


def pack(values: Array, bits: int) -> Array:
    """Integers (rows, columns) in int32 words (rows, ceil(columns * bits / 32)), as compressed-tensors packs them.

    They are stored as q + 2^(bits - 1), the first of a word in its lowest bits; missing columns are zero bits.

    Args:
        values: int8.
        bits: 8 or 4.
    """
    rows, columns = values.shape
    per_word = 32 // bits
    unsigned = np.zeros((rows, -(-columns // per_word) * per_word), np.uint8)
    unsigned[:, :columns] = values.view(np.uint8) + np.uint8(1 << (bits - 1)) & np.uint8((1 << bits) - 1)
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return unsigned.view("<i4")


def unpack(words: Array, bits: int, columns: int) -> Array:
    """The int8 values (rows, columns) of `pack`."""
    unsigned = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 4:
        unsigned = np.stack([unsigned & 15, unsigned >> 4], -1).reshape(len(words), -1)
    return (unsigned[:, :columns] - np.uint8(1 << (bits - 1))).view(np.int8)


def to_columns(tensor: QuantizedTensor) -> Array:
    """A weight's integers as (in, out), as Keras and Flax keep them.

    int8 (in, out); or of 4 bits, where groups are even, uint8 (in / 2, out): a byte has the value of a row in the first
    half of a group in its low bits, and that of the same row in the second half in its high bits.
    """
    (out, width), groups = tensor.shape, tensor.scale.shape[1]
    if not is_packed(tensor.bits, width // groups):
        return np.ascontiguousarray(tensor.values.T)
    unsigned = (tensor.values + np.int8(8)).view(np.uint8).T.reshape(groups, 2, -1, out)
    return np.ascontiguousarray(unsigned[:, 0] | unsigned[:, 1] << 4).reshape(-1, out)


def from_columns(columns: Array, scale: Array, zero: Array | None, bits: int) -> QuantizedTensor:
    """The weight of `to_columns`, with scales and zero points (groups, out)."""
    if columns.dtype == np.uint8:
        halves = columns.reshape(len(scale), 1, -1, columns.shape[1])
        columns = np.concatenate([halves & 15, halves >> 4], 1).view(np.int8).reshape(-1, columns.shape[1]) - np.int8(8)
    zero = None if zero is None else np.ascontiguousarray(zero.T)
    return QuantizedTensor(np.ascontiguousarray(columns.T), np.ascontiguousarray(scale.T), zero, bits)


def is_packed(bits: int, group: int) -> bool:
    """Whether `to_columns` puts two values of groups of that size into a byte."""
    return bits == 4 and group % 2 == 0
