"""Time and peak memory of converting a checkpoint, beside the time that `cp` takes for the same bytes.

    python benchmarks/conversion.py [--size 6GB] [--dtype bfloat16] [--only safetensors,orbax] [--back]

A checkpoint of that size is made in a temporary folder, with the shapes of OLMo 2 7B and as many blocks as fit, and
removed in the end; the disk needs room for three of them. `--only` names formats of `olmozoo convert` and programs in
`conversion/`, which run without their comparison at the end. With `--back`, the way from each to safetensors is
measured instead. Each conversion runs in a process of its own, right after a `cp`, and everything is flushed to disk
between them. Peak memory is the resident memory of the process, the interpreter and mapped pages of the source
included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import MODELS, arguments, ratio, report, run, spread, table

NAME = "Conversion"
TO_PROGRAMS = {
    "olmo_native": ("--reverse",),
    "olmo_core": ("--reverse",),
    "mha_to_gqa": ("--kv-heads", "8"),
    "gguf_export": (),
}
FROM_PROGRAMS = ("olmo_native", "olmo_core")


def main() -> None:
    """Make the checkpoint, run every conversion and print a table."""
    parser = arguments(__doc__, NAME, peers=False)
    parser.add_argument("--size", help="default 1GB, and 6GB if full")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--back", action="store_true")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--folder", help="where the temporary folder is made; default the system's own")
    parser.add_argument("--make", help=argparse.SUPPRESS)  # of a process of its own, whose memory is not measured
    options = parser.parse_args()
    size = options.size or ("2MB" if options.tiny else "6GB" if options.full else "1GB")
    if options.make:
        make(Path(options.make), size, options.dtype, "olmo2-tiny" if options.tiny else "olmo2-7b")
        return

    from olmozoo.checkpoint.formats import WRITABLE

    rounds = options.rounds or (1 if options.tiny else 3)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, foreign, target = Path(folder, "source"), Path(folder, "foreign"), Path(folder, "target")
        run([sys.executable, __file__, *sys.argv[1:], "--make", str(source)])
        sizes = contents(source)
        idle = run([sys.executable, "-c", "import olmozoo.checkpoint, h5py"])[1]
        names = [*WRITABLE, *(FROM_PROGRAMS if options.back else TO_PROGRAMS)]
        rows = []
        for name in options.only.split(",") if options.only else names:
            forth, back = conversion(name, options.max_shard_size)
            read_from, command = source, forth
            if options.back:
                read_from, command = foreign, back
                run([*forth, str(source), str(foreign)])
                os.sync()
            copies, runs = [], []
            for _ in range(rounds):
                copies.append(run(["cp", "-r", str(read_from), str(target)]))
                clear(target)
                written = target.with_suffix(".gguf") if name == "gguf_export" else target
                runs.append(run([*command, str(read_from), str(written)]))
                clear(written)
            if options.back:
                clear(foreign)
            copied, seconds = ([taken for taken, _ in series] for series in (copies, runs))
            peak = f"{max(peak for _, peak in runs) / 1e6:,.0f}"
            rows.append([name, spread(seconds, ".2f"), spread(copied, ".2f"), ratio(seconds, copied), peak])
    columns = ["from" if options.back else "to", "seconds", "`cp`, seconds", "seconds / `cp`", "peak memory, MB"]
    text = (
        f"{sum(sizes) / 1e9:.2f} GB of {options.dtype}, largest tensor {max(sizes) / 1e6:,.0f} MB; {rounds} rounds. "
        f"The program alone takes {idle / 1e6:,.0f} MB.\n\n{table(columns, rows)}"
    )
    report(NAME, text, options)


def make(folder: Path, size: str, dtype: str, preset: str) -> None:
    """Write a checkpoint of about that size, with the shapes of a preset."""
    from olmozoo import ModelConfig
    from olmozoo.checkpoint.files import parse_size
    from olmozoo.checkpoint.tensors import dtype_of
    from olmozoo.checkpoint.writer import save_checkpoint

    kind = dtype_of(dtype)
    fields = dict(MODELS.get(preset, {"preset": preset}))
    config = ModelConfig.from_preset(fields.pop("preset"), **fields).replace(num_hidden_layers=1)

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


def clear(path: Path) -> None:
    """Wait until all is on disk, then remove a folder or file."""
    os.sync()
    shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
