"""Figures as people read them: one row of cells per candidate, for terminal and page alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from equipoise.measure.interval import Interval
from equipoise.report.figures import Figures, figures
from equipoise.search.result import Candidate, TuneResult, Verdict

_NOTHING: Final = "–"
_NO_BREAK: Final = "\N{NO-BREAK SPACE}"
_ROUGHLY: Final = "≈"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell.

    Attributes:
        text: What stands there.
        value: What it is sorted by; None for nothing, which comes last.
    """

    text: str
    value: float | str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A candidate in words and figures.

    Attributes:
        name: Of the recipe.
        verdict: Of the candidate.
        chosen: Whether it is the sweet spot.
        cells: Key of a column -> cell, in the order of the table.
    """

    name: str
    verdict: Verdict
    chosen: bool
    cells: dict[str, Cell]


def columns(result: TuneResult) -> dict[str, str]:
    """Key of each column -> its title."""
    return {
        "candidate": "candidate",
        "verdict": "verdict",
        "metric": result.metric,
        "drop": "drop",
        "latency": "latency",
        "ratio": "latency / float",
        "size": "size",
        "memory": "peak memory",
        "reason": "reason",
        "origin": "proposed by",
        "seconds": "took",
    }


def rows(result: TuneResult) -> tuple[Row, ...]:
    """All candidates of ``result``."""
    return tuple(_row(candidate, result) for candidate in result.candidates)


def _row(candidate: Candidate, result: TuneResult) -> Row:
    name, chosen = candidate.recipe.name, candidate.recipe.name == result.chosen
    verdict = f"{candidate.verdict}, chosen" if chosen else candidate.verdict
    cells = {
        "candidate": Cell(text=name, value=name),
        "verdict": Cell(text=verdict, value=verdict),
        **_figures(candidate),
        "reason": Cell(text=candidate.reason, value=candidate.reason),
        "origin": Cell(text=candidate.origin, value=candidate.origin),
        "seconds": Cell(text=duration(candidate.seconds), value=float(candidate.seconds)),
    }
    return Row(name=name, verdict=candidate.verdict, chosen=chosen, cells=cells)


def _figures(candidate: Candidate) -> dict[str, Cell]:
    found = figures(candidate)
    return {
        "metric": _metric(found),
        "drop": _drop(candidate),
        "latency": _latency(found),
        "ratio": _interval(found.ratio, found, digits=2, unit=""),
        "size": _size(found.size_bytes),
        "memory": _size(found.memory_bytes),
    }


def _metric(found: Figures) -> Cell:
    """Of a race that was lost there is no interval."""
    if found.metric is None or found.whole:
        return _interval(found.metric, found, digits=4, unit="")
    value = found.metric.value
    return Cell(text=f"{_ROUGHLY}{_NO_BREAK}{value:.4f}", value=value)


def _drop(candidate: Candidate) -> Cell:
    if candidate.measurement is None:
        return Cell(text=_NOTHING)
    drop = candidate.measurement.drop
    return Cell(text=f"{drop.value:+.4f} (≤{_NO_BREAK}{drop.high:.4f})", value=drop.value)


def _latency(found: Figures) -> Cell:
    digits = 3 if found.latency_ms is None else fine(found.latency_ms.value)
    return _interval(found.latency_ms, found, digits=digits, unit=f"{_NO_BREAK}ms")


def _interval(value: Interval | None, found: Figures, *, digits: int, unit: str) -> Cell:
    if value is None:
        return Cell(text=_NOTHING)
    roughly = "" if found.whole else f"{_ROUGHLY}{_NO_BREAK}"
    return Cell(text=roughly + interval(value, digits=digits, unit=unit), value=value.value)


def _size(count: int | None) -> Cell:
    return Cell(text=_NOTHING) if count is None else Cell(text=size(count), value=float(count))


def interval(value: Interval, *, digits: int, unit: str = "") -> str:
    """``1.62x [1.58, 1.66]``."""
    return f"{value.value:.{digits}f}{unit} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def fine(value: float) -> int:
    """Digits after the point that show three figures of a small value: three at least."""
    return 3 if value >= 0.1 or value <= 0 else min(2 - math.floor(math.log10(value)), 6)


def size(count: float) -> str:
    """Bytes in decimal units: ``23.1 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' else 1}f}{_NO_BREAK}{unit}"
        count /= 1000
    return f"{count:.2f}{_NO_BREAK}GB"


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 20 s``, ``1 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f}{_NO_BREAK}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_NO_BREAK}min {rest}{_NO_BREAK}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{_NO_BREAK}h {minutes}{_NO_BREAK}min"
