"""Tensors that are not read yet, their dtypes, and copies in memory that every framework can use as it is."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from olmozoo.errors import CheckpointError, InputError, raise_problems
from olmozoo.quantization import Quantization, QuantizedTensor
from olmozoo.typing import Array

DTYPES: dict[str, np.dtype[Any]] = {  # by the codes of safetensors
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INTEGERS: dict[str, np.dtype[Any]] = {  # of quantized weights, and of what is stored beside them
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
DTYPE_NAMES = {dtype.name: dtype for dtype in DTYPES.values()}
ALIGNMENT = 64  # bytes: a cache line, and what TensorFlow and XLA require of memory that they did not allocate
ROWS = 256  # rows of a matrix that are transposed or copied at a time
PART = 1 << 20  # bytes that are compared at a time


def dtype_of(name: Any) -> np.dtype[Any]:
    """The NumPy dtype of a name such as "bfloat16", of a framework's dtype object, or of a dtype.

    Raises:
        CheckpointError: it is not one of float64, float32, float16, bfloat16.
    """
    text = str(getattr(name, "name", None) or getattr(name, "__name__", None) or name).removeprefix("torch.")
    if text not in DTYPE_NAMES:
        raise CheckpointError(f"dtype is {name!r}, expected one of {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[text]


def widest(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The smallest dtype that represents the values of all of these: float32 for float16 with bfloat16."""
    kinds = set(dtypes)
    largest = max(kinds, key=lambda dtype: dtype.itemsize, default=np.dtype(np.float32))
    return largest if len(kinds) < 2 or largest.itemsize > 2 else np.dtype(np.float32)


@dataclass(frozen=True)
class LazyIntegers:
    """The integers of a quantized weight that are not read, or not made, yet.

    Attributes:
        scheme: how it is quantized.
        scale: the dtype of the scales.
        read: returns them.
    """

    scheme: Quantization
    scale: np.dtype[Any]
    read: Callable[[], QuantizedTensor]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not read yet.

    Attributes:
        name: its name in the checkpoint.
        dtype, shape: of its values.
        read: returns the values, as a view of the mapped file where possible; they need not be contiguous.
        file: where it is stored, for messages.
        read_rows: returns rows [start, stop) without reading the others; None where that is `read()[start:stop]`.
        exact: of a tensor that is computed, returns the values before they are rounded to `dtype`.
        integers: of a quantized weight, its integers; `read` dequantizes them.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array]
    file: Path | str = ""
    read_rows: Callable[[int, int], Array] | None = None
    exact: Callable[[], Array] | None = None
    integers: LazyIntegers | None = None

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the first dimension."""
        return self.read()[start:stop] if self.read_rows is None else self.read_rows(start, stop)

    def exact_values(self) -> Array:
        """The values before they were rounded to `dtype`, where they are computed; else what `read` returns."""
        return self.read() if self.exact is None else self.exact()

    def renamed(self, name: str) -> LazyTensor:
        """The same tensor under another name."""
        return dataclasses.replace(self, name=name)

    def transposed(self) -> LazyTensor:
        """The transpose of a matrix, or of each in a stack of them, as a view."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return LazyTensor(self.name, self.dtype, shape, lambda: self.read().swapaxes(-1, -2), self.file)

    def cast(self, dtype: np.dtype[Any]) -> LazyTensor:
        """The tensor in another dtype; reading it raises a CheckpointError where a value would overflow."""
        if dtype == self.dtype:
            return self

        if self.integers is not None:  # they stay as they are
            integers = self.integers
            return dataclasses.replace(self, dtype=dtype, read=lambda: integers.read().dequantize(dtype))

        def read() -> Array:
            array = self.exact_values()
            with np.errstate(over="ignore"):
                result = array.astype(dtype)
            lost = int(np.isinf(result).sum()) - int(np.isinf(array).sum())
            if lost:
                raise CheckpointError(f"{self.name} has {lost} value(s) too large for {dtype.name}: use a wider dtype")
            return result

        return dataclasses.replace(self, dtype=dtype, read=read, read_rows=None, exact=None)

    def contiguous(self) -> Array:
        """The values in C order: the mapped file itself where it is so.

        Raises:
            CheckpointError: the values have another dtype or shape than the tensor.
        """
        array = np.ascontiguousarray(self.read())
        if (array.dtype, array.shape) != (self.dtype, self.shape):
            found, expected = f"{array.dtype.name} {list(array.shape)}", f"{self.dtype.name} {list(self.shape)}"
            raise CheckpointError(f"{self.name} is {found}, expected {expected}")
        return array


class MappedFile:
    """A file that is opened once, and whose bytes are mapped: a file that later replaces it is never seen.

    Raises:
        CheckpointError: it cannot be opened, or is a pipe or a device, which may never end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a regular file")
        try:
            self.stream = path.open("rb")
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise CheckpointError(f"{path} cannot be opened: {error}") from error
        self.size = os.fstat(self.stream.fileno()).st_size

    def __del__(self) -> None:
        if hasattr(self, "stream"):
            self.stream.close()

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Array:
        """The array at byte `offset`, as a view of the file; the caller has checked that it lies inside."""
        if 0 in shape:
            return np.empty(shape, dtype)
        # A mapping for each tensor, so that its pages are freed with the array; copy-on-write, so that a framework may
        # use the memory in place without ever changing the file.
        array = np.memmap(self.stream, dtype, mode="c", offset=offset, shape=shape).view(np.ndarray)
        return array if array.flags.aligned else array.copy()

    def tensor(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> LazyTensor:
        """The tensor at byte `offset`; see `array`."""
        return LazyTensor(name, dtype, shape, lambda: self.array(dtype, shape, offset), self.path)


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
    """An uninitialized array whose memory is aligned for every framework."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def aligned(array: Array, transposed: bool) -> Array:
    """An array, or its transpose, in memory aligned for every framework: the array itself where it already is."""
    ready = array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0
    return array if ready and not transposed else aligned_copy(array, transposed)


def aligned_copy(array: Array, transposed: bool) -> Array:
    """A copy of an array, or of its transpose, in aligned memory, by blocks of rows on all cores."""
    source = array.T if transposed else array
    result = aligned_empty(source.shape, source.dtype)
    if source.ndim == 0 or source.nbytes <= PART:
        np.copyto(result, source)
        return result
    bits = np.dtype(f"u{source.itemsize}")  # NumPy copies integers several times faster than bfloat16
    source, target = source.view(bits), result.view(bits)

    def copy(start: int) -> None:
        np.copyto(target[start : start + ROWS], source[start : start + ROWS])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(copy, range(0, len(source), ROWS)))
    return result


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays have the same bits, shape and dtype: NaN payloads and the sign of zero count."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    parts = [slice(i, i + PART) for i in range(0, left.size, PART)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of the work is to page the mapped files in
        return all(pool.map(lambda part: np.array_equal(left[part], right[part]), parts))
