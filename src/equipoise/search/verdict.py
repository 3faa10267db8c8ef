"""Verdicts: may a candidate be used, and in words why."""

from __future__ import annotations

from typing import Final

from equipoise.measure.interval import Interval
from equipoise.quantize.schemes import WeightOnlyInt8
from equipoise.recipe import Recipe
from equipoise.search.goal import Goal, Limit, Limited
from equipoise.search.result import Measurement, Verdict

_COLLAPSE: Final = 0.5
"""A candidate that loses half of the metric has collapsed, not drifted."""


def limits(goal: Goal, measured: Measurement, *, proven: bool = False) -> tuple[Limit, ...]:
    """All limits of ``goal`` beside what was measured.

    Args:
        goal: The limits.
        measured: What was measured.
        proven: Whether the engine gives the numbers of the source, as the float engine does: its
            parity is a proof, and what was counted stands without a bound for what was not seen.
    """
    drop = measured.drop.value if proven else measured.drop.high
    metric = measured.metric.value if proven else measured.metric_bound
    pairs: tuple[tuple[Limited, float | None, float], ...] = (
        ("drop", goal.max_drop, drop),
        ("metric", goal.min_metric, metric),
        ("latency", goal.max_latency_ms, measured.latency_ms.high),
        ("size", goal.max_size_bytes, measured.size_bytes),
        ("memory", goal.max_memory_bytes, measured.peak_memory_bytes),
    )
    return tuple(
        Limit(quantity=quantity, allowed=allowed, found=found)
        for quantity, allowed, found in pairs
        if allowed is not None
    )


def broken(goal: Goal, measured: Measurement, *, proven: bool = False) -> tuple[Limit, ...]:
    """The limits that are not kept; see :func:`limits`."""
    return tuple(limit for limit in limits(goal, measured, proven=proven) if not limit.kept)


def judge(measured: Measurement, *, recipe: Recipe, goal: Goal) -> tuple[Verdict, str]:
    """The verdict on a measured candidate, and the reason in words.

    A candidate is accepted when it is shown to keep all limits: by the upper bound of its paired
    drop, not the drop itself. An accepted int8 engine that is slower than float is still no
    candidate for speed; ``choose`` sees to that.
    """
    over = broken(goal, measured)
    if over:
        return "refused", "; ".join(_refusal(limit, measured, goal=goal) for limit in over)
    kept = _kept(measured, goal=goal)
    return "accepted", f"{kept}; {_speed_words(measured, recipe)}"


def _refusal(limit: Limit, measured: Measurement, *, goal: Goal) -> str:
    if limit.quantity == "drop":
        return _lost(measured.drop, measured.metric, limit=limit, goal=goal)
    if limit.quantity == "metric":
        return (
            f"the metric is {measured.metric.value:.4f}, and at least {limit.found:.4f}"
            f" {_certainty(goal)}; wanted {limit.allowed:g}"
        )
    if limit.quantity == "latency":
        return f"takes up to {limit.found:.3f} ms; allowed {limit.allowed:g} ms"
    where = "on disk" if limit.quantity == "size" else "of memory"
    return f"takes {limit.found / 1e6:.2f} MB {where}; allowed {limit.allowed / 1e6:g} MB"


def _lost(drop: Interval, metric: Interval, *, limit: Limit, goal: Goal) -> str:
    if drop.value > _COLLAPSE * (metric.value + drop.value):
        return f"collapsed: the metric falls by {drop.value:.3f} to {metric.value:.3f}"
    if drop.value > limit.allowed:
        return f"drops by {drop.value:.4f}; allowed {limit.allowed:g}"
    return (
        f"drops by {drop.value:.4f}, but up to {drop.high:.4f} cannot be ruled out"
        f" {_certainty(goal)}; allowed {limit.allowed:g}"
    )


def _kept(measured: Measurement, *, goal: Goal) -> str:
    drop = measured.drop
    words = f"drop {drop.value:+.4f}, at most {drop.high:.4f} {_certainty(goal)}"
    return words if goal.max_drop is None else f"{words} (allowed {goal.max_drop:g})"


def _certainty(goal: Goal) -> str:
    return f"at {100 * goal.confidence:g} %"


def _speed_words(measured: Measurement, recipe: Recipe) -> str:
    speedup = measured.speedup
    if speedup.low > 1:
        return f"{speedup.value:.2f}x as fast as float"
    if speedup.high < 1:
        return f"slower than float ({speedup.value:.2f}x): not chosen for speed"
    same = "as fast as float"
    stored = isinstance(recipe.quantization, WeightOnlyInt8)
    return f"{same}, by design smaller only" if stored else f"{same}: not chosen for speed"
