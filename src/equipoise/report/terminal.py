"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from equipoise.report.rows import Row, rows
from equipoise.search.result import TuneResult

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_STYLES: Final = {
    "baseline": "dim", "accepted": "", "refused": "red", "failed": "red", "not applicable": "dim"
}  # fmt: skip


def candidates_table(result: TuneResult) -> Table:
    """All candidates with their figures, verdict and reason; the chosen one stands out.

    Related figures stand one below the other, so that the table fits 100 columns.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_lines=False)
    found = rows(result)
    for title in _columns(found[0], metric=result.metric):
        table.add_column(title, no_wrap=not title.startswith("verdict"), overflow="fold")
    for row, candidate in zip(found, result.candidates, strict=True):
        style = "bold green" if row.chosen else _STYLES[candidate.verdict]
        cells = _columns(row, metric=result.metric).values()
        table.add_row(*(Text(text) for text in cells), style=style)
        table.add_section()
    return table


def _columns(row: Row, *, metric: str) -> dict[str, str]:
    """Column title -> cell of a row."""
    cells = row.cells
    return {
        "candidate": cells["candidate"],
        metric: _stacked(cells[metric]),
        "latency\nspeed / float": f"{cells['latency']}\n{cells['speed / float']}",
        "size\npeak memory": f"{cells['size']}\n{cells['peak memory']}",
        "verdict and reason": f"{cells['verdict']}: {cells['reason']}",
    }


def _stacked(text: str) -> str:
    """A value above its interval."""
    return text.replace(" [", "\n[", 1)


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
