"""Limits, goals and shadow prices in words."""

from __future__ import annotations

from typing import Final

from equipoise.report.rows import fine, size
from equipoise.search.goal import Goal, Limit, Limited
from equipoise.search.result import Price, TuneResult

_LIMITED: Final[dict[Limited, str]] = {
    "latency": "latency", "size": "size on disk", "memory": "peak memory"
}  # fmt: skip
_NO_BREAK: Final = "\N{NO-BREAK SPACE}"
_KEPT: Final = f"\n{_NO_BREAK}"


def clean(text: str) -> str:
    """Text of a file with nothing in it that moves the cursor of a terminal; lines stay lines."""
    return "".join(c if c.isprintable() or c in _KEPT else " " for c in text)


def plain(text: str) -> str:
    """The same on one line."""
    return " ".join(clean(text).split("\n")).strip(" ")


def sentence(text: str) -> str:
    """``text`` with a full stop; names keep their first letter, and nothing stays nothing."""
    told = plain(text)
    return told if not told or told.endswith((".", "!", "?")) else f"{told}."


def percent(share: float, *, digits: int = 0) -> str:
    """``68 %``."""
    return f"{100 * share:.{digits}f}{_NO_BREAK}%"


def amount(quantity: Limited, value: float) -> str:
    """A value of what is limited, in its unit."""
    if quantity == "latency":
        return f"{value:.{fine(value)}f}{_NO_BREAK}ms"
    return size(value) if quantity in {"size", "memory"} else f"{value:.4f}"


def allowance(quantity: Limited, value: float) -> str:
    """A limit as the user wrote it."""
    if quantity == "latency":
        return f"{value:g}{_NO_BREAK}ms"
    return size(value) if quantity in {"size", "memory"} else f"{value:g}"


def limited(quantity: Limited, *, metric: str) -> str:
    """What is limited, as a noun."""
    if quantity == "drop":
        return f"drop of {metric}"
    return metric if quantity == "metric" else _LIMITED[quantity]


def limit_words(limit: Limit, *, metric: str) -> str:
    """``latency: 5.200 ms found, at most 5 ms allowed``."""
    side = "at least" if limit.quantity == "metric" else "at most"
    found, allowed = amount(limit.quantity, limit.found), allowance(limit.quantity, limit.allowed)
    what = limited(limit.quantity, metric=metric)
    return f"{what}: {found} found, {side} {allowed} allowed ({_distance(limit)})"


def _distance(limit: Limit) -> str:
    """How far what was found lies from the limit."""
    gap = abs(limit.found - limit.allowed)
    if limit.quantity in {"drop", "metric"}:
        return f"{_points(gap)} away"
    return f"{percent(gap / limit.allowed)} away" if limit.allowed > 0 else "away"


def _points(gap: float) -> str:
    """A difference of a metric in points, hundredths of it."""
    return f"{100 * gap:.{1 if gap >= 0.001 else 2}f} points"


def goal_words(goal: Goal, *, metric: str) -> tuple[str, ...]:
    """What was asked for, one phrase each: limits, then what is least."""
    limits: tuple[tuple[Limited, float | None], ...] = (
        ("drop", goal.max_drop),
        ("metric", goal.min_metric),
        ("latency", goal.max_latency_ms),
        ("size", goal.max_size_bytes),
        ("memory", goal.max_memory_bytes),
    )
    asked = [
        f"{limited(name, metric=metric)} {'at least' if name == 'metric' else 'at most'}"
        f" {allowance(name, value)}"
        for name, value in limits
        if value is not None
    ]
    return (*asked, f"least {minimised(goal)}", f"confidence {goal.confidence:.3g}")


def minimised(goal: Goal) -> str:
    """What is to be least: an order, or a product of powers."""
    if not goal.weights:
        return ", then ".join(goal.minimise)
    powers = zip(goal.minimise, goal.weights, strict=False)
    return " x ".join(f"{name}^{power:g}" for name, power in powers)


def price_words(price: Price, result: TuneResult) -> str:
    """What relaxing a limit would buy, as one sentence."""
    name, relaxed = plain(price.candidate), _relaxed(price.limit, metric=result.metric)
    if price.now is None:
        at = f"{price.then:.2f} of the {price.cost} of float"
        return f"{relaxed}, {name} would keep all limits, at {at}."
    step = f"from {price.now:.2f} to {price.then:.2f} of float"
    return f"{relaxed}, {price.cost} would go {step}: {name}."


def _relaxed(limit: Limit, *, metric: str) -> str:
    """``With 0.4 points more drop of accuracy (0.0140 instead of 0.01)``."""
    what = plain(limited(limit.quantity, metric=metric))
    found, allowed = amount(limit.quantity, limit.found), allowance(limit.quantity, limit.allowed)
    if limit.quantity not in {"drop", "metric"}:
        return f"With a limit of {found} instead of {allowed} for the {what}"
    step = _points(abs(limit.found - limit.allowed))
    way = "less" if limit.quantity == "metric" else "more"
    return f"With {step} {way} {what} ({found} instead of {allowed})"
