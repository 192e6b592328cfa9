"""TensorFlow's bundles, in which a SavedModel has its variables: written and read without it, a tensor at a time.

In `PREFIX.data-00000-of-00001` and so on, values lie one tensor after the other. `PREFIX.index` is a table of LevelDB:
sorted keys, each with a message of `tensor_bundle.proto` that says where its tensor lies. Checksums are CRC-32C.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from olmozoo.checkpoint.files import new_file
from olmozoo.checkpoint.formats.safetensors import MAX_HEADER
from olmozoo.checkpoint.tensors import Output, dtype_of, mapped
from olmozoo.errors import CheckpointError
from olmozoo.typing import Array

CHECKED = 1 << 18  # bytes; few enough to be in the caches still when they are written after their checksum is taken
FOOTER = 48  # bytes
MAGIC = bytes.fromhex("57fb808b247547db")  # the last bytes of a table
NUMBERS = {"float32": 1, "float64": 2, "bfloat16": 14, "float16": 19}  # TensorFlow's, of what weights can be
TEXT = 7
VARINT, WIDE, BYTES, NARROW = 0, 1, 2, 5  # the kinds of fields in a message: 8 bytes are wide, 4 narrow


class Entry(NamedTuple):
    """What an index says of a tensor."""

    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int  # bytes
    checksum: int
    file: int = 0  # the number of the file of values


def checksum_of(data: Any, checksum: int = 0) -> int:
    """CRC-32C of bytes that come after others whose checksum is given."""
    import google_crc32c

    for place in range(0, len(data), CHECKED):
        checksum = google_crc32c.extend(checksum, bytes(data[place : place + CHECKED]))
    return checksum


def masked(checksum: int) -> int:
    """A checksum as files keep it, lest that of bytes with a checksum in them be one that says nothing."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


# -- writing ----------------------------------------------------------------------------------------------------------


def write_values(prefix: Path, outputs: list[Output]) -> dict[str, Entry]:
    """Write tensors into a new file of values, and return by their names what an index says of them."""
    entries = {}
    with new_file(_values(prefix, 0, 1)) as stream:
        for output in outputs:
            start, checksum = stream.tell(), 0
            for piece in output.pieces():
                for place in range(0, len(piece), CHECKED):
                    part = piece[place : place + CHECKED]
                    checksum = checksum_of(part, checksum)
                    stream.write(part)
            number = NUMBERS[output.dtype.name]
            entries[output.name] = Entry(number, output.shape, start, output.nbytes, masked(checksum))
    return entries


def write_index(prefix: Path, entries: dict[str, Entry]) -> None:
    """Write a new index of what `write_values` has written."""
    rows = {b"": _field(1, 1) + _field(3, _field(1, 1))}  # one file of values, in the first version of the format
    for name, entry in entries.items():
        shape = b"".join(_field(2, _field(1, size)) for size in entry.shape)
        row = _field(1, entry.dtype) + _field(2, shape) + _field(4, entry.offset) + _field(5, entry.size)
        rows[name.encode()] = row + bytes([6 << 3 | NARROW]) + struct.pack("<I", entry.checksum)
    with new_file(Path(f"{prefix}.index")) as stream:
        nothing, block = _write_block(stream, {}), _write_block(stream, dict(sorted(rows.items())))
        index = _write_block(stream, {max(rows): block})
        stream.write((nothing + index).ljust(FOOTER - len(MAGIC), b"\0") + MAGIC)


def _values(prefix: Path, number: int, count: int) -> Path:
    return Path(f"{prefix}.data-{number:05}-of-{count:05}")


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a message."""
    if isinstance(value, int):
        return bytes([number << 3 | VARINT]) + _varint(value)
    return bytes([number << 3 | BYTES]) + _varint(len(value)) + value


def _write_block(stream: IO[bytes], rows: dict[bytes, bytes]) -> bytes:
    """Write a block of a table, each key in full, and return where it lies, as tables put it."""
    start, starts, content = stream.tell(), [], b""
    for key, value in rows.items():
        starts.append(len(content))
        content += b"\0" + _varint(len(key)) + _varint(len(value)) + key + value
    starts = starts or [0]
    content += struct.pack(f"<{len(starts) + 1}I", *starts, len(starts))
    kind = b"\0"  # not compressed
    stream.write(content + kind + struct.pack("<I", masked(checksum_of(content + kind))))
    return _varint(start) + _varint(len(content))


def _varint(number: int) -> bytes:
    """A number in as many bytes of seven bits as it takes, the lowest first."""
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


# -- reading ----------------------------------------------------------------------------------------------------------


class Bundle:
    """A bundle to read tensors from.

    Args:
        prefix: what the names of its files begin with.

    Raises:
        CheckpointError: it is broken, or of a kind that is not read: compressed, in slices, or of another byte order.
        OSError: a file is not there.
    """

    def __init__(self, prefix: Path) -> None:
        rows = _read_table(Path(f"{prefix}.index"))
        header = fields(rows.pop(b"", b""))
        count, highest_first = (header.get(number, [0])[0] for number in (1, 2))
        if highest_first:
            raise CheckpointError("its numbers have their highest byte first")
        self.places = {}
        for raw, row in rows.items():
            key = raw.decode(errors="replace")  # slices have names that are no text
            entry = _entry(key, row)
            file = _values(prefix, entry.file, count)
            end, size = entry.offset + entry.size, file.stat().st_size
            if end > size:
                raise CheckpointError(f"{key} ends at byte {end} of {file.name}, which has {size}")
            self.places[key] = (entry, file)

    def _find(self, key: str) -> tuple[Entry, Path]:
        if key not in self.places:
            raise CheckpointError(f"it has no {key}")
        return self.places[key]

    def describe(self, key: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The dtype and shape of a weight."""
        entry, _ = self._find(key)
        names = [name for name, number in NUMBERS.items() if number == entry.dtype]
        if not names:
            raise CheckpointError(
                f"{key} has TensorFlow's dtype {entry.dtype}, expected one of {list(NUMBERS.values())}"
            )
        dtype = dtype_of(names[0])
        if math.prod(entry.shape) * dtype.itemsize != entry.size:
            raise CheckpointError(f"{key} has {entry.size} bytes, which are not {dtype.name} {list(entry.shape)}")
        return dtype, entry.shape

    def read(self, key: str) -> Array:
        """The values of a weight, as a view of the file."""
        entry, file = self._find(key)
        array = mapped(file, *self.describe(key), entry.offset)()
        if masked(checksum_of(array.reshape(-1).view(np.uint8))) != entry.checksum:
            raise CheckpointError(f"{file}: the checksum of {key} is another than its index says")
        return array

    def read_text(self, key: str) -> bytes:
        """A text alone: its length, four bytes of a checksum of that, and it."""
        entry, file = self._find(key)
        if (entry.dtype, entry.shape) != (TEXT, ()) or entry.size > MAX_HEADER:
            raise CheckpointError(f"{key} is no text, or too long")
        with file.open("rb") as stream:
            stream.seek(entry.offset)
            data = stream.read(entry.size)
        length, start = _read_varint(data, 0)
        text = data[start + 4 :]
        checked = struct.pack("<I", length)  # first its length, then that with its checksum and all else
        checked += struct.pack("<I", masked(checksum_of(checked)))
        if len(text) != length or masked(checksum_of(checked + text)) != entry.checksum:
            raise CheckpointError(f"{file}: the checksum of {key} is another than its index says")
        return text


def _entry(key: str, row: bytes) -> Entry:
    found = fields(row)
    if 7 in found:
        raise CheckpointError(f"{key} lies in slices")
    shape = [fields(dimension).get(1, [0])[0] for part in found.get(2, []) for dimension in fields(part).get(2, [])]
    dtype, file, offset, size, checksum = (found.get(number, [0])[0] for number in (1, 3, 4, 5, 6))
    return Entry(dtype, tuple(shape), offset, size, checksum, file)


def _read_table(file: Path) -> dict[bytes, bytes]:
    """The rows of a table."""
    if file.stat().st_size > MAX_HEADER:
        raise CheckpointError(f"{file.name} has {file.stat().st_size} bytes, more than {MAX_HEADER}")
    data = file.read_bytes()
    if len(data) < FOOTER or not data.endswith(MAGIC):
        raise CheckpointError(f"{file.name} is no table, or truncated")
    at = len(data) - FOOTER
    for _ in range(2):  # where a block lies of which nothing is needed
        _, at = _read_varint(data, at)
    rows: dict[bytes, bytes] = {}
    last, total = None, 0
    for _, place in _read_block(data, data[at:]):
        for key, value in _read_block(data, place):
            total += len(key)  # which few bytes can say of many keys
            if (last is not None and key <= last) or total > MAX_HEADER:
                raise CheckpointError(f"{file.name} has its keys not in order, or too many")
            rows[key] = value
            last = key
    return rows


def _read_block(data: bytes, place: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The rows of a block of a table. A key begins as the one before it did, for as many bytes as it says."""
    start, then = _read_varint(place, 0)
    size, _ = _read_varint(place, then)
    content, kind, checksum = data[start : start + size], *struct.unpack_from("<BI", data, start + size)
    if kind != 0 or masked(checksum_of(content + b"\0")) != checksum:
        raise CheckpointError("its index is compressed, or the checksum in it is wrong")
    at, key = 0, b""
    end = size - 4 * (1 + int.from_bytes(content[-4:], "little"))
    while at < end:
        shared, at = _read_varint(content, at)
        own, at = _read_varint(content, at)
        length, at = _read_varint(content, at)
        key = key[:shared] + content[at : at + own]
        yield key, content[at + own : at + own + length]
        at += own + length


def fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a message (protocol buffers) by their numbers: integers, and bytes for all that has a length."""
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        kind = tag & 7
        value: int | bytes
        if kind == VARINT:
            value, at = _read_varint(message, at)
        elif kind in (WIDE, BYTES, NARROW):
            size, at = _read_varint(message, at) if kind == BYTES else (8 if kind == WIDE else 4, at)
            part, at = message[at : at + size], at + size
            value = part if kind == BYTES else int.from_bytes(part, "little")
        if kind not in (VARINT, WIDE, BYTES, NARROW) or at > len(message):
            raise CheckpointError("a message in it is broken")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number that begins there, and where it has ended."""
    number = 0
    for place, byte in enumerate(data[at : at + 10]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, at + place + 1
    raise CheckpointError("a number in it does not end")
