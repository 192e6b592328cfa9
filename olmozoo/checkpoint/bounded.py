"""Work that a stranger's file may make endless, in a process of its own with a bound on time and memory.

Regular expressions may take years to match, and a damaged HDF5 file may make its library loop, allocate gigabytes or
crash. This file is also the program of that process. It runs apart from the user's environment and imports nothing of
olmozoo, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

SECONDS = 5.0  # of processor time
CLOCK = 60.0  # seconds that may pass: the bound where processor time has none (Windows), and for files that block
MEMORY = 1 << 28  # bytes, besides what Python and its libraries take; bounded on Linux alone
FILE_PART = 64  # and one byte more for so many bytes of a file
NAMES = 1 << 24  # characters of names in an HDF5 file
TEXT = 500  # characters of a message


class BoundError(Exception):
    """The work takes more time or memory than it may, or fails; the text says which."""


def run(task: str, stdin: IO[bytes] | bytes, *arguments: Any, libraries: tuple[str, ...] = (), size: int = 0) -> Any:
    """The result of a task, computed in a process that is ended where it exceeds a bound.

    Args:
        task: a name in `TASKS`.
        stdin: its input: bytes, or an open file.
        *arguments: further ones, as JSON has them.
        libraries: what the task imports; they are taken from where they are here.
        size: bytes of the file that it reads, which increase the bound on memory.

    Raises:
        BoundError: it takes more time or memory than that, or fails.
    """
    specs = [importlib.util.find_spec(library) for library in libraries]
    folders = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
    request = json.dumps([task, SECONDS, MEMORY + size // FILE_PART, folders, arguments])
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    given: dict[str, Any] = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__, request],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **one_thread},
            timeout=CLOCK,
            **given,
        )
    except subprocess.TimeoutExpired as error:
        raise BoundError(f"it takes more than {CLOCK:g} seconds") from error
    except OSError as error:
        raise BoundError(f"the process that reads it cannot be started: {error}") from error
    if hasattr(signal, "SIGPROF") and done.returncode == -signal.SIGPROF:
        raise BoundError(f"it takes more than {SECONDS:g} seconds")
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        raise BoundError(f"the process that reads it ended with {_ending(done.returncode)}") from error
    if "error" in answer:
        raise BoundError(answer["error"])
    return answer["result"]


def _ending(code: int) -> str:
    names = {-number: number.name for number in signal.Signals}
    return names.get(code, f"exit code {code}")


# -- the process ------------------------------------------------------------------------------------------------------


def match_patterns(bound: Callable[[], None]) -> None:
    """Match regular expressions with names, both of them lists in JSON on standard input."""
    bound()
    patterns, names = json.load(sys.stdin)
    for pattern in map(re.compile, patterns):
        for name in names:
            pattern.match(name)
            pattern.fullmatch(name)


def list_hdf5(bound: Callable[[], None], start: int, length: int) -> dict[str, Any]:
    """What an HDF5 file has: the `length` bytes of standard input from `start`.

    Only hard links are followed, so that nothing leads out of the file, and no values are read.

    Returns:
        `datasets`: by path the name of the dtype, the shape and the byte at which the values begin, None where they are
        not plain bytes of this file; or a text where the library cannot say.
        `names`: the attribute `name` of groups `vars`, by path; None where it is no text.
    """
    import h5py

    bound()
    datasets: dict[str, Any] = {}
    names: dict[str, str | None] = {}
    size = 0

    def see(path: str, item: Any) -> None:
        nonlocal size
        if isinstance(item, h5py.Dataset):
            try:
                datasets[path] = [_dtype(item), item.shape, item.id.get_offset()]
            except Exception as error:  # of many kinds
                datasets[path] = str(error)[:TEXT]
        elif path.endswith("/vars"):
            name = item.attrs.get("name")
            names[path] = name if isinstance(name, str) else None
        size += len(path) + len(names.get(path) or "")
        if size > NAMES:
            raise ValueError(f"its names have more than {NAMES:,} characters")

    def _dtype(dataset: Any) -> str:
        dtype = dataset.dtype
        if dtype.str == "|V2" and dataset.attrs.get("dtype") == "bfloat16":  # as Keras writes it
            return "bfloat16"
        if dtype.kind == "f" and not h5py.h5t.py_create(dtype).equal(dataset.id.get_type()):
            return "a floating-point type of its own"  # which the library would convert
        return str(dtype)[:TEXT]

    with h5py.File(_Part(start, length), "r") as file:
        file.visititems(see)
    return {"datasets": datasets, "names": names}


class _Part(io.FileIO):
    """A part of standard input, as a file of its own."""

    def __init__(self, start: int, length: int) -> None:
        super().__init__(0, "r")
        self.start, self.length = start, length

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += self.length
        return super().seek(self.start + offset) - self.start


TASKS: dict[str, Callable[..., Any]] = {"match_patterns": match_patterns, "list_hdf5": list_hdf5}


def _set_bounds(seconds: float, memory: int) -> None:
    """End this process after so much processor time, and let it have so many bytes more than it has."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process; whoever started this one may ignore it
        signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if soft == resource.RLIM_INFINITY or held + memory < soft:
            resource.setrlimit(resource.RLIMIT_AS, (held + memory, hard))
    except (ImportError, OSError, ValueError):
        return  # Windows has no limits, and macOS none on memory


def _main() -> None:
    task, seconds, memory, folders, arguments = json.loads(sys.argv[1])
    sys.path += folders
    answer: dict[str, Any]
    try:
        answer = {"result": TASKS[task](lambda: _set_bounds(seconds, memory), *arguments)}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except Exception as error:  # of many kinds, for what can be wrong inside a file
        answer = {"error": (str(error) or type(error).__name__)[:TEXT]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
