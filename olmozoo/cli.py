"""The `olmozoo` command. No framework, and nothing else that is slow, is imported before a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from olmozoo.errors import OlmozooError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="OLMo, OLMo 2 and OPT in PyTorch, Keras/TensorFlow and JAX/Flax: one checkpoint, one answer.",
)
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A folder, or a repository on the hub such as allenai/OLMo-2-0425-1B.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
Dtype = Annotated[str | None, typer.Option(help="float64, float32, bfloat16 or float16; default the checkpoint's own.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    backend: Annotated[str | None, typer.Option(help="pt, tf or flax; default the first that is installed.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 64,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Continue a prompt, greedily, and print the prompt and its continuation."""
    from olmozoo.pipeline import pipeline

    with err.status(f"loading {model}"):
        write = pipeline("text-generation", model, backend=backend, dtype=dtype, revision=revision)
    with err.status("writing"):
        answer = write(prompt, max_new_tokens=max_new_tokens)
    sys.stdout.write(f"{prompt}{answer}\n")


@app.command()
def info(model: Model, revision: Revision = None) -> None:
    """Show a model's config, its parameters by group and their size, from config.json alone."""
    from olmozoo.checkpoint import DTYPES
    from olmozoo.families.base import ModelConfig

    config = ModelConfig.from_pretrained(model, revision=revision)
    fields = Table("field", "value", title=f"{config.name}: config")
    for name, value in sorted(config.to_dict().items()):
        fields.add_row(name, str(value))
    out.print(fields)

    counts = config.count_parameters()
    total = sum(counts.values())
    groups = Table("group", "parameters", "share", title="parameters of the causal language model")
    for group, count in counts.items():
        groups.add_row(group, f"{count:,}", f"{count / total:.1%}")
    groups.add_section()
    groups.add_row("total", f"{total:,}", "100.0%")
    for column in groups.columns[1:]:
        column.justify = "right"
    out.print(groups)

    sizes = Table("dtype", "weights", "cache per token", title="memory")
    cache = 2 * config.num_hidden_layers * config.kv_heads * config.head_dim
    for dtype in DTYPES.values():
        sizes.add_row(dtype.name, _bytes(total * dtype.itemsize), _bytes(cache * dtype.itemsize))
    for column in sizes.columns[1:]:
        column.justify = "right"
    out.print(sizes)


@app.command()
def verify(
    model: Model,
    backends: Annotated[
        str, typer.Option(help="Two or more of pt, tf, flax; the first is the reference.")
    ] = "pt,tf,flax",
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float64",
    prompt: Annotated[list[str] | None, typer.Option(help="A text of the batch; give it several times.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the divergence by layer into this PNG file.")] = None,
    revision: Revision = None,
) -> None:
    """Run one left-padded batch through the backends and compare every layer. Exit code 1 where a bound is broken."""
    from olmozoo import verify as room

    with err.status("starting") as status:
        report = room.verify(
            model,
            backends=[name.strip() for name in backends.split(",") if name.strip()],
            dtype=dtype,
            prompts=prompt,
            progress=lambda text: status.update(text),
            revision=revision,
        )
        if plot is not None:
            room.plot(report, plot)
    table = Table("layer", title=f"difference from {report.reference} in {report.dtype}; bound {report.bound:g}")
    for backend in report.agreement:
        table.add_column(f"{backend}: largest", justify="right")
        table.add_column("relative", justify="right")
    names = dict.fromkeys(row.name for row in report.rows)
    for name in names:
        cells = [row for row in report.rows if row.name == name]
        style = None if all(row.ok for row in cells) else "bold red"
        table.add_row(name, *(f"{value:.2e}" for row in cells for value in (row.largest, row.relative)), style=style)
    out.print(table)
    for backend, share in report.agreement.items():
        out.print(f"next token: {backend} agrees with {report.reference} at {share:.1%} of positions")
    for name in report.bad_weights:
        out.print(f"[bold red]not finite:[/] {name} holds NaN or infinity")
    out.print("[green]all backends agree[/]" if report.ok else "[bold red]the backends do not agree[/]")
    if not report.ok:
        raise typer.Exit(1)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def main() -> None:
    """Run the command; errors that olmozoo raises on purpose are one message and exit code 2."""
    try:
        app()
    except (OlmozooError, ImportError) as error:
        err.print(f"olmozoo: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
