"""Time and peak memory of converting a checkpoint, beside the time that `cp` takes for the same bytes.

    python benchmarks/conversion.py [--size 6GB] [--dtype bfloat16] [--to safetensors,orbax] [--back]

A checkpoint of that size is made in a temporary folder, with the shapes of OLMo 2 7B and as many blocks as fit, and
removed in the end; the disk needs room for three of them. `--to` names formats of `olmozoo convert` and programs in
`conversion/`, which run without their comparison at the end. With `--back`, the way from each to safetensors is
measured instead. Each conversion runs in a process of its own, right after a `cp`, and everything is flushed to disk
between them. Shown are the medians, and the range of the rounds' ratios. Peak memory is the resident memory of the
process, the interpreter and mapped pages of the source included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1]
TO_PROGRAMS = {
    "olmo_native": ("--reverse",),
    "olmo_core": ("--reverse",),
    "mha_to_gqa": ("--kv-heads", "8"),
    "gguf_export": (),
}
FROM_PROGRAMS = ("olmo_native", "olmo_core")


def main() -> None:
    """Make the checkpoint, run every conversion and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="6GB")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--to", help="names, with commas; default all")
    parser.add_argument("--back", action="store_true")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the temporary folder is made; default the system's own")
    parser.add_argument("--preset", default="olmo2-7b", help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)  # of a process of its own, whose memory is not measured
    options = parser.parse_args()
    if options.make:
        make(Path(options.make), options.size, options.dtype, options.preset)
        return

    from rich.console import Console
    from rich.table import Table

    from olmozoo.checkpoint.formats import WRITABLE

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, foreign, target = Path(folder, "source"), Path(folder, "foreign"), Path(folder, "target")
        run([sys.executable, __file__, "--size", options.size, "--dtype", options.dtype, "--make", str(source)])
        sizes = contents(source)
        largest, total = max(sizes), sum(sizes)
        title = f"{total / 1e9:.2f} GB of {options.dtype}, largest tensor {largest / 1e6:,.0f} MB"
        table = Table("from" if options.back else "to", "seconds", "cp, seconds", "ratio", "peak, MB", title=title)
        for column in table.columns[1:]:
            column.justify = "right"
        idle = run([sys.executable, "-c", "import olmozoo.checkpoint, h5py"])[1]
        names = [*WRITABLE, *(FROM_PROGRAMS if options.back else TO_PROGRAMS)]
        for name in options.to.split(",") if options.to else names:
            forth, back = conversion(name, options.max_shard_size)
            read_from, command = source, forth
            if options.back:
                read_from, command = foreign, back
                run([*forth, str(source), str(foreign)])
                os.sync()
            copies, runs = [], []
            for _ in range(options.rounds):
                copies.append(run(["cp", "-r", str(read_from), str(target)]))
                clear(target)
                written = target.with_suffix(".gguf") if name == "gguf_export" else target
                runs.append(run([*command, str(read_from), str(written)]))
                clear(written)
            if options.back:
                clear(foreign)
            copied, seconds = ([taken for taken, _ in series] for series in (copies, runs))
            ratios = [own / other for own, other in zip(seconds, copied, strict=True)]
            table.add_row(
                name,
                f"{statistics.median(seconds):.1f}",
                f"{statistics.median(copied):.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                f"{max(peak for _, peak in runs) / 1e6:,.0f}",
            )
        Console().print(table)
        Console().print(f"the program alone takes {idle / 1e6:,.0f} MB")


def make(folder: Path, size: str, dtype: str, preset: str) -> None:
    """Write a checkpoint of about that size, with the shapes of a preset."""
    from olmozoo import Olmo2Config
    from olmozoo.checkpoint.files import parse_size
    from olmozoo.checkpoint.tensors import dtype_of
    from olmozoo.checkpoint.writer import save_checkpoint

    kind = dtype_of(dtype)
    config = Olmo2Config.from_preset(preset, num_hidden_layers=1)

    def weigh(layers: int) -> int:
        return sum(p.size for p in config.replace(num_hidden_layers=layers).parameters("causal_lm")) * kind.itemsize

    layers = max(1, 1 + (parse_size(size) - weigh(1)) // (weigh(2) - weigh(1)))
    config = config.replace(num_hidden_layers=layers)
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(kind)
    save_checkpoint(
        folder,
        config,
        "causal_lm",
        read=lambda parameter: np.resize(noise, parameter.shape),
        dtype=lambda parameter: kind,
    )
    os.sync()


def contents(folder: Path) -> list[int]:
    """The bytes of each tensor in a checkpoint."""
    from olmozoo.checkpoint.reader import Checkpoint

    tensors = Checkpoint(folder).tensors.values()
    return [tensor.nbytes for tensor in tensors]


def conversion(name: str, max_shard_size: str) -> tuple[list[str], list[str]]:
    """The commands to a format and back, without what they read and write."""
    if name in TO_PROGRAMS:
        back = [sys.executable, "-m", f"conversion.{name}", "--no-verify"]
        if name != "gguf_export":  # always one file
            back += ["--max-shard-size", max_shard_size]
        return [*back, *TO_PROGRAMS[name]], back
    command = [sys.executable, "-m", "olmozoo", "convert", "--max-shard-size", max_shard_size, "--to"]
    return [*command, name], [*command, "safetensors"]


def run(command: list[str]) -> tuple[float, int]:
    """Run a command; the seconds it took and its peak memory in bytes."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=HERE)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode()}")
    return seconds, usage.ru_maxrss * 1024


def clear(path: Path) -> None:
    """Wait until all is on disk, then remove a folder or file."""
    os.sync()
    shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
