"""`olmozoo info`, `olmozoo convert` and `olmozoo diff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import DownloadColumn, TransferSpeedColumn

from olmozoo.cli.common import (
    LISTED,
    Adapter,
    AsJson,
    Dtype,
    GroupSize,
    Model,
    Quantization,
    Revision,
    err,
    import_backend,
    in_bytes,
    out,
    printable,
    progress_bar,
    read_config,
    show,
    write,
)
from olmozoo.quantization import GROUP_SIZE

if TYPE_CHECKING:
    from olmozoo.checkpoint.diff import Diff


def info(
    model: Annotated[str, typer.Argument(help="A folder, a repository on the hub, or a preset such as olmo2-7b.")],
    as_json: AsJson = False,
    revision: Revision = None,
) -> None:
    """Show a model's config, its parameters by group and their size, from config.json alone."""
    from olmozoo.checkpoint.tensors import DTYPES

    config, adapter = read_config(model, revision)
    counts = config.count_parameters()
    total, active = sum(counts.values()), config.count_active()
    cache = 2 * config.num_hidden_layers * config.kv_heads * config.head_dim
    sizes = {dtype.name: (total * dtype.itemsize, cache * dtype.itemsize) for dtype in DTYPES.values()}
    if as_json:
        memory = {name: {"weights": weights, "cache_per_token": token} for name, (weights, token) in sizes.items()}
        content = {
            "config": config.to_dict(),
            "adapter": adapter,
            "parameters": {**counts, "total": total, "active": active},
            "memory": memory,
        }
        write(f"{json.dumps(content)}\n")
        return
    fields = [(name, str(value)) for name, value in sorted(config.to_dict().items())]
    show(f"{config.name}: config", ["field", "value"], fields, texts=2)
    if adapter is not None:
        settings = [(name, str(value)) for name, value in sorted(adapter.items()) if value not in (None, False, [], {})]
        show("adapter, merged into the weights on loading", ["setting", "value"], settings, texts=2)
    groups = [(group, f"{count:,}", f"{count / total:.1%}") for group, count in counts.items()]
    groups.append(("total", f"{total:,}", "100.0%"))
    if active < total:
        groups.append(("active for one token", f"{active:,}", f"{active / total:.1%}"))
    show("parameters of the causal language model", ["group", "parameters", "share"], groups)
    rows = [(name, in_bytes(weights), in_bytes(token)) for name, (weights, token) in sizes.items()]
    show("memory", ["dtype", "weights", "cache per token"], rows)


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
    force: Annotated[bool, typer.Option("--force", help="Replace the weights of a target that has some.")] = False,
    revision: Revision = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    group_size: GroupSize = GROUP_SIZE,
) -> None:
    """Write a checkpoint in another framework's format, with its config and tokenizer.

    The files are written to a temporary folder, which is renamed into place when it is complete.
    """
    from olmozoo.checkpoint.convert import convert_checkpoint

    if to in ("keras", "keras-weights", "savedmodel"):
        import_backend("tf")  # whose live model writes them
    with progress_bar(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task(f"reading {source}", total=None)
        convert_checkpoint(
            source,
            target,
            to=to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            force=force,
            progress=lambda done, total: bar.update(task, description="writing", completed=done, total=total),
            revision=revision,
            adapter=adapter,
            quantization=quantization,
            group_size=group_size,
        )
    write(f"{target}\n")


def diff(
    a: Model,
    b: Annotated[str, typer.Argument(help="The folder or repository to compare it with.")],
    every: Annotated[bool, typer.Option("--all", help="List every tensor, also those that are the same.")] = False,
    as_json: AsJson = False,
    revision_a: Annotated[str | None, typer.Option(help="Branch, tag or commit of repository A.")] = None,
    revision_b: Annotated[str | None, typer.Option(help="Branch, tag or commit of repository B.")] = None,
) -> None:
    """Compare the configs and weights of two checkpoints, with no framework. Exit code 1 where something differs."""
    from olmozoo.checkpoint.diff import diff as compare

    with err.status("comparing") as status:
        found = compare(
            a,
            b,
            revision_a=revision_a,
            revision_b=revision_b,
            progress=lambda text: status.update(escape(printable(text))),
        )
    if as_json:
        write(f"{json.dumps(found.to_dict(every), default=str)}\n")
    else:
        show_diff(found, None if every else LISTED)
    if not found.same:
        raise typer.Exit(1)


def show_diff(found: Diff, most: int | None) -> None:
    """Print a `Diff`: the tensors that differ, `most` of them at most, or all tensors where that is None."""
    from olmozoo.verify import tables

    if found.config:
        show(*tables.fields(found))
    listed = found.tensors if most is None else found.differing[:most]
    if listed:
        show(*tables.weights(listed), bad="bold")
    if len(found.differing) > len(listed):
        out.print(f"... and {len(found.differing) - len(listed):,} more that differ: --all lists them")
    count = f"different: {len(found.differing):,} of {len(found.tensors):,} tensors, {len(found.config)} in the config"
    out.print("[green]the same config and the same weights[/]" if found.same else f"[bold red]{count}[/]")
