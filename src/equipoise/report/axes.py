"""What can be put on an axis of a plot: values with intervals, the limit, the part in view."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from equipoise.measure.interval import Interval
from equipoise.report.figures import baseline, exactly, figures
from equipoise.search.result import Candidate, TuneResult

Key = Literal["metric", "latency", "size", "memory"]

_MEGABYTE: Final = 1e6
_AROUND: Final = 0.6
"""How far the view goes beyond the usable candidates, in lengths of what they span."""

_EDGE: Final = 0.07
_FEWEST: Final = 4
_FLAT: Final = 0.02
"""A span of nothing is taken as this share of the value."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis.

    Attributes:
        key: What is on it.
        title: With its unit.
        short: In a phrase: ``latency``.
        rising: Whether more is better.
    """

    key: Key
    title: str
    short: str
    rising: bool = False

    def of(self, candidate: Candidate) -> Interval | None:
        """Where the candidate lies; None where that is not known."""
        known = figures(candidate)
        if self.key == "metric":
            return known.metric
        if self.key == "latency":
            return known.ratio
        count = known.size_bytes if self.key == "size" else known.memory_bytes
        return None if count is None else exactly(count / _MEGABYTE)

    def limit(self, result: TuneResult) -> float | None:
        """What is allowed at most, or of the metric at least, in the unit of the axis."""
        goal = result.goal
        if self.key == "metric":
            return _least_metric(result)
        if self.key == "latency":
            return _most_latency(result)
        most = goal.max_size_bytes if self.key == "size" else goal.max_memory_bytes
        return None if most is None else most / _MEGABYTE

    def gain(self, value: float) -> float:
        """The value so that more is better."""
        return value if self.rising else -value


def axis(key: Key, *, metric: str) -> Axis:
    """The axis of ``key``."""
    if key == "metric":
        return Axis(key=key, title=metric, short=metric, rising=True)
    titles = {
        "latency": "latency / latency of float, interleaved",
        "size": "size on disk, MB",
        "memory": "peak memory, MB",
    }
    return Axis(key=key, title=titles[key], short=key)


def _least_metric(result: TuneResult) -> float | None:
    goal, reference = result.goal, result.reference_metric.value
    least = [reference - goal.max_drop] if goal.max_drop is not None else []
    least += [goal.min_metric] if goal.min_metric is not None else []
    return max(least, default=None)


def _most_latency(result: TuneResult) -> float | None:
    """The limit in milliseconds over what the float engine takes."""
    base, most = baseline(result), result.goal.max_latency_ms
    known = figures(base).latency_ms if base is not None else None
    return most / known.value if most is not None and known and known.value > 0 else None


def view(
    everything: Sequence[Interval], *, usable: Sequence[Interval], limit: float | None
) -> tuple[float, float]:
    """The part of an axis to show at first: the usable candidates and what is not far from them.

    One engine that collapsed would press all others into a line.

    Args:
        everything: All candidates on the axis, at least one.
        usable: Those that keep the limits; where there is none, all but the outliers count.
        limit: The limit on the axis.
    """
    core = usable or _without_outliers(everything)
    low, high = min(v.low for v in core), max(v.high for v in core)
    span = high - low or abs(high) * _FLAT or 1.0
    near = [v for v in everything if low - _AROUND * span <= v.value <= high + _AROUND * span]
    low, high = min([low, *(v.low for v in near)]), max([high, *(v.high for v in near)])
    if limit is not None and low - span <= limit <= high + span:
        low, high = min(low, limit), max(high, limit)
    edge = _EDGE * (high - low or span)
    return low - edge, high + edge


def _without_outliers(values: Sequence[Interval]) -> list[Interval]:
    """Those within 1.5 interquartile ranges of the quartiles (Tukey, 1977, ch. 2)."""
    if len(values) < _FEWEST:
        return list(values)
    low, _, high = statistics.quantiles((v.value for v in values), n=4, method="inclusive")
    reach = 1.5 * (high - low)
    return [v for v in values if low - reach <= v.value <= high + reach]
