"""`olmozoo evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from olmozoo.cli.common import AsJson, Backend, Dtype, Model, Revision, err, out


def evaluate(
    model: Model,
    file: Annotated[Path, typer.Argument(help="A .txt, or a .jsonl of texts or of multiple-choice questions.")],
    backend: Backend = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window; default the model's most, up to 1024.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; default half a window.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that run at once.")] = 4,
    as_json: AsJson = False,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Measure perplexity and bits per byte of texts, or accuracy on multiple-choice questions.

    A line of a .jsonl is {"text": ...}, or {"context": ..., "choices": [...], "answer": ...}.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from olmozoo.evaluation import scoring as room

    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(f"loading {model}", total=None)
        result = room.evaluate(
            model,
            file,
            backend=backend,
            dtype=dtype,
            window=window,
            stride=stride,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, description="scoring", completed=done, total=total),
            revision=revision,
        )
    if as_json:
        sys.stdout.write(f"{json.dumps(result.to_dict())}\n")
        return
    table = Table("measure", "value", title=file.name)
    table.columns[1].justify = "right"
    if isinstance(result, room.Perplexity):
        table.add_row("perplexity", f"{result.perplexity:.4f}")
        table.add_row("bits per byte", f"{result.bits_per_byte:.4f}")
        table.add_row("texts", f"{result.documents:,}")
        table.add_row("tokens scored", f"{result.tokens:,}")
        table.add_row("bytes", f"{result.bytes:,}")
    else:
        table.add_row("accuracy", f"{result.accuracy:.2%}")
        table.add_row("accuracy, length-normalized", f"{result.accuracy_normalized:.2%}")
        table.add_row("questions", f"{len(result.answers):,}")
    out.print(table)
