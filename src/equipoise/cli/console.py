"""What all commands share: consoles, JSON, progress bars."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from equipoise import record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from equipoise.measure.bench import BenchRecord
    from equipoise.stages import Observer


def out() -> Console:
    """Standard output."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _FILE_WIDTH
    return Console(highlight=False, width=width)


def err() -> Console:
    """Standard error: progress and messages."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(record.dumps(value))


_OF_CANDIDATE: Final = ": "
"""In the label of a stage: what comes before is the candidate."""

_FILE_WIDTH: Final = 120
"""Columns of a table in a file or a pipe, where nothing says how wide the reader's screen is."""


@contextmanager
def progress(*, quiet: bool) -> Iterator[Observer]:
    """An observer of stages that shows a bar for each that runs and a line for each that ended.

    What candidates are made of goes again when it has ended: a line tells of the whole trial.
    """
    from equipoise.stages import Observer

    if quiet:
        yield Observer()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bars = Progress(
        SpinnerColumn(finished_text="[green]✓[/green]"),
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=28),
        TimeElapsedColumn(),
        console=err(),
        refresh_per_second=4,
    )
    with bars:
        yield _bars(bars)


def _bars(bars: Progress) -> Observer:
    from equipoise.stages import Observer

    class Bars(Observer):
        def __init__(self) -> None:
            # Trials at once may run stages of one label at once.
            self._tasks: list[tuple[str, TaskID]] = []

        def _ended(self, label: str) -> TaskID:
            index = next(i for i, (known, _) in enumerate(self._tasks) if known == label)
            return self._tasks.pop(index)[1]

        def started(self, label: str) -> None:
            self._tasks.append((label, bars.add_task(label, total=None)))

        def advanced(self, done: int, total: int) -> None:
            for _, task in self._tasks[-1:]:
                bars.update(task, completed=done, total=total)

        def ended(self, label: str, *, cached: bool) -> None:
            task = self._ended(label)
            if cached or _OF_CANDIDATE in label:
                bars.remove_task(task)
            else:
                bars.update(task, description=label, completed=1, total=1)

        def failed(self, label: str) -> None:
            task = self._ended(label)
            bars.update(task, description=f"[red]{label}: not possible[/red]")
            bars.stop_task(task)

        def say(self, line: str) -> None:
            bars.console.print(line, markup=False, soft_wrap=True)

    return Bars()


def print_lines(*lines: str) -> None:
    """Plain lines on standard output, never cut or wrapped."""
    for line in lines:
        sys.stdout.write(f"{line}\n")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of plain text: ``equipoise[ort]`` is an extra here, not markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table()
    for title in titles:
        made.add_column(title, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def latency_table(records: Sequence[BenchRecord]) -> Table:
    """Latencies of engines, a row for each engine and number of threads."""
    from equipoise.report.rows import interval

    return table(
        ["engine", "threads", "median, ms", "p95, ms", "speed-up"],
        [
            (
                r.engine,
                str(r.threads),
                interval(r.latency_ms, digits=3),
                f"{r.p95_ms:.3f}",
                interval(r.speedup, digits=2, unit="x") if r.speedup else "–",
            )
            for r in records
        ],
    )
