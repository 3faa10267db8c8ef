"""The report page: one file that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from equipoise import extras
from equipoise.report.plot import pareto_plot
from equipoise.report.rows import interval, rows, size, summary
from equipoise.search.result import TuneResult


def render_html(result: TuneResult) -> str:
    """The page for ``result``, self-contained.

    Raises:
        MissingExtraError: jinja2 or plotly is not installed.
    """
    jinja2: Any = extras.require("jinja2")
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "interval": interval}
    page: str = environment.get_template("page.html.j2").render(
        result=result,
        summary=summary(result),
        rows=rows(result),
        plot=pareto_plot(result),
        style=(folder / "style.css").read_text(encoding="utf-8"),
    )
    return page
