"""The report page: one file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from equipoise import extras
from equipoise.report.plot import pareto_plot
from equipoise.report.rows import interval, rows, size, summary
from equipoise.search.result import TuneResult

_FOLDER: Final = Path(__file__).parent


def render_html(result: TuneResult) -> str:
    """The page for ``result``, self-contained.

    Raises:
        MissingExtraError: jinja2 or plotly is not installed.
    """
    values = {
        "result": result,
        "summary": summary(result),
        "rows": rows(result),
        "plot": pareto_plot(result),
    }
    return render("page.html.j2", values)


def render(template: str, values: Mapping[str, object]) -> str:
    """A page from a template of this folder, with the style that all pages share.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2: Any = extras.require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "interval": interval}
    style = (_FOLDER / "style.css").read_text(encoding="utf-8")
    page: str = environment.get_template(template).render(**values, style=style)
    return page
