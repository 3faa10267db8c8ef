"""Figures as people read them: one row of strings per candidate, for terminal and page alike."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.measure.interval import Interval
from equipoise.search.result import Candidate, TuneResult

_NOTHING = "–"
_NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A candidate in words and figures.

    Attributes:
        chosen: Whether it is the sweet spot.
        cells: Column title -> text, in the order of the table.
    """

    chosen: bool
    cells: dict[str, str]


def rows(result: TuneResult) -> tuple[Row, ...]:
    """All candidates of ``result``."""
    return tuple(_row(candidate, result) for candidate in result.candidates)


def _row(candidate: Candidate, result: TuneResult) -> Row:
    chosen = candidate.recipe.name == result.chosen
    measured = candidate.measurement
    figures = [_NOTHING] * 5
    if measured is not None:
        figures = [
            interval(measured.metric, digits=4),
            f"{measured.latency_ms:.3f}{_NO_BREAK}ms",
            interval(measured.speedup, digits=2, unit="x"),
            size(measured.size_bytes),
            size(measured.peak_memory_bytes),
        ]
    titles = ("candidate", result.metric, "latency", "speed / float", "size", "peak memory")
    cells = dict(zip(titles, [candidate.recipe.name, *figures], strict=True))
    return Row(
        chosen=chosen,
        cells={**cells, "verdict": _verdict(candidate, chosen=chosen), "reason": candidate.reason},
    )


def _verdict(candidate: Candidate, *, chosen: bool) -> str:
    return f"{candidate.verdict}, chosen" if chosen else candidate.verdict


def interval(value: Interval, *, digits: int, unit: str = "") -> str:
    """``1.62x [1.58, 1.66]``."""
    return f"{value.value:.{digits}f}{unit} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def size(count: float) -> str:
    """Bytes in decimal units: ``23.1 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' else 1}f}{_NO_BREAK}{unit}"
        count /= 1000
    return f"{count:.2f}{_NO_BREAK}GB"


def summary(result: TuneResult) -> str:
    """The outcome in a few sentences."""
    chosen = next(c for c in result.candidates if c.recipe.name == result.chosen)
    measured = chosen.measurement
    if measured is None:
        return result.chosen_reason
    baseline = result.candidates[0].measurement
    smaller = baseline.size_bytes / measured.size_bytes if baseline else 1.0
    return (
        f"{result.chosen_reason}. It takes {measured.latency_ms:.3f} ms per inference,"
        f" {size(measured.size_bytes)} on disk ({smaller:.1f}x smaller than float) and"
        f" {size(measured.peak_memory_bytes)} of memory. Its {result.metric} is"
        f" {measured.metric.value:.4f}; {result.reference_name} has"
        f" {result.reference_metric.value:.4f} on the same {result.evaluation_samples} samples, and"
        f" the drop is at most {measured.drop.high:.4f} at 95 % confidence"
        f" (allowed {result.max_drop:g})."
    )
