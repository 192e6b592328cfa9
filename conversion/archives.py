"""`torch.save` archives read without PyTorch: tensors as views of the mapped file.

An archive is a zip file of stored (uncompressed) records: `NAME/data.pkl`, a pickle that refers to storages, and one
record `NAME/data/KEY` for each storage (https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.pickles import Record, unpickle
from conversion.tensors import integers, mapped
from olmozoo.checkpoint.files import FileSlice
from olmozoo.checkpoint.tensors import LazyTensor, dtype_of
from olmozoo.errors import CheckpointError

STORAGES = {  # what PyTorch calls the values of a dtype
    "DoubleStorage": dtype_of("float64"),
    "FloatStorage": dtype_of("float32"),
    "HalfStorage": dtype_of("float16"),
    "BFloat16Storage": dtype_of("bfloat16"),
}
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip record: signature, ..., lengths of the name and of extra fields
UTF8 = 0x800  # the flag of a record whose name is in UTF-8


@dataclass(frozen=True)
class Storage:
    """A storage in a file: the kind of its values, how many, and the byte it begins at."""

    kind: str
    size: int
    begin: int
    file: Path
    where: str


def read_archive(file: Path, begin: int = 0, length: int | None = None) -> Any:
    """The object in an archive, with `Record`s for tensors; see `as_tensor`. No tensor is read.

    Args:
        file: the file that contains it.
        begin: the byte at which the archive begins.
        length: its length in bytes; default to the file's end.

    Raises:
        CheckpointError: it is broken, compressed, or not plain data and tensors.
    """
    where = str(file) if length is None else f"{file}, bytes {begin} to {begin + length}"
    with FileSlice(file, begin, length) as window:
        try:
            records = zipfile.ZipFile(window)
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError, EOFError) as error:
            raise CheckpointError(f"{where} is not a whole torch.save archive: {error}") from error
        pickles = [name for name in records.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{where} is not a torch.save archive: it has {len(pickles)} data.pkl, expected 1")
        root = pickles[0].removesuffix("data.pkl")

        def record(name: str) -> tuple[int, int]:
            """The first byte and the length of a record, both within the archive."""
            try:
                entry = records.getinfo(root + name)
            except KeyError:
                raise CheckpointError(f"{where} has no record {root}{name}") from None
            header = b""
            if entry.header_offset >= 0:
                window.seek(entry.header_offset)
                header = window.read(LOCAL_HEADER.size)
            is_header = len(header) == LOCAL_HEADER.size and header.startswith(b"PK\3\4")
            encoding = "utf-8" if entry.flag_bits & UTF8 else "cp437"
            if not is_header or window.read(LOCAL_HEADER.unpack(header)[1]) != entry.orig_filename.encode(encoding):
                raise CheckpointError(f"{where}: the record {root}{name} does not begin where the directory says")
            start = entry.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header)[1:])
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise CheckpointError(f"{where}: the record {root}{name} is compressed, expected it stored")
            if start + entry.file_size > window.length:
                raise CheckpointError(
                    f"{where}: the record {root}{name} ends at byte {start + entry.file_size}, the archive at "
                    f"{window.length}: truncated"
                )
            return start, entry.file_size

        def content(name: str) -> bytes:
            start, size = record(name)
            window.seek(start)
            return window.read(size)

        if f"{root}byteorder" in records.namelist() and content("byteorder") != b"little":
            raise CheckpointError(f"{where} is big-endian, expected little-endian")

        def storage(pid: Any) -> Storage:
            match pid:
                case ("storage", kind, str(key), str(), int(size)) if hasattr(kind, "kind") and 0 <= size < 1 << 62:
                    start, found = record(f"data/{key}")
                    dtype = STORAGES.get(kind.kind)
                    if dtype is not None and size * dtype.itemsize != found:
                        raise CheckpointError(
                            f"storage {key} has {found} bytes, expected {size * dtype.itemsize} for {size} {dtype.name}"
                        )
                    return Storage(kind.kind, size, begin + start, file, where)
            raise CheckpointError(f"it refers to {pid!r}, expected a storage")

        return unpickle(content("data.pkl"), f"{where}: data.pkl", storage)


def as_tensor(value: Any, name: str) -> LazyTensor:
    """The tensor that a `Record` of an archive stands for.

    Raises:
        CheckpointError: it is no dense tensor of floats, or reaches outside its storage.
    """
    kind = value.kind if isinstance(value, Record) else type(value).__name__
    if kind in ("_rebuild_parameter", "_rebuild_parameter_with_state") and value.args:
        return as_tensor(value.args[0], name)
    if kind == "_rebuild_from_type_v2" and len(value.args) == 4 and isinstance(value.args[2], tuple):
        make, _, args, _ = value.args
        return as_tensor(make(*args) if isinstance(make, type) and issubclass(make, Record) else make, name)
    if kind != "_rebuild_tensor_v2" or len(value.args) < 4 or not isinstance(value.args[0], Storage):
        raise CheckpointError(f"{name} is a {kind}, expected a dense tensor")
    storage, offset = value.args[:2]
    shape, strides = integers(_plain(value.args[2])), integers(_plain(value.args[3]))
    start = integers([offset])
    if shape is None or strides is None or start is None or len(shape) != len(strides):
        raise CheckpointError(f"{storage.where}: {name} has a shape, strides or an offset that cannot be")
    if storage.kind not in STORAGES:
        raise CheckpointError(f"{storage.where}: {name} is a {storage.kind}, expected one of {', '.join(STORAGES)}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:
        raise CheckpointError(f"{storage.where}: {name} reaches value {last} of a storage of {storage.size}")
    dtype = STORAGES[storage.kind]
    contiguous = all(
        size == 1 or stride == math.prod(shape[i + 1 :])
        for i, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )
    begin = storage.begin + offset * dtype.itemsize
    return mapped(storage.file, name, dtype, begin, shape, None if contiguous else strides)


def _plain(value: Any) -> Any:
    """A torch.Size as the tuple in it."""
    return value.args[0] if isinstance(value, Record) and value.kind == "Size" and value.args else value
