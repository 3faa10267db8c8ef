"""Verdicts: may a candidate be used, and in words why."""

from __future__ import annotations

from typing import Final

from equipoise.measure.interval import Interval
from equipoise.quantize.schemes import WeightOnlyInt8
from equipoise.recipe import Recipe
from equipoise.search.result import Measurement, Verdict

_COLLAPSE: Final = 0.5
"""A candidate that loses half of the metric has collapsed, not drifted."""


def judge(measured: Measurement, *, recipe: Recipe, max_drop: float) -> tuple[Verdict, str]:
    """The verdict on a measured candidate, and the reason in words.

    A candidate is accepted when its drop is shown to be at most ``max_drop``: the one-sided 95 %
    bound of the paired drop, not the drop itself. An accepted int8 engine that is slower than
    float is still no candidate for speed; ``choose`` sees to that.
    """
    drop = measured.drop
    if drop.high > max_drop:
        return "refused", _refusal(drop, measured.metric, max_drop=max_drop)
    return "accepted", f"{_kept(drop, max_drop=max_drop)}; {_speed_words(measured, recipe)}"


def _refusal(drop: Interval, metric: Interval, *, max_drop: float) -> str:
    if drop.value > _COLLAPSE * (metric.value + drop.value):
        return f"collapsed: the metric falls by {drop.value:.3f} to {metric.value:.3f}"
    if drop.value > max_drop:
        return f"drops by {drop.value:.4f}; allowed {max_drop:g}"
    return (
        f"drops by {drop.value:.4f}, but up to {drop.high:.4f} cannot be ruled out at 95 %;"
        f" allowed {max_drop:g}"
    )


def _kept(drop: Interval, *, max_drop: float) -> str:
    return f"drop {drop.value:+.4f}, at most {drop.high:.4f} at 95 % (allowed {max_drop:g})"


def _speed_words(measured: Measurement, recipe: Recipe) -> str:
    speedup = measured.speedup
    if speedup.low > 1:
        return f"{speedup.value:.2f}x as fast as float"
    if speedup.high < 1:
        return f"slower than float ({speedup.value:.2f}x): not chosen for speed"
    same = "as fast as float"
    stored = isinstance(recipe.quantization, WeightOnlyInt8)
    return f"{same}, by design smaller only" if stored else f"{same}: not chosen for speed"
