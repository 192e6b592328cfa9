"""Plots of commands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from olmozoo.errors import InputError
from olmozoo.sharding import MESH_AXES

if TYPE_CHECKING:
    from olmozoo.memory import Plan


def plot_memory(plans: Mapping[str, Plan], title: str, file: str | os.PathLike[str], memory: int | None) -> None:
    """Draw the bytes of each kind as a bar for each mesh, and the memory of a device as a line.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'olmozoo[plot]'`).
        InputError: no mesh fits the model, or the file cannot be written.
    """
    if not plans:
        raise InputError("no mesh of so many devices fits the model")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names, below = list(plans), [0.0] * len(plans)
    for kind in next(iter(plans.values())).by_kind():
        heights = [getattr(found, kind) / 1e9 for found in plans.values()]
        if any(heights):
            axes.bar(names, heights, bottom=below, label=kind)
            below = [bottom + height for bottom, height in zip(below, heights, strict=True)]
    if memory is not None:
        axes.axhline(memory / 1e9, color="black", linestyle="--", label="a device has")
    labels = MESH_AXES[: len(names[0].split(" x "))]
    axes.set(title=title, xlabel=f"mesh: {' x '.join(labels)}", ylabel="GB")
    axes.legend()
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # of a path, and of the format that its name ends in
        raise InputError(f"cannot write {os.fspath(file)}: {getattr(error, 'strerror', None) or error}") from error
