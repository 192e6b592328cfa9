"""A tensor of a foreign checkpoint, whole or in pieces, of which any band of rows can be read without the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.tensors import TensorInfo
from olmozoo.errors import CheckpointError
from olmozoo.typing import Array


@dataclass(frozen=True)
class Source:
    """A tensor that is not read yet.

    Attributes:
        where: its file, for messages.
        dtype, shape: of the whole.
        rows: gives rows [start, stop) of the first axis: a view of the mapped file wherever they lie in one piece.
    """

    where: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    rows: Callable[[int, int], Array]

    def read(self) -> Array:
        """The whole tensor."""
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1)


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: where it begins, its shape, and how to get at it (its header is read then, and no sooner)."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    open: Callable[[], Source]


def from_info(info: TensorInfo) -> Source:
    """A tensor of a safetensors file."""
    return Source(str(info.file), info.dtype, info.shape, lambda start, stop: info.read()[start:stop])


def mapped(
    file: Path, where: str, dtype: np.dtype[Any], begin: int, shape: tuple[int, ...], strides: tuple[int, ...] | None
) -> Source:
    """A tensor in a file, from byte `begin`; `strides`, in values, where it is not contiguous. The caller checks."""
    width = math.prod(shape[1:])

    def rows(start: int, stop: int) -> Array:
        shape_read = (stop - start, *shape[1:]) if shape else ()
        if 0 in shape_read:
            return np.empty(shape_read, dtype)
        if strides is None:
            offset = begin + start * width * dtype.itemsize
            return np.memmap(file, dtype, "r", offset, shape_read).view(np.ndarray)
        values = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        flat = np.memmap(file, dtype, "r", begin, (values,)).view(np.ndarray)
        return np.lib.stride_tricks.as_strided(flat, shape, [s * dtype.itemsize for s in strides])[start:stop]

    return Source(where, dtype, shape, rows)


def assembled(where: str, dtype: np.dtype[Any], shape: tuple[int, ...], pieces: Sequence[Piece]) -> Source:
    """A tensor made of pieces; only those that a read touches are opened.

    Raises:
        CheckpointError: the pieces leave a gap, overlap or reach outside.
    """
    _check_cover(where, shape, pieces)

    def part(piece: Piece) -> Source:
        source = piece.open()
        if source.shape != piece.shape or source.dtype != dtype:
            raise CheckpointError(
                f"{where}: the piece in {source.where} is {source.dtype.name} {list(source.shape)}, expected "
                f"{dtype.name} {list(piece.shape)}"
            )
        return source

    if len(pieces) == 1:
        return Source(where, dtype, shape, lambda start, stop: part(pieces[0]).rows(start, stop))

    def rows(start: int, stop: int) -> Array:
        result = np.empty((stop - start, *shape[1:]), dtype)
        for piece in pieces:
            first, last = max(start, piece.offsets[0]), min(stop, piece.offsets[0] + piece.shape[0])
            if first < last and 0 not in piece.shape:
                box = [slice(o, o + n) for o, n in zip(piece.offsets[1:], piece.shape[1:], strict=True)]
                band = part(piece).rows(first - piece.offsets[0], last - piece.offsets[0])
                result[(slice(first - start, last - start), *box)] = band
        return result

    return Source(where, dtype, shape, rows)


def reshaped(flat: Source, shape: tuple[int, ...]) -> Source:
    """A one-dimensional tensor seen in another shape."""
    width = math.prod(shape[1:])
    return Source(
        flat.where,
        flat.dtype,
        shape,
        lambda start, stop: flat.rows(start * width, stop * width).reshape(stop - start, *shape[1:]),
    )


def _check_cover(where: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        if len(piece.offsets) != len(shape) or len(piece.shape) != len(shape):
            raise CheckpointError(f"{where}: a piece of shape {list(piece.shape)} in a tensor of {list(shape)}")
        if any(o < 0 or n < 0 or o + n > size for o, n, size in zip(piece.offsets, piece.shape, shape, strict=True)):
            raise CheckpointError(
                f"{where}: the piece of {list(piece.shape)} at {list(piece.offsets)} reaches outside {list(shape)}"
            )
    found, expected = sum(math.prod(piece.shape) for piece in pieces), math.prod(shape)
    if found != expected:
        raise CheckpointError(f"{where}: the pieces hold {found} values, expected {expected}")
    filled = [piece for piece in pieces if 0 not in piece.shape]
    begins = np.array([piece.offsets for piece in filled], np.int64).reshape(len(filled), len(shape))
    ends = begins + np.array([piece.shape for piece in filled], np.int64).reshape(begins.shape)
    for i in range(len(filled) - 1):
        if np.any(np.all((begins[i] < ends[i + 1 :]) & (begins[i + 1 :] < ends[i]), axis=1)):
            raise CheckpointError(f"{where}: two pieces overlap at {begins[i].tolist()}")


def stacked(parts: Sequence[Source]) -> Array:
    """Tensors of one dtype, one under the other: a view where there is one alone."""
    if len(parts) == 1:
        return parts[0].read()
    result = np.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    row = 0
    for part in parts:
        result[row : row + part.shape[0]] = part.read()
        row += part.shape[0]
    return result


def whole_numbers(values: Any) -> tuple[int, ...] | None:
    """A tuple of whole numbers of at least 0, or None where it is not that."""
    if not isinstance(values, Iterable):
        return None
    numbers = tuple(values)
    return numbers if all(type(v) is int and 0 <= v < 1 << 62 for v in numbers) else None
