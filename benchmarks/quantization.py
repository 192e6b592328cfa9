"""Tokens per second and memory of decoding in float32, bfloat16, int8 and int4, in each wing.

    python benchmarks/quantization.py [--model olmo2-190m] [--rounds 3]

Ratios are to float32 in the same wing. In PyTorch the integers are multiplied in bfloat16, for which it has kernels; in
Keras and Flax activations stay in float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from contestants import TITLES, worker
from harness import HERE, arguments, bars, ratio, report, spread, table, take_turns, workers, write_model

NAME = "Quantization"
KINDS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}


def main() -> None:
    """Measure each wing and print a table."""
    parser = arguments(__doc__, NAME, peers=False)
    parser.add_argument("--model", default="olmo2-190m")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()

    from olmozoo.backends import installed

    rounds = options.rounds or (1 if options.tiny else 7 if options.full else 3)
    model, job = options.model, {"batch": 1, "prompt": 16, "new": options.new}
    if options.tiny:
        model, job["new"] = "olmo2-tiny", 4
    rows = []
    speeds: dict[str, Any] = {}
    memories: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        parameters = write_model(model, folder)
        for wing in options.only.split(",") if options.only else installed():
            with workers({kind: worker(wing, options, folder, **settings(wing, kind)) for kind in KINDS}) as running:
                found = take_turns(running, rounds, **job)
            seconds = {kind: [answer["seconds"] for answer in answers] for kind, answers in found.items()}
            memory = {kind: max(answer["memory"] for answer in answers) for kind, answers in found.items()}
            for kind, series in seconds.items():
                name, gigabytes = f"{wing} {kind}", memory[kind] / 1e9
                speeds[name], memories[name] = [job["new"] / taken for taken in series], [gigabytes]
                faster = "" if kind == "float32" else ratio(seconds["float32"], series)
                rows.append([title_of(name), spread(speeds[name]), faster, f"{gigabytes:.2f}"])
    columns = ["", "tokens/s", "beside float32", "peak memory, GB"]
    picture = ""
    if options.write:
        panels = {"decoding, one row": ("tokens/s", speeds), "memory of the process": ("GB", memories)}
        picture = bars(HERE / "plots/quantization.png", panels, {name: title_of(name) for name in speeds})
    text = (
        f"{model} ({parameters / 1e6:.0f} million parameters), from float32 weights: {job['new']} tokens after a "
        f"prompt of {job['prompt']}, one row, {rounds} rounds. Memory is that of the process with its libraries.\n\n"
        f"{picture}\n\n{table(columns, rows)}"
    )
    report(NAME, text, options)


def title_of(name: str) -> str:
    """The title of a wing and a kind."""
    wing, kind = name.split()
    return f"{TITLES[wing]}, {kind}"


def settings(wing: str, kind: str) -> dict[str, Any]:
    """How a wing loads the model."""
    in_bfloat16 = wing == "pt" and "quantization" in KINDS[kind]
    return {**KINDS[kind], **({"dtype": "bfloat16"} if in_bfloat16 else {})}


if __name__ == "__main__":
    main()
