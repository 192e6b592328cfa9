"""What the commands share: options, consoles, printing."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from olmozoo.families.config import ModelConfig

out = Console()
err = Console(stderr=True)
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LISTED = 30  # tensors that `diff` and `verify` list by default

MODEL, SAMPLING, BEAMS, OUTPUT = "Model", "Sampling", "Beam search", "Output"  # the panels of --help
Model = Annotated[str, typer.Argument(help="A folder, or a repository on the hub such as allenai/OLMo-2-0425-1B.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.", rich_help_panel=MODEL)]
Adapter = Annotated[
    str | None,
    typer.Option(help="A folder or a repository with a LoRA adapter to merge into the model.", rich_help_panel=MODEL),
]
Backend = Annotated[
    str | None, typer.Option(help="pt, tf or flax; default the first that is installed.", rich_help_panel=MODEL)
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps ...; default an accelerator if there is one.", rich_help_panel=MODEL),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float64, float32, bfloat16 or float16; default the checkpoint's own.", rich_help_panel=MODEL),
]
Quantization = Annotated[
    str | None,
    typer.Option(help="int8, int4, or none for floats; default as the files have it.", rich_help_panel=MODEL),
]
GroupSize = Annotated[int, typer.Option(help="Values that share a scale in int4.", rich_help_panel=MODEL)]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens to write.", rich_help_panel=OUTPUT)]
MaxAnswerTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        help="The most tokens of an answer; default 512, or as many as the model's positions allow.",
        rich_help_panel=OUTPUT,
    ),
]
Sample = Annotated[
    bool | None,
    typer.Option(help="Draw tokens, or take the likeliest; default the model's own way.", rich_help_panel=SAMPLING),
]
Temperature = Annotated[
    float | None, typer.Option(help="Sample with scores divided by this.", rich_help_panel=SAMPLING)
]
TopK = Annotated[
    int | None,
    typer.Option(help="Sample from so many of the likeliest tokens; 0 for all.", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the fewest tokens that make up this probability.", rich_help_panel=SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Sample from tokens at least so probable beside the likeliest.", rich_help_panel=SAMPLING),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Of sampling; the same gives the same text on every backend.", rich_help_panel=SAMPLING),
]
AllowLong = Annotated[
    bool,
    typer.Option("--allow-long", help="Run past the positions that the model was trained for.", rich_help_panel=OUTPUT),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1, tokens of the text so far become rarer.", rich_help_panel=OUTPUT),
]


def import_backend(name: str | None) -> None:
    """Import a wing without what TensorFlow's native code writes to standard error meanwhile, which no setting stops.

    Raises:
        InputError: there is no such wing.
        MissingBackendError: its framework is not installed.
    """
    from olmozoo.backends import backend_class

    backend = backend_class(name)
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        backend.module()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def write(text: str) -> None:
    """Write to standard output at once; on a terminal, control characters are escaped."""
    sys.stdout.write(printable(text, "\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


def printable(value: Any, kept: str = "") -> str:
    """The text of a value from a file, with what a terminal would obey or cannot show escaped as in Python.

    Those are control characters, except those in `kept`, marks that reverse text, and halves of surrogate pairs.
    """
    return CONTROL.sub(lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1], str(value))


def show(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    ok: Sequence[bool] | None = None,
    texts: int = 1,
    bad: str = "bold red",
) -> None:
    """Print a table; the arguments are the fields of `olmozoo.verify.tables.Table`.

    The first column is never cut, however narrow the terminal is; where there is none, no cell is wrapped either.

    Args:
        bad: the style of rows that are not `ok`.
    """
    table = Table(title=escape(printable(title)))
    for n, heading in enumerate(columns):
        longest = max((cell_len(printable(row[n])) for row in rows), default=0) if n == 0 else None
        table.add_column(escape(printable(heading)), justify="left" if n < texts else "right", min_width=longest)
    for n, row in enumerate(rows):
        table.add_row(*(escape(printable(value)) for value in row), style=None if ok is None or ok[n] else bad)
    needed = Console(width=10_000).measure(table)
    Console(width=max(out.width, needed.minimum if out.is_terminal else needed.maximum)).print(table)


def in_bytes(count: int) -> str:
    """A number of bytes in the unit that fits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A progress bar on standard error; nothing where that is no terminal."""
    kept = (*Progress.get_default_columns()[:-1], *(columns or (MofNCompleteColumn(), TimeRemainingColumn())))
    return Progress(*kept, console=err, transient=True, disable=not err.is_terminal)


def read_config(model: str, revision: str | None) -> tuple[ModelConfig, dict[str, Any] | None]:
    """The config of a folder, of a preset where there is no such folder, or of a repository; and its adapter's."""
    from olmozoo.checkpoint.adapters import locate
    from olmozoo.families.config import ModelConfig, read_json
    from olmozoo.families.registry import presets
    from olmozoo.hub import ADAPTER_CONFIG

    if model in presets() and not Path(model).is_dir():
        return ModelConfig.from_preset(model), None
    folder, adapter = locate(model, need="config", revision=revision)
    settings = None if adapter is None else read_json(adapter / ADAPTER_CONFIG)
    return ModelConfig.from_folder(folder), settings
