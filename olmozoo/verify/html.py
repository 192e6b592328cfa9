"""A `Report` as one web page."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmozoo.checkpoint.diff import ABSENT
from olmozoo.errors import InputError
from olmozoo.verify.plots import _attention, _divergence, _rounding
from olmozoo.verify.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SHOWN_TENSORS = 30
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
