"""Tokens per second of greedy decoding in every framework installed, beside Transformers and the machine's limit.

    python benchmarks/decoding.py [--preset opt-125m] [--new 64] [--prompt 16] [--batch 1] [--dtype float32]

Weights are random: speed does not depend on them. Each framework runs in a process of its own, one after another, and
the rounds go round in turn, so that a busy spell of the machine falls on all of them. What is shown is the best round;
decoding one token reads every weight once, so the limit is memory bandwidth over the bytes of the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.util import find_spec

import numpy as np


def main() -> None:
    """Run every framework in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="opt-125m")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="comma-separated: pt, tf, flax, transformers")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of a process of its own
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options)))
        return

    from rich.console import Console
    from rich.table import Table

    from olmozoo import ModelConfig
    from olmozoo.backends import installed
    from olmozoo.checkpoint.writer import save_checkpoint

    config = ModelConfig.from_preset(options.preset)
    names = options.only.split(",") if options.only else installed()
    if not options.only and find_spec("transformers") and "pt" in names:
        names = [*names, "transformers"]
    console = Console()
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(
            folder, config, "causal_lm", read=lambda p: p.initial(0, options.dtype), dtype=lambda p: options.dtype
        )
        for number in range(options.rounds):
            for name in names:
                console.print(f"round {number + 1}: {name}", style="dim")
                command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--only", name]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    bandwidth = best_bandwidth()
    bytes_read = sum(config.count_parameters().values()) * np.dtype(options.dtype).itemsize
    title = f"{options.preset}, {options.dtype}, batch {options.batch}, {options.new} new tokens"
    table = Table("framework", "loading, s", "first call, s", "tokens/s", "of the limit", title=title)
    for name, runs in found.items():
        speed = max(run["speed"] for run in runs)
        share = speed / options.batch / (bandwidth / bytes_read)
        loading, first = (min(run[key] for run in runs) for key in ("loading", "first"))
        table.add_row(name, f"{loading:.1f}", f"{first:.1f}", f"{speed:.1f}", f"{share:.0%}")
    console.print(table)
    console.print(f"memory is read at {bandwidth / 1e9:.1f} GB/s here")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Load the folder in one framework, generate twice, and say how long it took."""
    ids = np.random.default_rng(0).integers(5, 1000, (options.batch, options.prompt))
    settings = {"max_new_tokens": options.new, "min_new_tokens": options.new}
    start = time.perf_counter()
    if options.only == "transformers":
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(options.folder)

        def generate() -> None:
            model.generate(
                torch.from_numpy(ids),
                attention_mask=torch.ones(ids.shape, dtype=torch.long),
                do_sample=False,
                **settings,
            )
    else:
        from olmozoo.backends import load

        backend = load(options.folder, options.only)

        def generate() -> None:
            backend.generate(ids, np.ones_like(ids), **settings)

    times = [time.perf_counter() - start]
    for _ in range(3):
        start = time.perf_counter()
        generate()
        times.append(time.perf_counter() - start)
    return {"loading": times[0], "first": times[1], "speed": options.batch * options.new / min(times[2:])}


def best_bandwidth() -> float:
    """Bytes per second that a sum over an array larger than the caches reads, on all cores, at best."""
    from concurrent.futures import ThreadPoolExecutor
    from os import cpu_count

    array = np.ones(1 << 28, np.uint8).view(np.float32)
    parts = np.array_split(array, cpu_count() or 1)
    best = 0.0
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, array.nbytes / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
