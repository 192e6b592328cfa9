"""Tensors of foreign checkpoints, whole or in pieces, of which any rows can be read without the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import CheckpointError
from olmozoo.typing import Array


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: where it begins, its shape, and a function that opens it (only then its header is read)."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    open: Callable[[], LazyTensor]


def by_rows(
    name: str, file: Path | str, dtype: np.dtype[Any], shape: tuple[int, ...], rows: Callable[[int, int], Array]
) -> LazyTensor:
    """A tensor that is read by its rows; one without dimensions is its row 0."""
    return LazyTensor(name, dtype, shape, lambda: rows(0, shape[0] if shape else 1), file, rows)


def mapped(
    file: Path, name: str, dtype: np.dtype[Any], begin: int, shape: tuple[int, ...], strides: tuple[int, ...] | None
) -> LazyTensor:
    """A tensor in a file, from byte `begin`; `strides`, in values, where it is not contiguous. The caller checks."""
    width = math.prod(shape[1:])

    def rows(start: int, stop: int) -> Array:
        shape_read = (stop - start, *shape[1:]) if shape else ()
        if 0 in shape_read:
            return np.empty(shape_read, dtype)
        if strides is None:
            offset = begin + start * width * dtype.itemsize
            return np.memmap(file, dtype, "c", offset, shape_read).view(np.ndarray)
        values = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        flat = np.memmap(file, dtype, "c", begin, (values,)).view(np.ndarray)
        return np.lib.stride_tricks.as_strided(flat, shape, [s * dtype.itemsize for s in strides])[start:stop]

    return by_rows(name, file, dtype, shape, rows)


def assembled(
    name: str, file: Path, dtype: np.dtype[Any], shape: tuple[int, ...], pieces: Sequence[Piece]
) -> LazyTensor:
    """A tensor made of pieces; only those that a read touches are opened.

    Raises:
        CheckpointError: the pieces leave a gap, overlap or reach outside.
    """
    where = f"{file}: {name}"
    _check_cover(where, shape, pieces)

    def part(piece: Piece) -> LazyTensor:
        tensor = piece.open()
        if tensor.shape != piece.shape or tensor.dtype != dtype:
            raise CheckpointError(
                f"{where}: the piece in {tensor.file} is {tensor.dtype.name} {list(tensor.shape)}, expected "
                f"{dtype.name} {list(piece.shape)}"
            )
        return tensor

    def rows(start: int, stop: int) -> Array:
        if len(pieces) == 1:
            return part(pieces[0]).rows(start, stop)
        result = np.empty((stop - start, *shape[1:]), dtype)
        for piece in pieces:
            first, last = max(start, piece.offsets[0]), min(stop, piece.offsets[0] + piece.shape[0])
            if first < last and 0 not in piece.shape:
                box = [slice(o, o + n) for o, n in zip(piece.offsets[1:], piece.shape[1:], strict=True)]
                band = part(piece).rows(first - piece.offsets[0], last - piece.offsets[0])
                result[(slice(first - start, last - start), *box)] = band
        return result

    return by_rows(name, file, dtype, shape, rows)


def reshaped(flat: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """A one-dimensional tensor seen in another shape."""
    width = math.prod(shape[1:])

    def rows(start: int, stop: int) -> Array:
        return flat.rows(start * width, stop * width).reshape(stop - start, *shape[1:])

    return by_rows(flat.name, flat.file, flat.dtype, shape, rows)


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
        raise CheckpointError(f"{where}: the pieces have {found} values, expected {expected}")
    filled = [piece for piece in pieces if 0 not in piece.shape]
    begins = np.array([piece.offsets for piece in filled], np.int64).reshape(len(filled), len(shape))
    ends = begins + np.array([piece.shape for piece in filled], np.int64).reshape(begins.shape)
    for i in range(len(filled) - 1):
        if np.any(np.all((begins[i] < ends[i + 1 :]) & (begins[i + 1 :] < ends[i]), axis=1)):
            raise CheckpointError(f"{where}: two pieces overlap at {begins[i].tolist()}")


def stacked(parts: Sequence[LazyTensor]) -> Array:
    """Tensors of one dtype, one under the other: a view where there is only one."""
    if len(parts) == 1:
        return parts[0].read()
    result = np.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    row = 0
    for part in parts:
        result[row : row + part.shape[0]] = part.read()
        row += part.shape[0]
    return result


def integers(values: Any) -> tuple[int, ...] | None:
    """A tuple of integers of at least 0, or None where it is not that."""
    if not isinstance(values, Iterable):
        return None
    numbers = tuple(values)
    return numbers if all(type(v) is int and 0 <= v < 1 << 62 for v in numbers) else None
