"""How time and memory grow with the prompt, the new tokens, the batch and the layers.

    python benchmarks/growth.py [--model opt-34m] [--peer-python PYTHON]

The last column of each table is the exponent of the last doubling. Theory: time is linear in new tokens, rows and
layers, and between linear and quadratic in the prompt, whose attention is quadratic; memory is linear in all of them. A
curve that is steeper is a defect. Several rows cost less than as many calls: they share the reading of the weights.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from contestants import TITLES, names, worker
from harness import HERE, arguments, curves, report, table, take_turns, workers, write_model

NAME = "Growth"
AXES: dict[str, tuple[str, str, list[int], dict[str, int], float]] = {
    # axis: label, the job's key, values, the rest of the job, the exponent of theory (the least one)
    "prompt": ("tokens in the prompt", "prompt", [512, 1024, 2048, 4096, 8192], {"batch": 1, "new": 2}, 1),
    "new": ("new tokens", "new", [32, 64, 128, 256], {"batch": 1, "prompt": 16}, 1),
    "batch": ("rows", "batch", [1, 2, 4, 8, 16], {"prompt": 16, "new": 32}, 1),
}
LAYERS = [4, 8, 16]
TINY = {"prompt": [8, 16], "new": [2, 4], "batch": [1, 2]}


def main() -> None:
    """Measure each axis, and print tables."""
    parser = arguments(__doc__, NAME)
    parser.add_argument(
        "--model", help="names of `harness.MODELS`, with commas; default opt-34m, and olmo2-43m if full"
    )
    parser.add_argument("--axes", default="prompt,new,batch,layers")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.tiny else 3 if options.full else 1)
    models = options.model or ("opt-34m,olmo2-43m" if options.full else "opt-34m")
    parts = [f"Float32; {rounds} rounds after one that compiles."]
    for model in ["olmo2-tiny"] if options.tiny else models.split(","):
        panels: dict[str, Any] = {}
        text = []
        with tempfile.TemporaryDirectory() as made:
            found = measure(model, Path(made), rounds, options)
        for axis, (label, slope, series) in found.items():
            for what, unit, digits in (("seconds", "seconds", 3), ("memory", "peak memory, GB", 2)):
                if what == "memory" and axis != "prompt":
                    continue
                values = sorted({x for points in series.values() for x in points})
                rows = []
                for name, points in series.items():
                    row = {x: statistics.median(answer[what] for answer in points[x]) for x in points}
                    if what == "memory":
                        row = {x: y / 1e9 for x, y in row.items()}
                    before, last = list(row)[-2:]
                    exponent = math.log(row[last] / row[before]) / math.log(last / before)
                    cells = [f"{row[x]:.{digits}f}" if x in row else "" for x in values]
                    rows.append([TITLES[name], *cells, f"{exponent:.2f}"])
                    title = f"{'time' if what == 'seconds' else 'memory'} by {label}"
                    panels.setdefault(title, (label, unit, {}, slope))[2][name] = (list(row), list(row.values()))
                columns = [f"{unit} by {label}", *(f"{x:,}" for x in values), "exponent"]
                text.append(table(columns, rows))
        picture = curves(HERE / f"plots/growth-{model}.png", panels, TITLES) if options.write else ""
        parts += [f"### {model}", picture, *text]
    report(NAME, "\n\n".join(parts), options)


def measure(model: str, folder: Path, rounds: int, options: Any) -> dict[str, Any]:
    """For each axis its label, its exponent, and the answers by contestant and value."""
    found: dict[str, Any] = {}
    axes = options.axes.split(",")
    chosen = names(options, model)
    write_model(model, folder / "model")
    with workers({name: worker(name, options, folder / "model") for name in chosen}) as running:
        for axis, (label, key, values, rest, slope) in AXES.items():
            if axis not in axes:
                continue
            series: dict[str, Any] = {name: {} for name in chosen}
            for value in TINY[axis] if options.tiny else values:
                for name, answers in take_turns(running, rounds, **rest, **{key: value}).items():
                    series[name][value] = answers
            found[axis] = (label, slope, series)
    if "layers" in axes:
        series = {name: {} for name in chosen}
        for layers in [1, 2] if options.tiny else LAYERS:
            write_model(model, folder / f"{layers}", num_hidden_layers=layers)
            with workers({name: worker(name, options, folder / f"{layers}") for name in chosen}) as running:
                for name, answers in take_turns(running, rounds, batch=1, prompt=16, new=32).items():
                    series[name][layers] = answers
        found["layers"] = ("layers", 1, series)
    return found


if __name__ == "__main__":
    main()
