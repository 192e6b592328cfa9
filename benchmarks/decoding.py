"""Tokens per second of greedy decoding and of reading a prompt, beside Transformers and the machine's limit.

    python benchmarks/decoding.py [--model olmo2-190m,opt-125m] [--rounds 3] [--peer-python PYTHON]

Three jobs: 32 new tokens after a prompt of 16, for one row and for eight; and the first two after a prompt of 512 (one
alone is an error in Transformers 4 for TensorFlow). Decoding a token reads every weight once, so that the limit is
memory bandwidth over the bytes of the weights. Each time is that of a whole call of `generate`.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from contestants import PEERS, TITLES, names, worker
from harness import HERE, arguments, bandwidth, bars, ratio, report, spread, table, take_turns, workers, write_model

NAME = "Decoding"
JOBS = {
    "32 tokens, 1 row": {"batch": 1, "prompt": 16, "new": 32},
    "32 tokens, 8 rows": {"batch": 8, "prompt": 16, "new": 32},
    "prompt of 512": {"batch": 1, "prompt": 512, "new": 2},
}
TINY_JOBS = {"4 tokens, 1 row": {"batch": 1, "prompt": 8, "new": 4}}


def main() -> None:
    """Measure every model, and print tables."""
    parser = arguments(__doc__, NAME)
    parser.add_argument("--model", default="olmo2-190m,opt-125m", help="names of `harness.MODELS`, with commas")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.tiny else 7 if options.full else 3)
    limit = bandwidth()
    parts = [f"Float32; {rounds} rounds. Memory is read at {limit / 1e9:.1f} GB/s."]
    panels: dict[str, Any] = {}
    for model in ["olmo2-tiny"] if options.tiny else options.model.split(","):
        with tempfile.TemporaryDirectory() as made:
            weights = 4 * write_model(model, Path(made))
            chosen = names(options, model)
            with workers({name: worker(name, options, Path(made)) for name in chosen}) as running:
                for title, job in (TINY_JOBS if options.tiny else JOBS).items():
                    found = take_turns(running, rounds, **job)
                    tokens = job["batch"] * (job["new"] if job["new"] > 2 else job["prompt"])
                    ceiling = job["batch"] * limit / weights if job["new"] > 2 else None
                    rows, speeds = rows_of(found, tokens, ceiling)
                    panels[f"{model}, {title}"] = ("tokens/s", speeds)
                    columns = ["", "tokens/s", "of the limit", "beside its peer", "peak memory, GB"]
                    parts.append(
                        f"### {model} ({weights / 4e6:.0f} million parameters), {title}\n\n{table(columns, rows)}"
                    )
    if options.write:
        parts.insert(1, bars(HERE / "plots/decoding.png", panels, TITLES))
    report(NAME, "\n\n".join(parts), options)


def rows_of(
    found: dict[str, Any], tokens: int, ceiling: float | None
) -> tuple[list[list[str]], dict[str, list[float]]]:
    """The rows of a table, and the speeds by contestant."""
    seconds = {name: [answer["seconds"] for answer in answers] for name, answers in found.items()}
    speeds = {name: [tokens / taken for taken in series] for name, series in seconds.items()}
    rows = []
    for name, series in speeds.items():
        peer = PEERS.get(name)
        rows.append(
            [
                TITLES[name],
                spread(series),
                f"{statistics.median(series) / ceiling:.0%}" if ceiling else "",
                ratio(seconds[peer], seconds[name]) if peer in seconds else "",
                f"{max(answer['memory'] for answer in found[name]) / 1e9:.2f}",
            ]
        )
    return rows, speeds


if __name__ == "__main__":
    main()
