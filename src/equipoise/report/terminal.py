"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from equipoise.report.rows import rows
from equipoise.search.result import TuneResult

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_STYLES: Final = {
    "baseline": "dim", "accepted": "", "refused": "red", "failed": "red", "not applicable": "dim"
}  # fmt: skip
_RIGHT: Final = {"latency", "size", "peak memory"}


def candidates_table(result: TuneResult) -> Table:
    """All candidates with their figures, verdict and reason; the chosen one stands out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    found = rows(result)
    for title in found[0].cells:
        table.add_column(
            title,
            justify="right" if title in _RIGHT else "left",
            overflow="fold",
            ratio=1 if title == "reason" else None,
            min_width=18 if title in {"reason", "candidate"} else None,
        )
    for row, candidate in zip(found, result.candidates, strict=True):
        style = "bold green" if row.chosen else _STYLES[candidate.verdict]
        table.add_row(*(Text(text) for text in row.cells.values()), style=style)
    return table


def metric_reports(result: TuneResult) -> RenderableType:
    """The per-class tables of the reference and of the chosen engine, side by side."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    chosen = next(c for c in result.candidates if c.recipe.name == result.chosen)
    reports = {result.reference_name: result.reference_report, result.chosen: chosen.metric_report}
    return Columns(
        [
            Panel(Text(text.strip("\n")), title=name, expand=False)
            for name, text in reports.items()
            if text
        ]
    )
