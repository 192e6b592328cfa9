"""File names, index files and sizes of checkpoints."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from olmozoo.checkpoint.tensors import BAND, Output
from olmozoo.errors import CheckpointError
from olmozoo.families.config import read_json

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WRITE = 1 << 15  # bytes that the system is given at a time of a file that it keeps in memory
PASSING = 1 << 22  # bytes of any other new file that it has in memory before it is asked to let go of them
MAX_FILE_NAME = 255  # bytes; the limit of most file systems
# What holds weights, in the order they are looked for. Those after the first two are read by `formats.py`.
WEIGHTS = (
    *(SAFETENSORS, PICKLED, "tf_model.h5", "flax_model.msgpack"),
    *("model.weights.h5", "model.keras", "saved_model", "orbax"),
)
WEIGHT_FILES = re.compile(
    r"(model|pytorch_model|tf_model|flax_model)(-\d+-of-\d+)?\.(safetensors|bin|h5|msgpack)(\.index\.json)?"
)
EVERY_WEIGHT = re.compile(rf"{WEIGHT_FILES.pattern}|model\.weights\.h5|model\.keras|saved_model|orbax")


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
            raise CheckpointError(f"{index} puts {name} in {shard!r}, expected a plain file name")
    return entries


def _is_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name not in ("", ".", "..")
        and not set(name) & set("\\\0")
        and len(name.encode("utf-8", "surrogatepass")) <= MAX_FILE_NAME
    )


class _NewFile(io.FileIO):
    """A new file that takes as much at a time as is best for the system; see `new_file`."""

    def __init__(self, path: Path, kept: bool) -> None:
        super().__init__(path, "x")
        self.kept = kept
        self.waiting = 0

    def write(self, data: Any) -> int:
        count = super().write(memoryview(data)[: WRITE if self.kept else BAND])
        self.waiting += count
        if self.waiting >= PASSING and not self.kept and hasattr(os, "posix_fadvise"):
            # Does not wait: what is not on disk by then stays in memory until it is asked again.
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.waiting = 0
        return count


def new_file(path: Path, kept: bool = False) -> IO[bytes]:
    """A new file, to write tensors into.

    What is written stays in the system's memory until it has come to disk, and mostly after that. New memory for it can
    cost more than the copying: on a virtual machine a file of gigabytes took twice as long as one that passed through
    the same few megabytes. Whoever reads such a file next reads it from disk.

    Args:
        path: where; its folder is there.
        kept: leave the file in memory, for whoever reads it next. Small parts are then what systems have at hand.

    Raises:
        FileExistsError: there is one: it may be a hard link to that of an older checkpoint.
    """
    return io.BufferedWriter(_NewFile(path, kept), WRITE)


class Behind:
    """A file that writes on while the next bytes are made; what it is given must hold until its next call returns."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[int] | None = None

    def write(self, data: Any) -> int:
        """Begin to write, once what was before is written."""
        self.flush()
        self._writing = self._thread.submit(self._stream.write, data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def tell(self) -> int:
        """The place in the file."""
        self.flush()
        return self._stream.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the file."""
        self.flush()
        return self._stream.seek(offset, whence)

    def close(self) -> None:
        """Write all; the file itself stays open."""
        with self._thread:
            self.flush()


def grouped(outputs: Iterable[Output], limit: int) -> list[list[Output]]:
    """Tensors in groups of at most `limit` bytes, in the order given; a larger one is a group of its own."""
    groups: list[list[Output]] = [[]]
    for output in outputs:
        if groups[-1] and sum(o.nbytes for o in groups[-1]) + output.nbytes > limit:
            groups.append([])
        groups[-1].append(output)
    return groups


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object as JSON, keys sorted, in a new file (never through a link to an old one)."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_size(size: int | str) -> int:
    """Bytes of a number or of a text such as "5GB", "200MB", "1GiB".

    Raises:
        CheckpointError: it is neither.
    """
    units = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    units |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if not match or match[2] not in units or float(match[1]) <= 0:
        raise CheckpointError(f"max_shard_size is {size!r}, expected bytes as a number or as text such as '5GB'")
    return int(float(match[1]) * units[match[2]])


FLAX_WEIGHTS, KERAS_WEIGHTS, KERAS, SAVED_MODEL, ORBAX = WEIGHTS[3:]
VARIABLES = "variables/variables"  # what the names of a SavedModel's files of values begin with
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # the key of what says which is which
