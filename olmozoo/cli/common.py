"""What the commands share: options, consoles, printing."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)
Model = Annotated[str, typer.Argument(help="A folder, or a repository on the hub such as allenai/OLMo-2-0425-1B.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
Backend = Annotated[str | None, typer.Option(help="pt, tf or flax; default the first that is installed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens to write.")]
Sample = Annotated[bool | None, typer.Option(help="Draw tokens, or take the likeliest; default the model's own way.")]
Temperature = Annotated[float | None, typer.Option(help="Sample with scores divided by this.")]
TopK = Annotated[int | None, typer.Option(help="Sample from so many of the likeliest tokens; 0 for all.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the fewest tokens that make up this probability.")]
MinP = Annotated[float | None, typer.Option(help="Sample from tokens at least so probable beside the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1, tokens of the text so far become rarer.")]
Seed = Annotated[int | None, typer.Option(help="Of sampling; the same gives the same text on every backend.")]
Dtype = Annotated[str | None, typer.Option(help="float64, float32, bfloat16 or float16; default the checkpoint's own.")]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


LISTED = 30  # tensors that `diff` and `verify` list unless told otherwise


def _printable(value: Any) -> str:
    """The text of a value from a file; half a surrogate pair, which no terminal takes, is spelled out."""
    return str(value).encode("utf-8", "backslashreplace").decode()
