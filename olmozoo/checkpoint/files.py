"""File names, index files and sizes of checkpoints."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.tensors import LazyTensor, aligned_empty
from olmozoo.errors import CheckpointError
from olmozoo.families.config import read_json
from olmozoo.typing import Array

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MAX_FILE_NAME = 255  # bytes; the limit of most file systems


def index_entries(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> shard file.

    Raises:
        CheckpointError: it is not an index, or a shard is anything but a plain file name.
    """
    try:
        entries = read_json(index).get("weight_map")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    for name, shard in entries.items():
        if not _is_file_name(shard):
            raise CheckpointError(f"{index} maps {name} to {shard!r}, expected a plain file name")
    return entries


def _is_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name not in ("", ".", "..")
        and not set(name) & set("\\\0")
        and len(name.encode("utf-8", "surrogatepass")) <= MAX_FILE_NAME
    )


def shards(tensors: Iterable[LazyTensor], limit: int) -> list[list[LazyTensor]]:
    """Tensors in groups of at most `limit` bytes, in the order given; a larger tensor is a group of its own."""
    groups: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def parse_size(size: int | str) -> int:
    """Bytes of a number, or of a string such as "5GB", "200MB", "1GiB".

    Raises:
        CheckpointError: it is neither.
    """
    if isinstance(size, int) and size.bit_length() > 64:
        raise CheckpointError(f"max_shard_size is an integer of {size.bit_length()} bits, expected at most 64")
    units = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    units |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([A-Z]*)", str(size).strip().upper())
    if not match or match[2] not in units or float(match[1]) <= 0:
        raise CheckpointError(
            f"max_shard_size is {str(size)[:80]!r}, expected bytes as a number or a string like '5GB'"
        )
    return int(float(match[1]) * units[match[2]])


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object as JSON, keys sorted, into a new file."""
    remove(path)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if there is one; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class FolderHandle:
    """A folder, whatever its path leads to later.

    Raises:
        CheckpointError: there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # The open folder keeps its inode's number from being used again. Windows opens no folders.
            self.descriptor = None if os.name == "nt" else os.open(path, getattr(os, "O_PATH", os.O_RDONLY))
            self.status = os.stat(path) if self.descriptor is None else os.fstat(self.descriptor)
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise CheckpointError(f"{path} is not a readable folder: {error}") from error

    def __del__(self) -> None:
        descriptor: int | None = getattr(self, "descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    def is_current(self) -> bool:
        """Whether the path still leads to this folder."""
        try:
            return os.path.samestat(self.status, os.stat(self.path))
        except OSError:
            return False

    def check(self) -> None:
        """Raise a CheckpointError unless the path still leads to this folder."""
        if not self.is_current():
            raise CheckpointError(f"{self.path} was replaced while it was read: load again")


class FileSlice(io.RawIOBase):
    """A file, or `length` bytes of it from `start`, as a read-only file of its own."""

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        self.stream = path.open("rb", buffering=0)  # without a position of its own beside that of the system
        self.lock = threading.Lock()
        self.start = start
        self.length = os.fstat(self.stream.fileno()).st_size - start if length is None else length
        self.position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if position < 0:
            raise OSError(errno.EINVAL, f"a position of {position}")
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.stream.seek(self.start + self.position)
        view = memoryview(buffer)[: max(0, self.length - self.position)]
        count = self.stream.readinto(view)
        self.position += count
        return count

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Array:
        """The array at byte `offset`, read into memory of its own.

        Raises:
            OSError: the file ends before.
        """
        array = aligned_empty(shape, dtype)
        left = array.reshape(-1).view(np.uint8).data
        with self.lock:
            self.seek(offset)
            while left:
                if not (count := self.readinto(left)):
                    raise OSError(f"{len(left)} bytes at its end are missing")
                left = left[count:]
        return array

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.stream.close()
        super().close()
