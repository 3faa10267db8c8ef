"""The sweet spot among the accepted candidates, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from equipoise.measure.interval import Interval
from equipoise.search.result import Candidate, Measurement

_PARITY: Final = Interval(value=1.0, low=1.0, high=1.0)
"""The baseline's speed-up over itself. Its measured ratio is noise, and can miss 1 altogether."""

_SIZE_TIE: Final = 0.01
"""A hundredth of the size decides nothing on a device."""

_MEMORY_TIE: Final = 0.05
"""Peak memory of a process repeats to a few per cent; less is no difference."""


def measured(candidate: Candidate) -> Measurement:
    """The measurement of a candidate that has one."""
    if candidate.measurement is None:
        raise ValueError(f"{candidate.recipe.name} was not measured")
    return candidate.measurement


def speedup(candidate: Candidate) -> Interval:
    """Float latency over the candidate's: measured, but 1 by definition for the baseline."""
    return _PARITY if candidate.verdict == "baseline" else measured(candidate).speedup


def choose(candidates: Sequence[Candidate]) -> tuple[Candidate, str]:
    """The candidate at the sweet spot, and why, in words.

    Latency first. Candidates whose speed-up over float cannot be told apart from the fastest one's
    (their 95 % intervals overlap) are tied; among the tied the smallest wins, then the one with
    the least memory. An engine that is slower than float is never chosen.

    Args:
        candidates: All candidates; the baseline is among them.
    """
    usable = [c for c in candidates if c.verdict in {"baseline", "accepted"}]
    usable = [c for c in usable if speedup(c).high >= 1]
    fastest = max(usable, key=lambda c: speedup(c).value)
    tied = [c for c in usable if speedup(c).high >= speedup(fastest).low]
    chosen = _cheapest(tied)
    return chosen, _why(chosen, fastest=fastest, tied=tied)


def _cheapest(tied: Sequence[Candidate]) -> Candidate:
    """The smallest; of equally small ones the least memory; of those the truest outputs."""
    smallest = min(measured(c).size_bytes for c in tied)
    small = [c for c in tied if measured(c).size_bytes <= smallest * (1 + _SIZE_TIE)]
    least = min(measured(c).peak_memory_bytes for c in small)
    lean = [c for c in small if measured(c).peak_memory_bytes <= least * (1 + _MEMORY_TIE)]
    return max(lean, key=lambda c: min(p.cosine for p in measured(c).parity))


def _why(chosen: Candidate, *, fastest: Candidate, tied: Sequence[Candidate]) -> str:
    name, ratio = chosen.recipe.name, speedup(chosen).value
    if chosen.verdict == "baseline":
        return f"{name}: no accepted candidate is faster or smaller than plain float32"
    if len(tied) == 1:
        return f"{name} is the fastest candidate that keeps the metric ({ratio:.2f}x float)"
    others = ", ".join(c.recipe.name for c in tied if c is not chosen)
    lead = "the fastest" if chosen is fastest else "as fast as the fastest within the interval"
    return f"{name} is {lead} ({ratio:.2f}x float) and the smallest of the tied: {others}"


def pareto_front(candidates: Sequence[Candidate]) -> frozenset[str]:
    """Names of the accepted candidates that no other one beats in latency, size and metric."""
    usable = [c for c in candidates if c.verdict in {"baseline", "accepted"}]
    return frozenset(
        c.recipe.name for c in usable if not any(_dominates(other, c) for other in usable)
    )


def _dominates(left: Candidate, right: Candidate) -> bool:
    a, b = _axes(left), _axes(right)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _axes(candidate: Candidate) -> tuple[float, float, float]:
    found = measured(candidate)
    return -speedup(candidate).value, float(found.size_bytes), -found.metric.value
