"""Time and memory of loading a checkpoint, and the time from the start of a process to its first token.

    python benchmarks/loading.py [--model olmo2-190m,opt-125m] [--rounds 3] [--idle 0] [--peer-python PYTHON]

Each contestant is started anew in every round. Shown are the time of `from_pretrained` with the imports of its
libraries; that from the start of the process to the first two tokens after a prompt of 16, with what has to be
compiled; and the peak memory of loading for each byte of the weights. PyTorch leaves those in the mapped file; Keras
copies what it transposes, and Flax everything. Where a virtual machine has to get memory from its host, the wait can be
most of the time: `--idle` gives the host so many seconds before each start to take free memory back.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from contestants import PEERS, TITLES, names, worker
from harness import HERE, arguments, bars, ratio, report, spread, table, write_model

NAME = "Loading"


def main() -> None:
    """Measure every model, and print tables."""
    parser = arguments(__doc__, NAME)
    parser.add_argument("--model", default="olmo2-190m,opt-125m", help="names of `harness.MODELS`, with commas")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--idle", type=float, default=0.0)
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.tiny else 7 if options.full else 3)
    parts = [f"Float32; {rounds} rounds."]
    panels: dict[str, Any] = {}
    for model in ["olmo2-tiny"] if options.tiny else options.model.split(","):
        with tempfile.TemporaryDirectory() as made:
            weights = 4 * write_model(model, Path(made))
            found: dict[str, list[dict[str, float]]] = {name: [] for name in names(options, model)}
            for number in range(rounds + 1):
                for name, answers in found.items():
                    time.sleep(options.idle)
                    start = time.perf_counter()
                    made_worker = worker(name, options, Path(made))()
                    try:
                        answer = made_worker.ask(batch=1, prompt=16, new=2)
                    finally:
                        made_worker.close()
                    if number:  # the first round fills the system's cache of files
                        answers.append({**answer, "first": time.perf_counter() - start})
        rows = []
        for name, answers in found.items():
            row = [TITLES[name]]
            for what, title in (("load", "loading"), ("first", "first tokens")):
                series = [answer[what] for answer in answers]
                panels.setdefault(f"{model}, {title}", ("seconds", {}))[1][name] = series
                peer = found.get(PEERS.get(name, ""))
                row += [spread(series, ".2f"), ratio([answer[what] for answer in peer], series) if peer else ""]
            memory = max(answer["loaded_memory"] for answer in answers)
            panels.setdefault(f"{model}, peak memory", ("GB", {}))[1][name] = [memory / 1e9]
            rows.append([*row, f"{memory / 1e9:.2f}", f"{memory / weights:.2f}x"])
        columns = ["", "loading, s", "beside its peer", "first tokens, s", "beside its peer"]
        columns += ["peak memory, GB", "for each byte of weights"]
        parts.append(f"### {model} ({weights / 1e9:.2f} GB of weights)\n\n{table(columns, rows)}")
    if options.write:
        parts.insert(1, bars(HERE / "plots/loading.png", panels, TITLES))
    report(NAME, "\n\n".join(parts), options)


if __name__ == "__main__":
    main()
