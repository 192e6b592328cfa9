"""`olmozoo verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from olmozoo.cli.checkpoint import show_diff
from olmozoo.cli.common import (
    LISTED,
    Adapter,
    Device,
    GroupSize,
    Model,
    Quantization,
    Revision,
    err,
    import_backend,
    out,
    printable,
    show,
)
from olmozoo.errors import InputError
from olmozoo.quantization import GROUP_SIZE

if TYPE_CHECKING:
    from olmozoo.verify.report import Report


def verify(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="A second folder or repository: A is compared with this B, files and answers.")
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="Of pt, tf, flax, the first is the reference; default all. With --against, the first runs A and the "
            "others B (one alone runs both); default the first that is installed."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float64, float32, or bfloat16 and float16, of which rounding bounds the error.")
    ] = "float64",
    prompt: Annotated[list[str] | None, typer.Option(help="A text of the batch; give it several times.")] = None,
    attentions: Annotated[bool, typer.Option("--attentions", help="Compare attention weights too.")] = False,
    logits: Annotated[bool, typer.Option("--logits", help="Show the likeliest next tokens and divergences.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the divergence by layer into this PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the whole report, with plots, into this web page.")] = None,
    device: Device = None,
    revision: Revision = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    group_size: GroupSize = GROUP_SIZE,
    against_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the second.")] = None,
) -> None:
    """Run one left-padded batch through the backends and compare every layer. Exit code 1 where a bound is broken."""
    from importlib.util import find_spec

    from olmozoo.backends import BACKENDS, installed
    from olmozoo.verify import compare

    if (plot or html) and find_spec("matplotlib") is None:
        raise InputError("--plot and --html need matplotlib: pip install 'olmozoo[plot]'")
    default = installed()[:1] if against else list(BACKENDS)
    names = [name.strip() for name in backends.split(",") if name.strip()] if backends else default
    with err.status("starting") as status:
        if "tf" in names:
            import_backend("tf")
        report = compare.verify(
            model,
            against=against,
            backends=names,
            dtype=dtype,
            prompts=prompt,
            attentions=attentions,
            logits=logits,
            device=device,
            progress=lambda text: status.update(escape(printable(text))),
            revision=revision,
            adapter=adapter,
            quantization=quantization,
            group_size=group_size,
            against_revision=against_revision,
        )
        if plot is not None:
            compare.plot(report, plot)
        if html is not None:
            compare.write_html(report, html)
    if report.weights is not None:
        show_diff(report.weights, LISTED)
    _show_report(report)
    if not report.ok:
        raise typer.Exit(1)


def _show_report(report: Report) -> None:
    """Print a `Report` as tables and a verdict."""
    from olmozoo.verify import tables

    show(*tables.layers(report))
    if report.band:
        show(*tables.rounding(report))
    for entry in report.next_tokens:
        show(*tables.likeliest(entry))
    if report.agreement:
        show(*tables.agreement(report))
    for name in report.bad_weights:
        out.print(f"[bold red]not finite:[/] {escape(printable(name))} holds NaN or infinity")
    for note in report.notes:
        out.print(f"[bold red]not alike:[/] {escape(printable(note))}")
    out.print(f"[green]{report.verdict}[/]" if report.ok else f"[bold red]{report.verdict}[/]")
