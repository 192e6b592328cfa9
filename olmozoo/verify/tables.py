"""The tables of a `Report` and of a `Diff`, in text: the terminal and the page show the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from olmozoo.checkpoint.diff import ABSENT, Diff, TensorDifference
from olmozoo.verify.report import NextToken, Report


class Table(NamedTuple):
    """Rows of cells.

    Attributes:
        title: what the numbers are.
        columns: the headings.
        rows: the cells.
        ok: for each row, whether it is as it should be; None where no row is judged.
        texts: how many columns from the left are text; the others are numbers, aligned on the right.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    ok: Sequence[bool] | None = None
    texts: int = 1


def layers(report: Report) -> Table:
    """The differences from the reference: a row a layer, two columns a backend."""
    columns = ["layer", *(heading for label in report.compared for heading in (f"{label}: largest", "relative"))]
    rows, ok = [], []
    for name in dict.fromkeys(row.name for row in report.rows):
        found = {row.backend: row for row in report.rows if row.name == name}
        pairs = [(found[la].largest, found[la].relative) if la in found else None for la in report.compared]
        rows.append([name, *(text for pair in pairs for text in (map(_number, pair) if pair else "--"))])
        ok.append(all(row.ok for row in found.values()))
    title = f"difference from {report.reference} in {report.dtype}; relative bound {report.bound:g}"
    return Table(title, columns, rows, ok)


def rounding(report: Report) -> Table:
    """The distances from the float32 answer: a row a layer, a column a backend."""
    labels = list(dict.fromkeys(entry.backend for entry in report.band))
    rows, ok = [], []
    for name in dict.fromkeys(entry.name for entry in report.band):
        entries = [entry for entry in report.band if entry.name == name]
        numbers = [*(entry.distance for entry in entries), entries[0].expected, entries[0].allowed]
        rows.append([name, *map(_number, numbers)])
        ok.append(all(entry.ok for entry in entries))
    title = f"distance from the float32 answer in {report.dtype}"
    return Table(title, ["layer", *labels, "expected of rounding", "bound"], rows, ok)


def agreement(report: Report) -> Table:
    """How far the next-token distributions are apart: a row a backend."""
    columns = ["compared", "same likeliest token"]
    rows = [[label, f"{share:.1%}"] for label, share in report.agreement.items()]
    if report.divergence:
        columns += ["mean KL divergence, nats", "largest KL divergence"]
        rows = [[*row, *map(_number, report.divergence[row[0]])] for row in rows]
    return Table(f"next tokens, compared with {report.reference}", columns, rows)


def likeliest(entry: NextToken) -> Table:
    """The likeliest tokens after one prompt, with each backend's probabilities."""
    rows = [
        [repr(token), *(f"{shares[i]:.6f}" for shares in entry.probabilities.values())]
        for i, token in enumerate(entry.tokens)
    ]
    return Table(f"likeliest after {entry.prompt!r}", ["token", *entry.probabilities], rows)


def weights(tensors: Sequence[TensorDifference]) -> Table:
    """Tensors of two checkpoints; counts of NaN and infinity only where there are any."""
    columns = ["tensor", "A", "B", "differing", "largest", "relative"]
    nan = any(row.nan_a or row.nan_b for row in tensors)
    inf = any(row.inf_a or row.inf_b for row in tensors)
    rows = []
    for row in tensors:
        share = f"{row.differing / max(row.elements, 1):.1%}"
        numbers = [f"{row.differing:,} ({share})", _number(row.largest), _number(row.relative)]
        numbers += [f"{row.nan_a:,}/{row.nan_b:,}"] if nan else []
        numbers += [f"{row.inf_a:,}/{row.inf_b:,}"] if inf else []
        compared = row.a and row.b and row.a.partition(" ")[2] == row.b.partition(" ")[2]
        rows.append([row.name, row.a or ABSENT, row.b or ABSENT, *(numbers if compared else [""] * len(numbers))])
    columns += ["NaN A/B"] * nan + ["inf A/B"] * inf
    return Table("weights", columns, rows, [row.same for row in tensors], texts=3)


def fields(found: Diff) -> Table:
    """The fields of two configs that differ."""
    rows = [[entry.name, str(entry.a), str(entry.b)] for entry in found.config]
    return Table("config", ["field", "A", "B"], rows, texts=3)


def config(report: Report) -> Table:
    """Every field of the config, or of the two, with those marked that differ."""
    other = {} if report.weights is None else {entry.name: entry for entry in report.weights.config}
    names = sorted({*report.config, *other})
    sides = {name: (other[name].a, other[name].b) if name in other else (report.config[name],) * 2 for name in names}
    columns = ["value"] if report.weights is None else ["A", "B"]
    rows = [[name, *map(str, sides[name][: len(columns)])] for name in names]
    return Table("config", ["field", *columns], rows, [name not in other for name in names], texts=3)


def _number(value: float) -> str:
    return f"{value:.2e}"
