"""What `verify` finds, and how it is shown: plots, and a web page that is one file."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from olmozoo.diff import ABSENT, Diff
from olmozoo.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, np.dtype[Any]]

SHOWN_LAYERS = 4  # of whose attention there are pictures, from the first to the last
SHOWN_TENSORS = 30
FLOOR = 1e-18  # where a logarithmic axis ends if there is nothing but zeros


@dataclass(frozen=True)
class Row:
    """How one tensor of one backend differs from the reference's, at real tokens.

    Attributes:
        backend: compared with the reference.
        name: `embeddings`, `layer 1`, ..., `logits`, and where asked for `attention 1`, ...
        largest: the largest absolute difference; NaN where either side has one.
        relative: `largest` over the largest absolute value of the reference.
        ok: whether the bound holds.
    """

    backend: str
    name: str
    largest: float
    relative: float
    ok: bool


@dataclass(frozen=True)
class Band:
    """How far one tensor of one backend is from the float32 answer, beside what rounding explains.

    Distances are norms of the difference over the norm of the float32 answer, at real tokens.

    Attributes:
        backend, name: as in `Row`; the reference is here too.
        distance: found.
        expected: see `olmozoo.verify.rounding`.
        allowed: the multiple of `expected` that is the bound.
    """

    backend: str
    name: str
    distance: float
    expected: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains the distance."""
        return self.distance <= self.allowed


@dataclass(frozen=True)
class NextToken:
    """The likeliest tokens after one prompt.

    Attributes:
        prompt: its text, or its number where there is no tokenizer.
        tokens: the reference's likeliest tokens, first the likeliest: their texts, or their ids.
        probabilities: of those tokens, by backend.
    """

    prompt: str
    tokens: list[str]
    probabilities: dict[str, list[float]]


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        reference: what the others are compared with: a backend, or `A in pt`.
        dtype: that all computed in.
        bound: see `olmozoo.verify.BOUNDS`.
        rows: by backend and layer.
        agreement: for each backend, the share of real positions where its likeliest next token is the reference's.
        bad_weights: tensors of the checkpoint that hold NaN or infinity.
        model: what was verified, and `against` what, as given.
        against: see `model`; None where one checkpoint was compared with itself.
        config: the fields of the config.json.
        weights: how the two checkpoints differ; None without `against`.
        band: in bfloat16 and float16, how far each backend is from the float32 answer.
        notes: what could not be compared, since the two checkpoints have it in different shapes.
        next_tokens: where logits were asked for, the likeliest tokens after each prompt.
        divergence: where logits were asked for, the mean and the largest Kullback-Leibler divergence of each backend's
            next-token distribution from the reference's, in nats, over the real positions.
        maps: where attention was asked for, of the longest prompt, (layers, query, key): the reference's weights,
            averaged over heads, and for each other backend the largest difference among the heads.
    """

    reference: str
    dtype: str
    bound: float
    rows: list[Row] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)
    bad_weights: list[str] = field(default_factory=list)
    model: str = ""
    against: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    weights: Diff | None = None
    band: list[Band] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    next_tokens: list[NextToken] = field(default_factory=list)
    divergence: dict[str, tuple[float, float]] = field(default_factory=dict)
    maps: dict[str, Array] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every bound holds, every weight is finite and everything could be compared."""
        bounds = [row.ok for row in self.rows] + [entry.ok for entry in self.band]
        return all(bounds) and not self.bad_weights and not self.notes

    @property
    def verdict(self) -> str:
        """`ok` in words."""
        if self.against is None:
            return "all backends agree" if self.ok else "the backends do not agree"
        return "the two checkpoints agree" if self.ok else "the two checkpoints do not agree"

    @property
    def compared(self) -> list[str]:
        """What was compared with the reference."""
        return list(dict.fromkeys(row.backend for row in self.rows))


# -- plots ------------------------------------------------------------------------------------------------------------


def plot(report: Report, file: str | os.PathLike[str]) -> None:
    """Draw the divergence by layer, one line a backend, and the bound.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'olmozoo[plot]'`).
        InputError: the file cannot be written.
    """
    figure = _divergence(report)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # of a path, and of the format that its name ends in
        raise InputError(f"cannot write {os.fspath(file)}: {getattr(error, 'strerror', None) or error}") from error


def _divergence(report: Report) -> Figure:
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


def _rounding(report: Report) -> Figure:
    lines: dict[str, list[tuple[str, float]]] = {}
    for entry in report.band:
        lines.setdefault(entry.backend, []).append((entry.name, entry.distance))
    figure = _by_layer(lines, f"Distance from the float32 answer in {report.dtype}", "norm of difference / norm")
    axes = figure.axes[0]
    entries = [entry for entry in report.band if entry.backend == report.reference]
    places = range(len(entries))
    allowed = [entry.allowed for entry in entries]
    expected = [entry.expected for entry in entries]
    axes.plot(places, expected, color="black", linestyle=":", label="expected of rounding")
    axes.fill_between(places, min(expected) / 10, allowed, color="tab:green", alpha=0.12, label="rounding explains it")
    axes.plot(places, allowed, color="tab:red", linestyle="--", label="bound")
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


def _attention(report: Report) -> Figure:
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


# -- the page ---------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td { font: 14px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
td.number { text-align: right; white-space: nowrap; }
tr.bad td { background: #fde0e0; }
img { max-width: 100%; }
.good, .bad-verdict { font-weight: bold; color: #176b2c; }
.bad-verdict { color: #b00020; }
"""


def write_html(report: Report, file: str | os.PathLike[str]) -> None:
    """Write the report as one web page with everything in it: no script, and nothing from elsewhere.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'olmozoo[plot]'`).
        InputError: the file cannot be written.
    """
    title = f"olmozoo verify: {report.model}" + (f" against {report.against}" if report.against else "")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="{"good" if report.ok else "bad-verdict"}">{html.escape(report.verdict)}</p>',
        _paragraphs([f"{name} holds NaN or infinity" for name in report.bad_weights] + report.notes),
        *_activations(report),
        *_band(report),
        *_tokens(report),
        *_maps(report),
        *_weights(report),
        *_config(report),
        "</body></html>",
    ]
    try:
        Path(file).write_text("\n".join(page), encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot write {os.fspath(file)}: {error.strerror}") from error


def _activations(report: Report) -> Iterable[str]:
    yield "<h2>Layer by layer</h2>"
    yield _paragraphs(
        [
            f"One left-padded batch, computed in {report.dtype}. The reference is {report.reference}; the bound is "
            f"{report.bound:g} of the largest value compared (of 1, where that is smaller)."
        ]
    )
    yield _image(_divergence(report), f"divergence by layer in {report.dtype}")
    yield _table(
        ["compared", "tensor", "largest difference", "relative"],
        [[row.backend, row.name, row.largest, row.relative] for row in report.rows],
        [row.ok for row in report.rows],
    )


def _band(report: Report) -> Iterable[str]:
    if not report.band:
        return
    entry = report.band[0]
    yield f"<h2>Rounding in {html.escape(report.dtype)}</h2>"
    yield _paragraphs(
        [
            f"How far each backend is from the answer in float32, as the norm of the difference over the norm of that "
            f"answer. One rounding to {report.dtype} moves values by {entry.expected:.2g} of their norm on average; "
            f"independent roundings add up as the square root of their number. The bound is "
            f"{entry.allowed / entry.expected:g} times that."
        ]
    )
    yield _image(_rounding(report), f"distance from the float32 answer in {report.dtype}")
    yield _table(
        ["backend", "tensor", "distance", "expected of rounding", "bound"],
        [[e.backend, e.name, e.distance, e.expected, e.allowed] for e in report.band],
        [e.ok for e in report.band],
    )


def _tokens(report: Report) -> Iterable[str]:
    yield "<h2>Next tokens</h2>"
    head = ["compared", "the same likeliest token"]
    rows: list[list[Any]] = [[label, f"{share:.1%} of positions"] for label, share in report.agreement.items()]
    if report.divergence:
        head += ["mean KL divergence, nats", "largest"]
        rows = [[*row, *report.divergence[label]] for row, label in zip(rows, report.agreement, strict=True)]
    yield _table(head, rows)
    for entry in report.next_tokens:
        yield f"<p>After <code>{html.escape(repr(entry.prompt))}</code>:</p>"
        labels = list(entry.probabilities)
        yield _table(
            ["token", *(f"probability, {label}" for label in labels)],
            [
                [repr(token), *(f"{entry.probabilities[label][i]:.6f}" for label in labels)]
                for i, token in enumerate(entry.tokens)
            ],
        )


def _maps(report: Report) -> Iterable[str]:
    if report.maps:
        yield "<h2>Attention</h2>"
        yield _paragraphs(
            [
                "Of the longest prompt. First row: the reference's weights, averaged over the heads. Below: the "
                "largest difference from them in any head."
            ]
        )
        yield _image(_attention(report), "attention maps by layer")


def _weights(report: Report) -> Iterable[str]:
    if report.weights is None:
        return
    found = report.weights
    yield "<h2>Weights: A and B</h2>"
    yield _paragraphs([f"{len(found.differing):,} of {len(found.tensors):,} tensors differ."])
    if found.differing:
        yield _table(
            ["tensor", "A", "B", "differing values", "largest", "relative"],
            [
                [t.name, t.a or ABSENT, t.b or ABSENT, f"{t.differing:,}", t.largest, t.relative]
                for t in found.differing[:SHOWN_TENSORS]
            ],
        )


def _config(report: Report) -> Iterable[str]:
    yield "<h2>Config</h2>"
    other = {} if report.weights is None else {entry.name: entry for entry in report.weights.config}
    names = sorted({*report.config, *other})
    rows = []
    for name in names:
        row = [name, other[name].a if name in other else report.config[name]]
        if report.weights is not None:
            row.append(other[name].b if name in other else report.config[name])
        rows.append([str(cell) for cell in row])
    sides = ["value"] if report.weights is None else ["A", "B"]
    yield _table(["field", *sides], rows, [name not in other for name in names])


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], good: Sequence[bool] | None = None) -> str:
    """A table; floats are aligned as numbers, and rows that are not good stand out."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f'<td class="number">{value:.3e}</td>'
        return f"<td>{html.escape(str(value))}</td>"

    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    for n, row in enumerate(rows):
        style = "" if good is None or good[n] else ' class="bad"'
        lines.append(f"<tr{style}>" + "".join(map(cell, row)) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _image(figure: Figure, text: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{encoded}"></p>'
