"""Time and peak memory of loading a checkpoint in every framework installed, and how they compare with PyTorch.

    python benchmarks/loading.py [--size 3GB] [--dtype float32] [--rounds 5] [--idle 0]

A checkpoint of that size is made in a temporary folder, with the shapes of OLMo 2 1B and as many blocks as fit, and
removed in the end. Each load runs in a process of its own, the frameworks in turn. Shown are the median time of
`from_pretrained` once its class is imported, and that of the process from start to end; both beside PyTorch, round by
round, with the range; and the peak memory of a process, for each byte of the weights. PyTorch leaves those in the
mapped file, and most of its time is imports; Keras copies what it transposes, and Flax everything. Where a
virtual machine has to get that from its host, the wait can be most of their time: `--idle` gives the host so many
seconds before each load to take free memory back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from conversion import HERE, contents, run


def main() -> None:
    """Make the checkpoint, load it in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3GB")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=float, default=0.0)
    parser.add_argument("--folder", help="where the temporary folder is made; default the system's own")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)  # of a process of its own
    options = parser.parse_args()
    if options.load:
        load(*options.load)
        return

    from rich.console import Console
    from rich.table import Table

    from olmozoo.backends import installed

    wings = installed()
    seconds = defaultdict(list)  # (wing, what) -> of each round
    peaks = defaultdict(int)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, said = str(Path(folder, "source")), Path(folder, "said")
        make = [str(HERE / "benchmarks/conversion.py"), "--preset", "olmo2-1b", "--make", source]
        run([sys.executable, *make, "--size", options.size, "--dtype", options.dtype])
        total = sum(contents(Path(source)))
        for _ in range(options.rounds):
            for wing in wings:
                time.sleep(options.idle)
                whole, peak = run([sys.executable, __file__, "--load", source, wing, str(said)])
                seconds[wing, "call"].append(json.loads(said.read_text()))
                seconds[wing, "process"].append(whole)
                peaks[wing] = max(peaks[wing], peak)
    table = Table("", title=f"{total / 1e9:.2f} GB of {options.dtype}, {options.rounds} rounds")
    for name in ("call", "beside pt", "process", "beside pt", "peak"):
        table.add_column(name, justify="right")
    for wing in wings:
        cells = []
        for what in ("call", "process"):
            cells += [f"{statistics.median(seconds[wing, what]):.2f} s", ""]
            if wing != "pt" and "pt" in wings:
                ratios = [own / other for own, other in zip(seconds[wing, what], seconds["pt", what], strict=True)]
                cells[-1] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        table.add_row(wing, *cells, f"{peaks[wing] / total:.2f}x")
    Console().print(table)


def load(folder: str, wing: str, said: str) -> None:
    """Load the checkpoint and write down the seconds that took."""
    from olmozoo.backends import backend_class

    names = vars(backend_class(wing).module())
    cls = next(value for name, value in names.items() if name.endswith("AutoModelForCausalLM"))
    start = time.perf_counter()
    model = cls.from_pretrained(folder)
    Path(said).write_text(json.dumps(time.perf_counter() - start))
    del model


if __name__ == "__main__":
    main()
