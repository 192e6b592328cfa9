"""Flax's msgpack: read lazily with every length checked, and written by flax.serialization.

Flax's own reader has the whole file in memory, so the map of arrays is read here and the arrays themselves are mapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from olmozoo.checkpoint.formats.names import canonical, flax_name, gather, missing_library
from olmozoo.checkpoint.tensors import DTYPE_NAMES, LazyTensor, MappedFile
from olmozoo.errors import CheckpointError
from olmozoo.typing import Array

FILE = "flax_model.msgpack"
MAX_ENTRIES = 1_000_000  # far above any model, and little memory


class _Leaf(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class _Unpacker:
    """What flax.serialization packs (https://github.com/msgpack/msgpack/blob/master/spec.md), with no array read.

    Every length is checked against the bytes that are there before anything is made of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = MappedFile(path)
        self.data = self.file.array(np.dtype(np.uint8), (self.file.size,), 0)
        self.position, self.end, self.entries = 0, len(self.data), 0

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem} at byte {self.position} of {len(self.data)}")

    def skip(self, count: int) -> int:
        """Where the next `count` bytes begin."""
        if count > self.end - self.position:
            raise self.fail(f"{count} bytes expected, {self.end - self.position} left: truncated?")
        self.position += count
        return self.position - count

    def take(self, count: int) -> bytes:
        start = self.skip(count)
        return self.data[start : start + count].tobytes()

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "big")

    def size(self, code: int, fixed: range, wide: dict[int, int]) -> int | None:
        """The length in a value's head, if the value is of the kind with these codes."""
        if code in fixed:
            return code - fixed.start
        return self.number(wide[code]) if code in wide else None

    def value(self, depth: int = 0) -> Any:
        self.entries += 1
        if depth > 64 or self.entries > MAX_ENTRIES:
            raise self.fail("nested too deeply, or too many entries")
        code = self.number(1)
        if code < 0x80:
            return code
        if code in (0xC2, 0xC3):
            return code == 0xC3
        if code in (0xCC, 0xCD, 0xCE, 0xCF):
            return self.number(1 << code - 0xCC)
        if (count := self.size(code, range(0x80, 0x90), {0xDE: 2, 0xDF: 4})) is not None:
            return self.mapping(count, depth)
        if (count := self.size(code, range(0xA0, 0xC0), {0xD9: 1, 0xDA: 2, 0xDB: 4})) is not None:
            try:
                return self.take(count).decode()
            except UnicodeDecodeError as error:
                raise self.fail("a text that is not UTF-8") from error
        if (count := self.size(code, range(0), {0xC7: 1, 0xC8: 2, 0xC9: 4})) is not None:
            return self.array(count)
        if code in range(0xD4, 0xD9):
            return self.array(1 << code - 0xD4)
        raise self.fail(f"the type code {code:#x}, which no parameters have")

    def mapping(self, count: int, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in result:
                raise self.fail(f"the key {key!r} is there twice or is no text")
            result[key] = self.value(depth + 1)
        return result

    def array(self, count: int) -> _Leaf:
        """An array of NumPy's: the extension type 1, which holds a triple of shape, dtype and bytes."""
        kind = self.number(1)
        begin, outer = self.skip(count), self.end
        self.position, self.end = begin, begin + count
        if kind != 1 or self.number(1) != 0x93:
            raise self.fail(f"an extension of type {kind} that is no array")
        shape = tuple(self.value() for _ in range(self.number(1) & 0x0F))
        name = self.value()
        dtype = DTYPE_NAMES.get(name) if isinstance(name, str) else None
        length = self.size(self.number(1), range(0), {0xC4: 1, 0xC5: 2, 0xC6: 4})
        if dtype is None or any(type(dimension) is not int for dimension in shape):
            raise self.fail(f"an array of dtype {name!r} and shape {shape}")
        if length is None or length != math.prod(shape) * dtype.itemsize or length == 0:
            raise self.fail(
                f"{length} bytes for {dtype.name} {list(shape)}, expected {math.prod(shape) * dtype.itemsize},"
            )
        offset = self.skip(length)
        if self.position != self.end:
            raise self.fail(f"{self.end - self.position} bytes too many in an array")
        self.end = outer
        return _Leaf(dtype, shape, offset)


def read(path: Path) -> dict[str, LazyTensor]:
    """The arrays of one file, by canonical name.

    Raises:
        CheckpointError: it is broken, or holds anything but one map of parameters.
    """
    unpacker = _Unpacker(path)
    tree = unpacker.value()
    if not isinstance(tree, dict) or unpacker.position != unpacker.end:
        raise unpacker.fail("something other than one map of parameters")
    return gather(path, _tensors(unpacker.file, tree, ""))


def _tensors(file: MappedFile, tree: dict[str, Any], prefix: str) -> Iterator[LazyTensor]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "__msgpack_chunked_array__" not in value:
            yield from _tensors(file, value, f"{name}.")
        elif isinstance(value, _Leaf):
            yield canonical(file.tensor(name, value.dtype, value.shape, value.offset), flax_name(name))
        else:
            yield canonical(_chunked(file, name, value), flax_name(name))


def _chunked(file: MappedFile, name: str, value: Any) -> LazyTensor:
    """An array above 1 GiB, which Flax cuts into flat pieces: {shape: {"0": ...}, chunks: {"0": ...}}."""

    def in_order(key: str, kind: type) -> list[Any]:
        items = value.get(key) if isinstance(value, dict) else None
        if not isinstance(items, dict) or set(items) != {str(i) for i in range(len(items))}:
            raise CheckpointError(f"{file.path}: {name} is no array")
        if not items or any(type(item) is not kind for item in items.values()):
            raise CheckpointError(f"{file.path}: {name} has bad {key}")
        return [items[str(i)] for i in range(len(items))]

    shape, chunks = tuple(in_order("shape", int)), in_order("chunks", _Leaf)
    dtype = chunks[0].dtype
    found, expected = sum(math.prod(chunk.shape) for chunk in chunks), math.prod(shape)
    if any(chunk.dtype != dtype or len(chunk.shape) != 1 for chunk in chunks) or found != expected:
        raise CheckpointError(f"{file.path}: {name} has {found} values, expected {expected} for {list(shape)}")

    def read_chunks() -> Array:
        pieces = [file.array(dtype, chunk.shape, chunk.offset) for chunk in chunks]
        return np.concatenate(pieces).reshape(shape)

    return LazyTensor(name, dtype, shape, read_chunks, file.path)


def write(path: Path, tensors: list[LazyTensor]) -> None:
    """Write the leaves of a Flax tree, named by their paths joined by slashes, into one new file.

    A whole model is nested maps; a shard, as Transformers 4 wrote them, is one flat map.

    Raises:
        CheckpointError: Flax is not installed.
        OSError: the file cannot be written.
    """
    try:
        import msgpack
        from flax.serialization import msgpack_serialize
    except ImportError as error:
        raise missing_library(f"writing {path.name}", "flax", "flax") from error
    packer = msgpack.Packer()

    def pieces(tree: dict[str, Any]) -> Iterator[bytes]:
        yield packer.pack_map_header(len(tree))
        for key, value in tree.items():
            yield packer.pack(key)
            if isinstance(value, LazyTensor):  # one array in memory at a time
                yield msgpack_serialize(value.contiguous())
            else:
                yield from pieces(value)

    with path.open("xb") as stream:
        stream.writelines(pieces(nested(tensors) if path.name == FILE else {t.name: t for t in tensors}))


def nested(tensors: list[LazyTensor]) -> dict[str, Any]:
    """The tree of tensors whose names are paths joined by slashes."""
    tree: dict[str, Any] = {}
    for tensor in tensors:
        *path, last = tensor.name.split("/")
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        node[last] = tensor
    return tree
