"""Plots of a `Report`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from olmozoo.errors import InputError
from olmozoo.verify.report import Band, Report, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SHOWN_LAYERS = 4  # of whose attention there are pictures, from the first to the last
FLOOR = 1e-18  # where a logarithmic axis ends if there is nothing but zeros


def plot(report: Report, file: str | os.PathLike[str]) -> None:
    """Draw the divergence by layer, one line a backend, and the bound.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'olmozoo[plot]'`).
        InputError: the file cannot be written.
    """
    figure = divergence(report)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # of a path, and of the format that its name ends in
        raise InputError(f"cannot write {os.fspath(file)}: {getattr(error, 'strerror', None) or error}") from error


def divergence(report: Report) -> Figure:
    """The divergence by layer, one line a backend, and the bound."""
    lines = {
        f"{backend} and {report.reference}": [
            (row.name, row.relative) for row in report.rows if row.backend == backend and _is_layer(row)
        ]
        for backend in report.compared
    }
    unit = "largest difference / largest value"
    figure = _by_layer(lines, f"Divergence by layer in {report.dtype}", unit, report.bound)
    figure.axes[0].legend()
    return figure


def rounding(report: Report) -> Figure:
    """The distance from the float32 answer by layer, what rounding explains, and the bound."""
    lines: dict[str, list[tuple[str, float]]] = {}
    for entry in report.band:
        lines.setdefault(entry.backend, []).append((entry.name, entry.distance))
    figure = _by_layer(lines, f"Distance from the float32 answer in {report.dtype}", "norm of difference / norm")
    axes = figure.axes[0]
    entries = [entry for entry in report.band if entry.backend == report.reference]
    steps = range(len(entries))
    allowed = [entry.allowed for entry in entries]
    expected = [entry.expected for entry in entries]
    axes.plot(steps, expected, color="black", linestyle=":", label="expected of rounding")
    axes.fill_between(steps, min(expected) / 10, allowed, color="tab:green", alpha=0.12, label="rounding explains it")
    axes.plot(steps, allowed, color="tab:red", linestyle="--", label="bound")
    axes.legend(loc="lower right")
    return figure


def _by_layer(lines: dict[str, list[tuple[str, float]]], title: str, unit: str, bound: float | None = None) -> Figure:
    """Lines over the layers, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    names: list[str] = []
    values = [value for points in lines.values() for _, value in points]
    zero = min((value for value in values if value > 0), default=FLOOR) / 10
    for (label, points), marker in zip(lines.items(), "osD^vP", strict=False):
        names = max(names, [name for name, _ in points], key=len)
        axes.plot([value if value else zero for _, value in points], marker=marker, alpha=0.8, label=label)
    if bound is not None:
        axes.plot([bound] * len(names), color="tab:red", linestyle="--", label=f"bound, {bound:g}")
    if 0.0 in values:
        axes.plot([zero] * len(names), color="gray", linestyle=":", label="exactly 0")
    step = -(-len(names) // 20)
    ticks = sorted({*range(0, len(names), max(step, 1)), len(names) - 1}) if names else []
    if len(ticks) > 1 and ticks[-1] - ticks[-2] < step:
        del ticks[-2]  # its name would run into the last one's
    axes.set_xticks(ticks, [names[i] for i in ticks], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.grid(visible=True, which="major", alpha=0.3)
    return figure


def attention(report: Report) -> Figure:
    """The reference's attention in some layers, and under it each other backend's largest difference from it."""
    from matplotlib.colors import LogNorm, PowerNorm
    from matplotlib.figure import Figure

    count = len(report.maps[report.reference])
    layers = np.unique(np.linspace(0, count - 1, min(count, SHOWN_LAYERS)).round().astype(int)).tolist()
    others = [label for label in report.maps if label != report.reference]
    peak = max([float(np.nanmax(report.maps[label])) for label in others] or [0.0])
    figure = Figure(figsize=(2.6 * len(layers) + 1.6, 2.7 * len(report.maps)), layout="constrained")
    grid = figure.subplots(len(report.maps), len(layers), squeeze=False, sharex=True, sharey=True)
    for axes, label in zip(grid, report.maps, strict=True):
        # Squeezed at the top: most weights are small, and the first position often takes nearly all.
        scale = PowerNorm(0.5, 0, 1) if label == report.reference else LogNorm(max(peak, FLOOR) / 1e4, max(peak, FLOOR))
        for ax, layer in zip(axes, layers, strict=True):
            values = report.maps[label][layer]
            future = np.triu(np.ones(values.shape, bool), 1)
            shown = np.ma.masked_array(values if label == report.reference else np.maximum(values, peak / 1e4), future)
            image = ax.imshow(shown, norm=scale, cmap="viridis" if label == report.reference else "magma")
            ax.set_title(f"{label}, layer {layer + 1}", fontsize=9)
        what = "weight" if label == report.reference else f"|difference|\nfrom {report.reference}"
        figure.colorbar(image, ax=list(axes), label=what, shrink=0.85)
        axes[0].set_ylabel("query position")
    for ax in grid[-1]:
        ax.set_xlabel("key position")
    return figure


def _is_layer(row: Row | Band) -> bool:
    return not row.name.startswith("attention")
