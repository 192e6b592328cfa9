"""`olmozoo evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from olmozoo.cli.common import (
    Adapter,
    AsJson,
    Backend,
    Device,
    Dtype,
    GroupSize,
    Model,
    Quantization,
    Revision,
    import_backend,
    progress_bar,
    show,
    write,
)
from olmozoo.quantization import GROUP_SIZE


def evaluate(
    model: Model,
    file: Annotated[
        str, typer.Argument(help="A .txt, or a .jsonl of texts or of multiple-choice questions; - for standard input.")
    ],
    window: Annotated[int | None, typer.Option(help="Tokens a window; default the model's most, up to 1024.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; default half a window.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that run at once.")] = 4,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Standard input is JSON Lines, and not one text.")] = False,
    as_json: AsJson = False,
    backend: Backend = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    group_size: GroupSize = GROUP_SIZE,
) -> None:
    """Measure perplexity and bits per byte of texts, or accuracy on multiple-choice questions.

    A line of a .jsonl is {"text": ...}, or {"context": ..., "choices": [...], "answer": ...}.
    """
    from olmozoo.evaluation import scoring

    is_input = file == "-"
    entries = scoring.parse(sys.stdin.buffer.read(), "standard input", jsonl) if is_input else scoring.read(file)
    with progress_bar() as bar:
        task = bar.add_task(f"loading {model}", total=None)
        import_backend(backend)
        result = scoring.evaluate(
            model,
            entries,
            backend=backend,
            dtype=dtype,
            device=device,
            window=window,
            stride=stride,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, description="scoring", completed=done, total=total),
            revision=revision,
            adapter=adapter,
            quantization=quantization,
            group_size=group_size,
        )
    if as_json:
        write(f"{json.dumps(result.to_dict())}\n")
        return
    if isinstance(result, scoring.Perplexity):
        rows = [
            ("perplexity", f"{result.perplexity:.4f}"),
            ("bits per byte", f"{result.bits_per_byte:.4f}"),
            ("texts", f"{result.documents:,}"),
            ("tokens scored", f"{result.tokens:,}"),
            ("bytes", f"{result.bytes:,}"),
        ]
    else:
        rows = [
            ("accuracy", f"{result.accuracy:.2%}"),
            ("accuracy, length-normalized", f"{result.accuracy_normalized:.2%}"),
            ("questions", f"{len(result.answers):,}"),
        ]
    show("standard input" if is_input else Path(file).name, ["measure", "value"], rows)
