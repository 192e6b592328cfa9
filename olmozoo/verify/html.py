"""A `Report` as one web page."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from olmozoo.errors import InputError
from olmozoo.typing import StrPath
from olmozoo.verify import plots, tables
from olmozoo.verify.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_html(report: Report, file: StrPath) -> None:
    """Write the report as one web page with everything in it: no script, and nothing from elsewhere.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'olmozoo[plot]'`).
        InputError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=f"olmozoo verify: {report.model}" + (f" against {report.against}" if report.against else ""),
        report=report,
        tables=tables,
        plots={
            "divergence": _image(plots.divergence(report)),
            "rounding": _image(plots.rounding(report)) if report.band else "",
            "attention": _image(plots.attention(report)) if report.maps else "",
        },
    )
    try:
        Path(file).write_text(page.lstrip(), encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot write {os.fspath(file)}: {error.strerror}") from error


def _image(figure: Figure) -> str:
    """The figure as the address of an image that has it inside."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
