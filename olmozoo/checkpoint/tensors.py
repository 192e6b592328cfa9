"""Tensors that are not read yet, their dtypes, and aligned copies."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from olmozoo.errors import CheckpointError, InputError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import ARCHITECTURES, Head, Parameter
from olmozoo.typing import Array

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 64  # bytes: a cache line, and what TensorFlow and XLA ask of memory they did not set aside themselves
BAND = 1 << 20  # bytes that are copied before they are written; fits the caches
TURNED_BAND = 1 << 24  # bytes that are transposed before they are written
TILE = 256  # rows and columns that are transposed at a time
MAX_DIMENSIONS = 64  # the limit of NumPy


def dtype_of(name: Any) -> np.dtype[Any]:
    """The NumPy dtype of a name such as "bfloat16", of a framework's dtype object, or of a dtype.

    Raises:
        CheckpointError: it is not one of float64, float32, float16, bfloat16.
    """
    text = str(getattr(name, "name", None) or getattr(name, "__name__", None) or name).removeprefix("torch.")
    for dtype in DTYPES.values():
        if text == dtype.name:
            return dtype
    raise CheckpointError(f"dtype is {name!r}, expected one of {', '.join(d.name for d in DTYPES.values())}")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, dtype, shape and how to get it (a view of the mapped file)."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array]


def widest(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The smallest dtype that holds the values of all of these: float32 for float16 and bfloat16 together."""
    kinds = set(dtypes)
    largest = max(kinds, key=lambda dtype: dtype.itemsize, default=np.dtype(np.float32))
    return largest if len(kinds) < 2 or largest.itemsize > 2 else np.dtype(np.float32)


def mapped(file: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Callable[[], Array]:
    """What gives the array that lies at byte `offset` of a file, as a view of the file."""

    def read() -> Array:
        if 0 in shape:
            return np.empty(shape, dtype)
        # A mapping of its own for each tensor, so that its pages go when the array goes; copy-on-write, so that a
        # framework may use the memory in place without ever changing the file.
        return np.memmap(file, dtype=dtype, mode="c", offset=offset, shape=shape).view(np.ndarray)

    return read


def check_shapes(headline: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one InputError that lists every name that is missing, unexpected or of a wrong shape, if there is any."""
    problems = [f"missing: {name} {expected[name]}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected: {name} {found[name]}" for name in found.keys() - expected.keys()]
    problems += [
        f"wrong shape: {name} is {found[name]}, expected {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    raise_problems(headline, sorted(problems), InputError)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array whose memory is aligned for any framework, and untouched: it takes none before it is written to."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def aligned(array: Array, transposed: bool) -> Array:
    """An array, or its transpose, in memory aligned for any framework: the array itself where it lies so already."""
    ready = array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0
    return array if ready and not transposed else aligned_copy(array, transposed)


def aligned_copy(array: Array, transposed: bool) -> Array:
    """A copy of an array, or of its transpose, in memory aligned for any framework: one pass, on all cores."""
    result = aligned_empty(array.shape[::-1] if transposed else array.shape, array.dtype)
    if transposed:
        _turn(array, result)
    else:
        _on_all_cores(lambda rows: np.copyto(result[rows], array[rows]), len(array), array.nbytes)
    return result


def _turn(array: Array, result: Array) -> None:
    """Write the transpose of a matrix into `result`.

    It goes by tiles that fit the cache of a core, each copied before it is turned, to rows that do not lie a power of
    two apart: those would push each other out. NumPy turns whole numbers faster than bfloat16.
    """
    bits = np.dtype(f"u{array.itemsize}")
    array, result = array.view(bits), result.view(bits)

    def fill(rows: slice) -> None:
        memory = np.empty((TILE, min(TILE, len(result)) + ALIGNMENT // array.itemsize), bits)
        for column in range(0, len(result), TILE):
            for row in range(rows.start, min(rows.stop, len(array)), TILE):
                part = array[row : row + TILE, column : column + TILE]
                tile = memory[: part.shape[0], : part.shape[1]]
                np.copyto(tile, part)
                result[column : column + TILE, row : row + TILE] = tile.T

    _on_all_cores(fill, len(array), array.nbytes)


def _on_all_cores(work: Callable[[slice], None], rows: int, nbytes: int) -> None:
    """Share rows out, where there are enough bytes for that to pay."""
    threads = os.cpu_count() or 1
    if threads == 1 or nbytes <= 1 << 20:
        work(slice(0, rows))
        return
    share = max(TILE, -(-rows // threads // TILE) * TILE)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, (slice(row, row + share) for row in range(0, rows, share))))


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same bits in the same shape and dtype: NaN, and the sign of zero, count."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    bands = [slice(i, i + BAND) for i in range(0, left.size, BAND)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading mapped pages in is most of the work
        return all(pool.map(lambda band: np.array_equal(left[band], right[band]), bands))


@dataclass(frozen=True)
class Output:
    """A tensor to be written: its name on disk, dtype, shape, and how to get its values when its turn comes."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array]
    transposed: bool = False  # whether `read` gives the transpose of that

    @property
    def nbytes(self) -> int:
        """The size on disk, in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def bands(self, limit: int) -> Iterator[Array]:
        """The values as they go to disk, in bands of rows; each holds until the one after the next is asked for.

        They come through a little memory that stays the same: systems are several times slower in writing from a mapped
        file, and in setting memory aside for each tensor. The next band is made while one is written.

        Args:
            limit: bytes a band, of at least a row.

        Raises:
            CheckpointError: the values are of another dtype or shape.
        """
        array = np.ascontiguousarray(self.read())
        source = array.T if self.transposed else array
        if (array.dtype, source.shape) != (self.dtype, self.shape):
            found, expected = f"{array.dtype.name} {list(source.shape)}", f"{self.dtype.name} {list(self.shape)}"
            raise CheckpointError(f"{self.name} is {found}, expected {expected}")
        most = max(1, limit * len(source) // max(1, self.nbytes))
        count = max(1, -(-len(source) // max(1, -(-len(source) // most))))  # as even as can be
        starts = range(0, len(source), count)
        memories = [np.empty_like(source[start:][:count], order="C") for start in starts[:3]]

        def fill(number: int) -> Array:
            part = source[starts[number] :][:count]
            band = memories[number % 3][: len(part)]
            if self.transposed:
                _turn(part.T, band)
            else:
                np.copyto(band, part)
            return band

        if len(starts) < 2:
            yield from map(fill, range(len(starts)))
            return
        with ThreadPoolExecutor(1) as ahead:
            bands: deque[Future[Array]] = deque()
            for number in range(len(starts)):
                bands.append(ahead.submit(fill, number))
                if number > 0:
                    yield bands.popleft().result()
            for last in bands:
                yield last.result()

    def pieces(self) -> Iterator[memoryview]:
        """The bytes that go to disk, band by band; see `bands`."""
        for band in self.bands(TURNED_BAND if self.transposed else BAND):
            yield band.reshape(-1).view(np.uint8).data

    def write(self, stream: IO[bytes]) -> None:
        """Write the bytes that go to disk into a file; see `pieces`."""
        for piece in self.pieces():
            stream.write(piece)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a writer of a format is given."""

    config: ModelConfig
    head: Head | None
    tensors: dict[Parameter, Output]  # under canonical names
    max_shard_size: int | str

    @property
    def keras_class(self) -> str:
        """The name of the Keras wing's class for this model."""
        return f"TF{self.config.name}{ARCHITECTURES[self.head]}"


def _turned(parameter: Parameter, output: Output, name: str) -> Output:
    """The tensor as Keras and Flax have it, under another name: linear weights are (in, out)."""
    if parameter.kind != "linear":
        return dataclasses.replace(output, name=name)
    return dataclasses.replace(output, name=name, shape=output.shape[::-1], transposed=True)
