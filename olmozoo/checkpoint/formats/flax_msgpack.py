"""Weights in other formats than safetensors and `.bin`, read as canonical tensors, lazily and one at a time.

What Transformers 4 wrote for its TensorFlow and Flax classes (`tf_model.h5`, `flax_model.msgpack`), and what the wings'
own frameworks write: Keras weights, a SavedModel, Flax msgpack, Orbax. Every reader gives canonical names, and linear
weights as (out, in). None of them runs anything of a file: no Keras, TensorFlow or pickle loader is called, a `.keras`
is opened for its arrays alone. Where the bytes of a tensor lie plainly in the file they are mapped, as in
`checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from olmozoo.checkpoint.files import FLAX_WEIGHTS, new_file
from olmozoo.checkpoint.formats.names import _flax_name, _gather, _nbytes, _tensor
from olmozoo.checkpoint.tensors import DTYPE_CODES, Output, TensorInfo, _Job, _turned, mapped
from olmozoo.checkpoint.writer import write_weights
from olmozoo.errors import CheckpointError
from olmozoo.families.parameter import Kind
from olmozoo.typing import Array

MAX_ENTRIES = 1_000_000  # of a msgpack file: far above any model, and little memory


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
        self.data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
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
        dtype = next((dtype for dtype in DTYPE_CODES if dtype.name == name), None)
        length = self.size(self.number(1), range(0), {0xC4: 1, 0xC5: 2, 0xC6: 4})
        if dtype is None or any(type(dimension) is not int for dimension in shape):
            raise self.fail(f"an array of dtype {name!r} and shape {shape}")
        if length is None or length != _nbytes(dtype, shape) or length == 0:
            raise self.fail(f"{length} bytes for {dtype.name} {list(shape)}, expected {_nbytes(dtype, shape)},")
        offset = self.skip(length)
        if self.position != self.end:
            raise self.fail(f"{self.end - self.position} bytes too many in an array")
        self.end = outer
        return _Leaf(dtype, shape, offset)


def _read_msgpack(path: Path) -> dict[str, TensorInfo]:
    unpacker = _Unpacker(path)
    tree = unpacker.value()
    if not isinstance(tree, dict) or unpacker.position != unpacker.end:
        raise unpacker.fail("something other than one map of parameters")
    return _gather(path, _leaves(path, tree, ""))


def _leaves(path: Path, tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, TensorInfo]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "__msgpack_chunked_array__" not in value:
            yield from _leaves(path, value, f"{name}.")
            continue
        canonical, transposed = _flax_name(name)
        if isinstance(value, _Leaf):
            dtype, shape = value.dtype, value.shape
            read = mapped(path, dtype, shape, value.offset)
        else:
            dtype, shape, read = _chunked(path, name, value)
        yield canonical, _tensor(path, dtype, shape, read, transposed and len(shape) == 2)


def _chunked(path: Path, name: str, value: Any) -> tuple[np.dtype[Any], tuple[int, ...], Callable[[], Array]]:
    """An array above 1 GiB, which Flax cuts into flat pieces: {shape: {"0": ...}, chunks: {"0": ...}}."""

    def in_order(key: str, kind: type) -> list[Any]:
        items = value.get(key) if isinstance(value, dict) else None
        if not isinstance(items, dict) or set(items) != {str(i) for i in range(len(items))}:
            raise CheckpointError(f"{path}: {name} is no array")
        if not items or any(type(item) is not kind for item in items.values()):
            raise CheckpointError(f"{path}: {name} has bad {key}")
        return [items[str(i)] for i in range(len(items))]

    shape, chunks = tuple(in_order("shape", int)), in_order("chunks", _Leaf)
    dtype = chunks[0].dtype
    found = sum(_nbytes(dtype, chunk.shape) for chunk in chunks)
    if any(chunk.dtype != dtype or len(chunk.shape) != 1 for chunk in chunks) or found != _nbytes(dtype, shape):
        raise CheckpointError(f"{path}: {name} has {found} bytes, expected {_nbytes(dtype, shape)} for {list(shape)}")

    def read() -> Array:
        pieces = [mapped(path, dtype, chunk.shape, chunk.offset)() for chunk in chunks]
        return np.concatenate(pieces).reshape(shape)

    return dtype, shape, read


FLAX_LEAVES: dict[Kind, str] = {"linear": "kernel", "embedding": "embedding", "norm": "scale", "bias": "bias"}
FLAX_CHUNK = 1 << 30  # bytes; flax.serialization cuts larger arrays, since msgpack counts bytes in 32 bits


def _flax_tensors(job: _Job) -> list[Output]:
    """The tensors under their paths in a Flax wing's tree, joined by slashes."""
    return [
        _turned(p, output, "/".join([*output.name.split(".")[:-1], FLAX_LEAVES[p.kind]]))
        for p, output in job.tensors.items()
    ]


def _to_msgpack(job: _Job, staging: Path) -> None:
    write_weights(staging, _flax_tensors(job), job.max_shard_size, FLAX_WEIGHTS, write_msgpack)


def write_msgpack(file: Path, outputs: list[Output]) -> None:
    """Write arrays into a new file as flax.serialization does, one in memory at a time.

    A single file holds nested maps; a shard, as Transformers 4 made them, one flat map.
    """
    tree = {output.name: output for output in outputs}
    with new_file(file) as stream:
        _pack(stream, _nested(outputs, lambda output: output) if file.name == FLAX_WEIGHTS else tree)


def _nested(outputs: list[Output], leaf: Callable[[Output], Any]) -> dict[str, Any]:
    """A tree of maps by the steps of the tensors' names, with something at each leaf."""
    tree: dict[str, Any] = {}
    for output in outputs:
        *path, last = output.name.split("/")
        place = tree
        for step in path:
            place = place.setdefault(step, {})
        place[last] = leaf(output)
    return tree


def _pack(stream: IO[bytes], value: Any) -> None:
    if isinstance(value, Output):
        _pack_output(stream, value)
    elif isinstance(value, dict):
        stream.write(_head(len(value), 0x80, 16, {0xDE: 2, 0xDF: 4}))
        for key, item in value.items():
            _pack(stream, key)
            _pack(stream, item)
    elif value is True:
        stream.write(b"\xc3")
    elif isinstance(value, int):
        stream.write(_head(value, 0, 128, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}))
    else:
        stream.write(_text(value))


def _head(size: int, fixed: int, below: int, wide: dict[int, int]) -> bytes:
    """The first bytes of a value of msgpack: its kind with a small size, or its kind and then the size."""
    if size < below:
        return bytes([fixed + size])
    code, width = next((code, width) for code, width in wide.items() if size < 1 << 8 * width)
    return bytes([code]) + size.to_bytes(width, "big")


def _text(text: str) -> bytes:
    data = text.encode()
    return _head(len(data), 0xA0, 32, {0xD9: 1, 0xDA: 2, 0xDB: 4}) + data


def _pack_output(stream: IO[bytes], output: Output) -> None:
    left, chunks = output.nbytes, 0
    if left <= FLAX_CHUNK:
        _pack_head(stream, output.shape, output.dtype, left)
        output.write(stream)
        return
    stream.write(_head(3, 0x80, 16, {}))
    _pack(stream, "__msgpack_chunked_array__")
    _pack(stream, True)
    _pack(stream, "shape")
    _pack(stream, {str(axis): size for axis, size in enumerate(output.shape)})
    _pack(stream, "chunks")
    stream.write(_head(-(-left // FLAX_CHUNK), 0x80, 16, {0xDE: 2}))
    room = 0
    for piece in output.pieces():
        while len(piece):
            if room == 0:
                room = min(left, FLAX_CHUNK)
                _pack(stream, str(chunks))
                _pack_head(stream, (room // output.dtype.itemsize,), output.dtype, room)
                chunks += 1
            written, piece = piece[:room], piece[room:]
            stream.write(written)
            room, left = room - len(written), left - len(written)


def _pack_head(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], nbytes: int) -> None:
    """All of an array but its bytes: an extension of type 1, with shape and dtype."""
    content = bytes([0x93, 0x90 + len(shape)])
    content += b"".join(_head(size, 0, 128, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}) for size in shape) + _text(dtype.name)
    content += _head(nbytes, 0, 0, {0xC4: 1, 0xC5: 2, 0xC6: 4})
    stream.write(_head(len(content) + nbytes, 0, 0, {0xC7: 1, 0xC8: 2, 0xC9: 4}) + b"\x01" + content)
