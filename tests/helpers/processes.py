"""Cases that need processes of their own, with several devices or ranks: one start for all cases of a file."""

import os
import pickle
import socket
import subprocess
import sys
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(module: str, folder: Path, environments: list[dict[str, str]], timeout: int) -> list[dict]:
    """Run `python -m module folder` once for each environment, side by side; return the results of each process."""
    processes = []
    for rank, extra in enumerate(environments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **extra}
        with (folder / f"log{rank}").open("w") as log:
            command = [sys.executable, "-m", module, str(folder), str(rank)]
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    try:
        for process in processes:
            process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
    results = []
    for rank in range(len(environments)):
        file = folder / f"results{rank}"
        assert file.exists(), f"process {rank} ended early or hangs:\n{(folder / f'log{rank}').read_text()[-3000:]}"
        results.append(pickle.loads(file.read_bytes()))
    return results


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def run(cases: dict[str, Callable[[], object]], folder: Path, rank: int) -> None:
    """Run the cases of a process, and write what each returns, or the traceback of its error as a text."""
    results = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
    (folder / f"results{rank}").write_bytes(pickle.dumps(results))


class Allocated:
    """The peak of the memory that NumPy and Python allocate in the block. Mapped files and frameworks do not count."""

    def __enter__(self):
        tracemalloc.start()
        return self

    def __exit__(self, *error) -> None:
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


class CountedFile:
    """Counts the bytes of slices that are taken of mapped files, in place of reading them."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __enter__(self):
        import numpy as np

        from olmozoo.checkpoint.tensors import MappedFile

        counted = self

        class Counting(np.ndarray):
            def __getitem__(self, index):
                part = np.asarray(self)[index]
                counted.nbytes += part.nbytes
                return part

            def __array_ufunc__(self, *arguments, **options):
                raise AssertionError("a whole tensor is used")

        self.before = MappedFile.array
        MappedFile.array = lambda file, *arguments: counted.before(file, *arguments).view(Counting)
        return self

    def __exit__(self, *error) -> None:
        from olmozoo.checkpoint.tensors import MappedFile

        MappedFile.array = self.before
