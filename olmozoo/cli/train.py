"""`olmozoo train`."""

from __future__ import annotations

import math
import shlex
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from olmozoo.cli.common import import_backend, out, printable, show, write
from olmozoo.cli.instances import show_instances
from olmozoo.cli.plan import show_plans
from olmozoo.errors import OlmozooError

if TYPE_CHECKING:
    from olmozoo.training.config import TrainConfig
    from olmozoo.training.loop import DryRun, Result
    from olmozoo.typing import Array

EXAMPLES = 3  # of the first batch, in a dry run


def train(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The run; AI2's own configs are read too.")],
    backend: Annotated[
        str | None, typer.Option(help="pt, tf or flax; default that of the config, else the first that is installed.")
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and show what the run would do; nothing is written."),
    ] = False,
) -> None:
    """Train a model from one config, in any framework. The same command resumes a run that was stopped.

    Each field of the config can be set: --optimizer.learning_rate=1e-5 --load_path=MODEL --tensorboard.

    SAVE_FOLDER gets stepN at each checkpoint, metrics.jsonl, loss.png, and the finished model in SAVE_FOLDER/model.

    Exit codes: 0, also where a field such as stop_after ended the run; 2 for an error; 130 after Ctrl-C and 143 after
    SIGTERM, with a checkpoint of the last step.
    """
    from olmozoo.training import load_config, loop

    overrides = [*context.args, *([f"--backend={backend}"] if backend else [])]
    loaded, notes = load_config(config, overrides)
    if notes:
        _say("a config of AI2's trainer; as there:")
        for note in notes:
            _say(f"  {note}")
    if dry:
        _show_dry_run(loaded, loop.dry_run(loaded))
        return
    import_backend(loaded.backend)
    result = loop.train(loaded, out)
    if result.finished and result.rank == 0:
        _show_result(loaded, result)
    elif not result.finished and (number := signal.Signals.__members__.get(result.stopped or "")) is not None:
        raise typer.Exit(128 + number)


def _say(line: str) -> None:
    out.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def _show_result(config: TrainConfig, result: Result) -> None:
    """Print where the model is, and how to try it."""
    from olmozoo.text.tokenizer import Tokenizer

    assert result.folder is not None
    _say(f"the model is in {result.folder}, the losses are in metrics.jsonl and loss.png beside it")
    try:
        tokenizer = Tokenizer.from_pretrained(result.folder)
    except OlmozooError:
        _say("it has no tokenizer: set tokenizer in the config to try the model on text")
        return
    folder = shlex.quote(str(result.folder))
    _say(f"  olmozoo generate {folder} {shlex.quote(config.sample_prompt or 'The')}")
    if tokenizer.chat_templates:
        _say(f"  olmozoo chat {folder}")
    _say(f"  olmozoo evaluate {folder} FILE.txt")


def _show_dry_run(config: TrainConfig, run: DryRun) -> None:
    """Print the resolved config, the size of the run, and its first instances."""
    from olmozoo.training.summary import memory, rates, summary

    write(config.to_yaml())
    show(
        "run",
        ["", ""],
        list(summary(config, run.start.model, run.data, run.plan, run.last, run.trained, config.mesh or {}).items()),
        texts=2,
    )
    found = rates(config, run.data, run.plan, run.last, run.progress)
    show(
        "learning rate",
        ["step", "learning rate"],
        [(f"{step:,}", f"{rate:.3g}") for step, rate in found.items()],
        texts=0,
    )
    devices = math.prod((config.mesh or {}).values())
    title = f"memory of a step on each of {devices} devices" if devices > 1 else "memory of a step"
    show_plans(title, {"": memory(config, run.start.model, run.trained, run.data.files.length)})
    for line in run.start.lines:
        _say(line)
    if run.progress.step >= run.last:
        _say(f"the run is complete at step {run.progress.step}: there is nothing to do")
        return
    show_instances(_first_instances(run), run.tokenizer)
    _say("a dry run: nothing was written")


def _first_instances(run: DryRun) -> list[tuple[Array, Array, int]]:
    """The first instances of the first batch, as `show_instances` takes them."""
    import numpy as np

    from olmozoo.training.data import IGNORED

    batch = run.batch()
    if batch is None:
        return []
    pad = run.start.model.pad_token_id if run.tokenizer is None else run.tokenizer.pad_token_id
    rows = []
    for ids, targets in zip(batch.input_ids[:EXAMPLES], batch.targets[:EXAMPLES], strict=True):
        learned = np.concatenate([[False], targets[:-1] != IGNORED])
        shown = np.flatnonzero((ids != pad) | learned)
        rows.append((ids, learned, int(shown[-1]) + 1 if len(shown) else 0))
    return rows
