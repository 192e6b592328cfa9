"""What a run reports: a line a step, metrics.jsonl, TensorBoard, Weights & Biases, and a plot of the losses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from olmozoo.errors import MissingBackendError
from olmozoo.training.config import TrainConfig
from olmozoo.training.state import step_of_json, trim_lines

METRICS, PLOT = "metrics.jsonl", "loss.png"
INDICES = "data-indices.tsv"
WINDOW = 20  # steps that tokens/s are taken over


class Metrics:
    """The reports of a run.

    Args:
        config: the run's.
        step: the last step that is done; what files have of later ones is removed.
        total: steps in all.
        console: where lines go.
    """

    def __init__(self, config: TrainConfig, step: int, total: int, console: Console) -> None:
        self.folder, self.config, self.total, self.console = Path(config.save_folder), config, total, console
        self.board = _tensorboard(self.folder) if config.tensorboard else None
        self.run = _wandb(config) if config.wandb is not None else None
        self.file, self.indices = self.folder / METRICS, self.folder / INDICES
        if step == 0:
            for file in (self.file, self.indices):
                file.unlink(missing_ok=True)
        trim_lines(self.file, step, step_of_json)
        trim_lines(self.indices, step, lambda line: int(line.split("\t")[0]))
        self.stream = self.file.open("a", encoding="utf-8")
        self.index_stream = self.indices.open("a", encoding="utf-8") if config.save_data_indices else None
        self.times: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], WINDOW + 1)
        self.compiling = True
        columns = (
            *(BarColumn(), MofNCompleteColumn(), "steps ", TimeElapsedColumn(), "elapsed ", TimeRemainingColumn()),
            "left",
        )
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=total, completed=step)
        self.bar.start()

    def step(self, numbers: dict[str, Any], indices: Any, tokens: int) -> None:
        """Report a step.

        Args:
            numbers: what metrics.jsonl has of it.
            indices: of its instances.
            tokens: that it has.
        """
        self.times.append((time.monotonic(), self.times[-1][1] + tokens))
        if len(self.times) == 3 and self.compiling:
            self.times.popleft()  # the first step, in which programs are compiled
            self.compiling = False
        (first, before), (last, after) = self.times[0], self.times[-1]
        numbers = {**numbers, "tokens_per_second": (after - before) / max(last - first, 1e-9)}
        self._write(numbers)
        if self.index_stream:
            self.index_stream.write("\t".join(map(str, (numbers["step"], *indices.tolist()))) + "\n")
            self.index_stream.flush()
        self.bar.update(self.task, completed=numbers["step"])
        if numbers["step"] % self.config.console_log_interval == 0 or numbers["step"] == self.total:
            self.console.print(self._line(numbers), highlight=False, markup=False, soft_wrap=True)

    def evaluation(self, step: int, numbers: dict[str, float]) -> None:
        """Report an evaluation."""
        if numbers:
            self._write({"step": step, **numbers})
            text = "  ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in numbers.items())
            self.console.print(f"evaluation at step {step}: {text}", highlight=False, markup=False, soft_wrap=True)

    def is_evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl has the evaluation of a step."""
        return any(line["step"] == step for line in read(self.file)[1])

    def text(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self, plot: bool) -> None:
        """Close the files, and draw the losses where the disk has room for it."""
        self.bar.stop()
        for stream in (self.stream, self.index_stream):
            if stream:
                with contextlib.suppress(OSError):  # each line was flushed
                    stream.close()
        if self.board is not None:
            self.board.close()
        if self.run is not None:
            self.run.finish()
        if plot:
            with contextlib.suppress(OSError):
                if (self.folder / PLOT).is_symlink():  # nothing is written where it leads to
                    (self.folder / PLOT).unlink()
                draw(self.file, self.folder / PLOT)

    def _write(self, numbers: dict[str, Any]) -> None:
        self.stream.write(json.dumps(numbers) + "\n")
        self.stream.flush()
        step = numbers["step"]
        values = {name: value for name, value in numbers.items() if isinstance(value, float) and name != "step"}
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        if self.run is not None:
            self.run.log(values, step=step)

    def _line(self, numbers: dict[str, Any]) -> str:
        loss = f"loss {numbers['loss_per_target']:.4f}"
        if self.config.loss_divisor == "positions":
            loss += f" (AI2's {numbers['loss']:.4f})"
        width = len(str(self.total))
        parts = [f"step {numbers['step']:>{width}}/{self.total}", loss, f"lr {numbers['lr']:.2e}"]
        parts += [f"norm {numbers['grad_norm']:>7.3f}", f"{numbers['tokens_per_second']:>7,.0f} tokens/s"]
        (first, _), (last, _) = self.times[0], self.times[-1]
        steps = len(self.times) - 1
        left = (self.total - numbers["step"]) * (last - first) / max(steps, 1)
        parts += [f"{_duration(left)} left", *([f"{memory:,} MB"] if (memory := _memory()) else [])]
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _memory() -> int | None:
    """The resident memory of this process in MB; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise MissingBackendError("tensorboard: true needs the tensorboard package: pip install tensorboard") from error
    return Writer(str(folder / "tensorboard"))


def _wandb(config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingBackendError("wandb is set and needs the wandb package: pip install wandb") from error
    assert config.wandb is not None
    settings = {name: value for name, value in dataclasses.asdict(config.wandb).items() if value is not None}
    return wandb.init(**{"name": config.run_name, **settings}, config=config.to_dict(), resume="allow")


def read(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps and the evaluations of a metrics.jsonl."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


def draw(file: Path, picture: Path) -> bool:
    """Draw the losses of a metrics.jsonl; return whether matplotlib is there to do it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps, evaluations = read(file)
    if not steps:
        return False
    numbers, losses = [line["step"] for line in steps], [line["loss_per_target"] for line in steps]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    axes.plot(numbers, losses, color="tab:blue", alpha=0.35 if len(losses) > WINDOW else 1, label="training")
    if len(losses) > WINDOW:
        means = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), "valid")
        middles = numbers[WINDOW // 2 : WINDOW // 2 + len(means)]
        axes.plot(middles, means, color="tab:blue", label=f"training, mean of {WINDOW} steps")
    names = sorted({name for line in evaluations for name in line if name.endswith("/CrossEntropyLoss")})
    for name, color in zip(names, ("tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown"), strict=False):
        points = [(line["step"], line[name]) for line in evaluations if name in line]
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=name.split("/")[1])
    axes.set_ylabel("cross-entropy per token (nats)")
    axes.set_title(f"{file.parent.name}, {numbers[-1]:,} steps", loc="left")
    axes.legend(loc="upper right")
    below.plot(numbers, [line["lr"] for line in steps], color="tab:gray")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for part in (axes, below):
        part.grid(alpha=0.3)
        part.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)
    return True


def perplexity(loss: float) -> float:
    """The exponential of a loss; infinite where that is too large."""
    return math.exp(loss) if loss < 700 else math.inf
