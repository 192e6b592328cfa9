"""`olmozoo info`, `olmozoo convert` and `olmozoo diff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from olmozoo.cli.common import LISTED, AsJson, Dtype, Model, Revision, _printable, _write, err, out


def info(model: Model, revision: Revision = None) -> None:
    """Show a model's config, its parameters by group and their size, from config.json alone."""
    from olmozoo.checkpoint.tensors import DTYPES
    from olmozoo.families.config import ModelConfig

    config = ModelConfig.from_pretrained(model, revision=revision)
    fields = Table("field", "value", title=f"{config.name}: config")
    for name, value in sorted(config.to_dict().items()):
        fields.add_row(*(escape(_printable(text)) for text in (name, value)))
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


def convert(
    source: Annotated[str, typer.Argument(help="A folder or a repository, with weights in any of the formats.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str,
        typer.Option(help="safetensors, pt-bin, keras, keras-weights, savedmodel, flax-msgpack or orbax."),
    ],
    dtype: Dtype = None,
    max_shard_size: Annotated[
        str, typer.Option(help="The most bytes a file, for safetensors, pt-bin and flax-msgpack.")
    ] = "5GB",
    verify: Annotated[bool, typer.Option(help="Read what was written, and compare every tensor bit for bit.")] = False,
    revision: Revision = None,
) -> None:
    """Write a checkpoint in another framework's format, with its config and tokenizer, tensor by tensor.

    The folder takes its place when it is whole; before that, what was there stays as it was.
    """
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    from olmozoo.checkpoint.convert import convert_checkpoint

    columns = (*Progress.get_default_columns()[:-1], DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(f"reading {source}", total=None)
        convert_checkpoint(
            source,
            target,
            to=to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            progress=lambda done, total: bar.update(task, description="writing", completed=done, total=total),
            revision=revision,
        )
    _write(f"{target}\n")


def diff(
    a: Model,
    b: Annotated[str, typer.Argument(help="The folder or repository to compare it with.")],
    every: Annotated[bool, typer.Option("--all", help="List every tensor, also those that are the same.")] = False,
    as_json: AsJson = False,
    revision_a: Annotated[str | None, typer.Option(help="Branch, tag or commit of repository A.")] = None,
    revision_b: Annotated[str | None, typer.Option(help="Branch, tag or commit of repository B.")] = None,
) -> None:
    """Compare the configs and weights of two checkpoints, with no framework. Exit code 1 where something differs."""
    from olmozoo.checkpoint import diff as room

    with err.status("comparing") as status:
        found = room.diff(
            a,
            b,
            revision_a=revision_a,
            revision_b=revision_b,
            progress=lambda text: status.update(escape(_printable(text))),
        )
    if as_json:
        _write(f"{json.dumps(found.to_dict(every), default=str)}\n")
    else:
        _show_diff(found, found.tensors if every else found.differing[:LISTED])
    if not found.same:
        raise typer.Exit(1)


def _show_diff(found: Any, tensors: list[Any]) -> None:
    """Write a `Diff` as tables, with these of its tensors."""
    if found.config:
        fields = Table("field", "A", "B", title="config")
        for entry in found.config:
            fields.add_row(*(escape(_printable(text)) for text in (entry.name, entry.a, entry.b)))
        out.print(fields)
    if tensors:
        table = Table("tensor", "A", "B", title="weights")
        for column in ("differing", "largest", "relative", "NaN A/B", "inf A/B"):
            table.add_column(column, justify="right")
        for row in tensors:
            numbers = ["", "", "", "", ""]
            if row.a and row.b and row.a.partition(" ")[2] == row.b.partition(" ")[2]:
                share = f"{row.differing / max(row.elements, 1):.1%}"
                numbers = [f"{row.differing:,} ({share})", f"{row.largest:.2e}", f"{row.relative:.2e}"]
                numbers += [f"{row.nan_a:,}/{row.nan_b:,}", f"{row.inf_a:,}/{row.inf_b:,}"]
            sides = [escape(side or "(absent)") for side in (row.a, row.b)]
            table.add_row(escape(_printable(row.name)), *sides, *numbers, style=None if row.same else "bold")
        Console(width=max(out.width, 140) if not out.is_terminal else None).print(table)
    if len(found.differing) > len(tensors):
        out.print(f"... and {len(found.differing) - len(tensors):,} more that differ: --all lists them")
    count = f"different: {len(found.differing):,} of {len(found.tensors):,} tensors, {len(found.config)} in the config"
    out.print("[green]the same config and the same weights[/]" if found.same else f"[bold red]{count}[/]")


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"
