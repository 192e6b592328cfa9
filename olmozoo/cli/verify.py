"""`olmozoo verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from olmozoo.cli.checkpoint import _show_diff
from olmozoo.cli.common import LISTED, Model, Revision, _printable, err, out
from olmozoo.errors import InputError


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
        str, typer.Option(help="float64, float32, or bfloat16 and float16, which are held to a band of rounding.")
    ] = "float64",
    prompt: Annotated[list[str] | None, typer.Option(help="A text of the batch; give it several times.")] = None,
    attentions: Annotated[bool, typer.Option("--attentions", help="Compare attention weights too.")] = False,
    logits: Annotated[bool, typer.Option("--logits", help="Show the likeliest next tokens and divergences.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the divergence by layer into this PNG file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the whole report, with plots, into this web page.")] = None,
    revision: Revision = None,
    against_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the second.")] = None,
) -> None:
    """Run one left-padded batch through the backends and compare every layer. Exit code 1 where a bound is broken."""
    from importlib.util import find_spec

    from olmozoo.backends import BACKENDS, installed
    from olmozoo.verify import compare as room

    if (plot or html) and find_spec("matplotlib") is None:
        raise InputError("--plot and --html need matplotlib: pip install 'olmozoo[plot]'")
    default = installed()[:1] if against else list(BACKENDS)
    with err.status("starting") as status:
        report = room.verify(
            model,
            against=against,
            backends=[name.strip() for name in backends.split(",") if name.strip()] if backends else default,
            dtype=dtype,
            prompts=prompt,
            attentions=attentions,
            logits=logits,
            progress=lambda text: status.update(escape(_printable(text))),
            revision=revision,
            against_revision=against_revision,
        )
        if plot is not None:
            room.plot(report, plot)
        if html is not None:
            room.write_html(report, html)
    if report.weights is not None:
        _show_diff(report.weights, report.weights.differing[:LISTED])
    _show_report(report)
    if not report.ok:
        raise typer.Exit(1)


def _show_report(report: Any) -> None:
    """Write a `Report` as tables and a verdict."""
    table = Table("layer", title=f"difference from {report.reference} in {report.dtype}; bound {report.bound:g}")
    for label in report.compared:
        table.add_column(f"{label}: largest", justify="right")
        table.add_column("relative", justify="right")
    for name in dict.fromkeys(row.name for row in report.rows):
        cells = {row.backend: row for row in report.rows if row.name == name}
        style = None if all(row.ok for row in cells.values()) else "bold red"
        pairs = [(cells[la].largest, cells[la].relative) if la in cells else () for la in report.compared]
        texts = [f"{value:.2e}" for pair in pairs for value in pair] if all(pairs) else ["-"] * 2 * len(pairs)
        table.add_row(name, *texts, style=style)
    out.print(table)
    if report.band:
        band = Table("layer", title=f"distance from the float32 answer in {report.dtype}")
        labels = list(dict.fromkeys(entry.backend for entry in report.band))
        for heading in (*labels, "expected of rounding", "bound"):
            band.add_column(heading, justify="right")
        for name in dict.fromkeys(entry.name for entry in report.band):
            entries = [entry for entry in report.band if entry.name == name]
            numbers = [*(entry.distance for entry in entries), entries[0].expected, entries[0].allowed]
            style = None if all(entry.ok for entry in entries) else "bold red"
            band.add_row(name, *(f"{value:.2e}" for value in numbers), style=style)
        out.print(band)
    for entry in report.next_tokens:
        tokens = Table("token", title=escape(f"likeliest after {entry.prompt!r}"))
        for label in entry.probabilities:
            tokens.add_column(label, justify="right")
        for i, token in enumerate(entry.tokens):
            tokens.add_row(escape(repr(token)), *(f"{shares[i]:.6f}" for shares in entry.probabilities.values()))
        out.print(tokens)
    for label, (mean, largest) in report.divergence.items():
        out.print(f"KL divergence of {label} from {report.reference}: mean {mean:.2e}, largest {largest:.2e} nats")
    for label, share in report.agreement.items():
        out.print(f"next token: {label} agrees with {report.reference} at {share:.1%} of positions")
    for name in report.bad_weights:
        out.print(f"[bold red]not finite:[/] {escape(_printable(name))} holds NaN or infinity")
    for note in report.notes:
        out.print(f"[bold red]not alike:[/] {escape(note)}")
    out.print(f"[green]{report.verdict}[/]" if report.ok else f"[bold red]{report.verdict}[/]")
