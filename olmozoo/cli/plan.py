"""`olmozoo plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from olmozoo.cli.common import AsJson, Revision, in_bytes, read_config, show, write
from olmozoo.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from olmozoo.memory import Plan

MESH, STEP = "Mesh", "Step"  # panels of --help


def plan(
    model: Annotated[str, typer.Argument(help="A preset such as olmo2-7b, a folder, or a repository on the hub.")],
    fsdp: Annotated[
        int, typer.Option(help="Devices that parameters and batch are split over.", rich_help_panel=MESH)
    ] = 1,
    tensor: Annotated[int, typer.Option(help="Devices that heads and MLP are split over.", rich_help_panel=MESH)] = 1,
    experts: Annotated[int, typer.Option(help="Devices that experts are split over.", rich_help_panel=MESH)] = 1,
    batch: Annotated[int, typer.Option(help="Rows on each device.", rich_help_panel=STEP)] = 1,
    length: Annotated[
        int | None, typer.Option(help="Tokens a row; default all positions.", rich_help_panel=STEP)
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="A training step; default generation.")] = False,
    optimizer: Annotated[str, typer.Option(help="adamw, lionw or sgd.", rich_help_panel=STEP)] = "adamw",
    dtype: Annotated[
        str | None, typer.Option(help="What is computed in; default the config's own.", rich_help_panel=STEP)
    ] = None,
    param_dtype: Annotated[
        str | None, typer.Option(help="Of parameters and optimizer; default --dtype.", rich_help_panel=STEP)
    ] = None,
    backend: Annotated[str, typer.Option(help="pt or flax.", rich_help_panel=MESH)] = "pt",
    memory: Annotated[str | None, typer.Option(help="Of a device, such as 80GB: shows what fits.")] = None,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw memory by kind for each mesh of so many devices.")] = None,
    revision: Revision = None,
) -> None:
    """Show the memory of each device, from config.json alone, for generation or a training step."""
    from olmozoo import memory as planning
    from olmozoo.checkpoint.files import parse_size

    config, _ = read_config(model, revision)
    devices = fsdp * tensor * experts
    given = config.extra.get("dtype") or config.extra.get("torch_dtype")
    settings: dict[str, Any] = {
        "batch": batch,
        "length": config.max_position_embeddings if length is None else length,
        "mesh": {"fsdp": fsdp, "tensor": tensor} | ({} if experts == 1 else {"experts": experts}),
        "dtype": dtype or given or "float32",
        "param_dtype": param_dtype,
        "train": train,
        "optimizer": optimizer,
        "backend": backend,
    }
    ways: dict[str, dict[str, Any]] = (
        {"kept": {}, "checkpointing": {"checkpointing": True}} if train else {"generation": {}}
    )
    plans = {name: planning.plan(config, **settings, **way) for name, way in ways.items()}
    try:
        room = None if memory is None else parse_size(memory)
    except CheckpointError as error:
        raise InputError(f"memory is {memory!r}, expected a number of bytes such as 80GB") from error
    fits: dict[str, dict[str, int]] = {}
    if room is not None:
        for name, way in ways.items():
            fits[name] = {each: planning.largest(room, each, config, **settings, **way) for each in ("batch", "length")}
    if plot is not None:
        from olmozoo.cli.plots import plot_memory

        name = list(ways)[-1]
        bars = planning.meshes(config, devices, **settings, **ways[name])
        plot_memory(bars, f"{model}: memory of each of {devices} devices, {name}", plot, room)
    if as_json:
        content = {
            name: {**found.by_kind(), "total": found.total, "bounds": found.bounds} for name, found in plans.items()
        }
        write(json.dumps({"model": model, **settings, "plan": content, "fits": fits}) + "\n")
        return
    show_plans(f"{model}: memory of each of {devices} devices", plans)
    if fits:
        rows = [
            (
                way,
                f"{found['batch']:,}",
                f"{found['length']:,}",
                "yes" if plans[way].total <= (room or 0) else "no",
            )
            for way, found in fits.items()
        ]
        show(f"what fits in {memory}", ["", "largest batch", "largest length", "as planned"], rows)


def show_plans(title: str, plans: dict[str, Plan]) -> None:
    """Print plans as a table, with what is exact and what a bound."""
    rows = []
    for kind in next(iter(plans.values())).by_kind():
        values = [(getattr(found, kind), kind in found.bounds) for found in plans.values()]
        if any(count for count, _ in values):
            rows.append((kind, *(("≤ " if bound else "") + in_bytes(count) for count, bound in values)))
    rows.append(("total", *(f"≤ {in_bytes(found.total)}" for found in plans.values())))
    show(title, ["", *plans], rows)
