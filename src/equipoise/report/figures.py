"""What is known of candidates as numbers, over those of the float engine where that counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from equipoise.measure.interval import Interval
from equipoise.search.choose import broken_by
from equipoise.search.goal import Quantity
from equipoise.search.result import Candidate, TuneResult

_PARITY: Final = Interval(value=1.0, low=1.0, high=1.0)
"""The float engine over itself: its measured ratio is noise."""

_LARGEST_EXPONENT: Final = 700.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of a candidate; None for what is not.

    Attributes:
        metric: Task metric; of a race that it lost, on the first samples, with no interval.
        latency_ms: Of one inference.
        ratio: Its latency over that of the float engine, in interleaved rounds.
        size_bytes: On disk.
        memory_bytes: Peak resident memory.
        whole: Whether all of it was measured; otherwise on few samples and in few rounds.
    """

    metric: Interval | None
    latency_ms: Interval | None
    ratio: Interval | None
    size_bytes: int | None
    memory_bytes: int | None
    whole: bool


def figures(candidate: Candidate) -> Figures:
    """What is known of ``candidate``: measured, or what its sketch holds."""
    found = candidate.measurement
    if found is None:
        return _sketched(candidate)
    return Figures(
        metric=found.metric,
        latency_ms=found.latency_ms,
        ratio=_PARITY if candidate.verdict == "baseline" else _inverse(found.speedup),
        size_bytes=found.size_bytes,
        memory_bytes=found.peak_memory_bytes,
        whole=True,
    )


def _sketched(candidate: Candidate) -> Figures:
    sketch = candidate.sketch
    return Figures(
        metric=None if sketch.metric is None else exactly(sketch.metric),
        latency_ms=sketch.latency_ms,
        ratio=_inverse(sketch.speedup),
        size_bytes=sketch.size_bytes,
        memory_bytes=None,
        whole=False,
    )


def _inverse(speedup: Interval | None) -> Interval | None:
    """Latency over float's from float's over it; None where a bound is no ratio."""
    if speedup is None or min(speedup.low, speedup.value) <= 0:
        return None
    return Interval(value=1 / speedup.value, low=1 / speedup.high, high=1 / speedup.low)


def exactly(value: float) -> Interval:
    """A value that has no interval."""
    return Interval(value=value, low=value, high=value)


def overlap(left: Interval, right: Interval) -> bool:
    """Whether the intervals have a value in common."""
    return left.low <= right.high and right.low <= left.high


def named(result: TuneResult, name: str) -> Candidate | None:
    """The candidate called ``name``, if there is one."""
    return next((c for c in result.candidates if c.recipe.name == name), None)


def chosen(result: TuneResult) -> Candidate | None:
    """The candidate at the sweet spot; None when no engine keeps all limits."""
    return named(result, result.chosen) if result.chosen else None


def baseline(result: TuneResult) -> Candidate | None:
    """The float engine."""
    return next((c for c in result.candidates if c.verdict == "baseline"), None)


def relative(candidate: Candidate, result: TuneResult) -> dict[Quantity, float]:
    """Cost -> its value over that of the float engine, for those that are known."""
    base, known = baseline(result), figures(candidate)
    plain = figures(base) if base is not None else None
    pairs: dict[Quantity, tuple[float | None, float | None]] = {
        "latency": (known.ratio.value if known.ratio else None, 1.0),
        "size": (known.size_bytes, plain.size_bytes if plain else None),
        "memory": (known.memory_bytes, plain.memory_bytes if plain else None),
    }
    return {
        name: value / unit for name, (value, unit) in pairs.items() if value and unit and unit > 0
    }


def guiding_cost(candidate: Candidate, result: TuneResult) -> float | None:
    """The cost that guided the search, over that of the float engine; None where one is unknown."""
    costs = relative(candidate, result)
    if not all(costs.get(name, 0.0) > 0 for name in result.goal.minimise):
        return None
    logarithm = result.goal.log_cost(costs)
    return math.exp(max(-_LARGEST_EXPONENT, min(logarithm, _LARGEST_EXPONENT)))


def usable(result: TuneResult) -> tuple[Candidate, ...]:
    """The candidates that keep all limits: the accepted ones, and the float engine if it does."""
    return tuple(c for c in result.candidates if _usable(c, result))


def _usable(candidate: Candidate, result: TuneResult) -> bool:
    found = candidate.measurement
    if found is None:
        return False
    if candidate.verdict == "baseline":
        return not broken_by(candidate, goal=result.goal)
    return candidate.verdict == "accepted"
