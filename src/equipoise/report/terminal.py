"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from equipoise.report.compare import Comparison
from equipoise.report.comparing import difference_rows, figure_rows, moved_rows
from equipoise.report.explain import Explanation
from equipoise.report.figures import chosen, guiding_cost
from equipoise.report.rows import Row, columns, rows
from equipoise.report.words import clean, plain
from equipoise.search.result import Candidate, TuneResult, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType
    from rich.table import Table

_STYLES: Final[dict[Verdict, str]] = {
    "baseline": "dim", "accepted": "", "refused": "red", "outraced": "dim", "failed": "red",
    "not applicable": "dim",
}  # fmt: skip
_RANKS: Final[tuple[Verdict, ...]] = (
    "baseline", "accepted", "refused", "outraced", "failed", "not applicable",
)  # fmt: skip


def candidates_table(result: TuneResult, *, most: int = 20) -> Table:
    """The candidates with their figures, verdict and reason; the chosen one stands out.

    Related figures stand one below the other, so that the table fits 100 columns.

    Args:
        result: What ``tune`` found.
        most: Rows. Where there are more candidates, the chosen one, the float engine and the
            cheapest accepted ones come first, and what is left out is counted below.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_lines=False)
    for title in _titles(result):
        table.add_column(title, no_wrap=not title.startswith("verdict"), overflow="fold")
    shown = _shown(result, most=most)
    for row in shown:
        style = "bold green" if row.chosen else _STYLES[row.verdict]
        table.add_row(*(Text(text) for text in _stacked(row)), style=style)
        table.add_section()
    left = len(result.candidates) - len(shown)
    table.caption = f"and {left} more, in the report" if left else None
    return table


def _shown(result: TuneResult, *, most: int) -> list[Row]:
    """The rows that matter most, in the order in which they were tried."""
    paired = list(zip(result.candidates, rows(result), strict=True))
    ranked = sorted(range(len(paired)), key=lambda i: _rank(paired[i][0], result))
    return [paired[i][1] for i in sorted(ranked[:most])]


def _rank(candidate: Candidate, result: TuneResult) -> tuple[bool, int, float]:
    cost = guiding_cost(candidate, result)
    first = candidate.recipe.name != result.chosen
    return first, _RANKS.index(candidate.verdict), float("inf") if cost is None else cost


def _titles(result: TuneResult) -> tuple[str, ...]:
    named = {key: plain(title) for key, title in columns(result).items()}
    return (
        named["candidate"],
        named["metric"],
        f"{named['latency']}\n{named['ratio']}",
        f"{named['size']}\n{named['memory']}",
        "verdict and reason",
    )


def _stacked(row: Row) -> tuple[str, ...]:
    """The cells of a row, related ones above each other, the intervals that matter among them."""
    text = {key: plain(cell.text) for key, cell in row.cells.items()}
    return (
        text["candidate"],
        text["metric"].replace(" [", "\n[", 1),
        f"{text['latency'].partition(' [')[0]}\n{text['ratio']}",
        f"{text['size']}\n{text['memory']}",
        f"{text['verdict']}: {text['reason']}",
    )


def metric_reports(result: TuneResult) -> RenderableType:
    """The per-class tables of the reference and of the chosen engine, side by side."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    candidate = chosen(result)
    reports = [(result.reference_name, result.reference_report)]
    if candidate is not None:
        reports.append((candidate.recipe.name, candidate.metric_report))
    return Columns(
        [
            Panel(Text(clean(text).strip("\n")), title=Text(plain(name)), expand=False)
            for name, text in reports
            if text
        ]
    )


def explanation_grid(told: Explanation) -> Table:
    """The sentences of an explanation, each beside what it is about."""
    return _grid(list(told.sentences.items()) + [("warning", w) for w in told.warnings])


def _grid(lines: Sequence[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold", max_width=100)
    for topic, words in lines:
        grid.add_row(Text(topic), Text(plain(words)))
    return grid


def comparison_tables(found: Comparison) -> Iterator[Table]:
    """The figures of both choices, the candidates that moved, and what differs."""
    parts = (
        ("figure before now outcome", figure_rows(found)),
        ("candidate verdict changed reason", moved_rows(found)),
        ("kind differs before now", difference_rows(found)),
    )
    return (_table(titles.split(), cells) for titles, cells in parts if cells)


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table
