"""The sweet spot among the accepted candidates, the Pareto front, and what limits cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from equipoise.measure.interval import Interval
from equipoise.search.goal import Goal, Limit, Quantity
from equipoise.search.result import Candidate, Measurement, Price
from equipoise.search.verdict import broken

_PARITY: Final = Interval(value=1.0, low=1.0, high=1.0)
"""The baseline's speed-up over itself. Its measured ratio is noise, and can miss 1 altogether."""

_TIES: Final[dict[Quantity, float]] = {"latency": 0.05, "size": 0.01, "memory": 0.05}
"""A hundredth of the size decides nothing on a device; peak memory repeats to a few per cent.
Latencies tie where their intervals overlap, if they are so near: what is hardly known is not
equal."""

Relative = dict[Quantity, float]
"""Cost -> its value over that of the float engine."""

_USABLE: Final = frozenset({"baseline", "accepted"})


def measured(candidate: Candidate) -> Measurement:
    """The measurement of a candidate that has one."""
    if candidate.measurement is None:
        raise ValueError(f"{candidate.recipe.name} was not measured")
    return candidate.measurement


def broken_by(candidate: Candidate, *, goal: Goal) -> tuple[Limit, ...]:
    """The limits that a measured candidate does not keep."""
    return broken(goal, measured(candidate), proven=candidate.verdict == "baseline")


def speedup(candidate: Candidate) -> Interval:
    """Float latency over the candidate's: measured, but 1 by definition for the baseline."""
    return _PARITY if candidate.verdict == "baseline" else measured(candidate).speedup


def relative(candidate: Candidate, *, baseline: Measurement) -> Relative:
    """Each cost over that of the float engine."""
    found = measured(candidate)
    return {
        "latency": 1 / speedup(candidate).value,
        "size": found.size_bytes / baseline.size_bytes,
        "memory": found.peak_memory_bytes / baseline.peak_memory_bytes,
    }


def choose(candidates: Sequence[Candidate], *, goal: Goal) -> tuple[Candidate, str] | None:
    """The candidate at the sweet spot, and why, in words; None when none keeps all limits.

    With an order of costs: those that cannot be told apart from the best in the first cost are
    tied; among them the next cost decides, and so on; of the tied in all, the truest outputs. With
    weights: the least product of powers, ties as in the latency. An engine that is slower than
    float is never chosen for its latency.

    Args:
        candidates: All candidates; the baseline is the one with the verdict ``baseline``, or none
            where it does not keep the limits itself.
        goal: What is asked for.
    """
    usable = [c for c in candidates if c.verdict in _USABLE and not broken_by(c, goal=goal)]
    if goal.minimise[0] == "latency":
        usable = [c for c in usable if speedup(c).high >= 1] or usable
    if not usable:
        return None
    if goal.weights:
        return _lightest(usable, candidates, goal=goal)
    tied, best = usable, usable[0]
    for rank, quantity in enumerate(goal.minimise):
        least = min(tied, key=_value(quantity))
        tied = [c for c in tied if _ties(c, least, quantity)]
        best = least if rank == 0 else best
    chosen = max(tied, key=_truth) if len(goal.minimise) > 1 else best
    return chosen, _why(chosen, best=best, usable=usable, goal=goal)


def _lightest(
    usable: Sequence[Candidate], candidates: Sequence[Candidate], *, goal: Goal
) -> tuple[Candidate, str]:
    baseline = next(measured(c) for c in candidates if c.measurement is not None)

    def cost(candidate: Candidate) -> float:
        return goal.log_cost(relative(candidate, baseline=baseline))

    chosen = min(usable, key=cost)
    powers = " x ".join(f"{name}^{power:g}" for name, power in goal.powers.items())
    return chosen, (
        f"{chosen.recipe.name} has the least {powers} ({math.exp(cost(chosen)):.3f} of float)"
        f" of {len(usable)} candidates that keep all limits"
    )


def _value(quantity: Quantity) -> Callable[[Candidate], float]:
    values: Mapping[Quantity, Callable[[Candidate], float]] = {
        "latency": lambda c: 1 / speedup(c).value,
        "size": lambda c: measured(c).size_bytes,
        "memory": lambda c: measured(c).peak_memory_bytes,
    }
    return values[quantity]


def _ties(candidate: Candidate, least: Candidate, quantity: Quantity) -> bool:
    value = _value(quantity)
    if quantity == "latency" and speedup(candidate).high < speedup(least).low:
        return False
    return value(candidate) <= value(least) * (1 + _TIES[quantity])


def _truth(candidate: Candidate) -> float:
    return min((p.cosine for p in measured(candidate).parity), default=0.0)


def _why(chosen: Candidate, *, best: Candidate, usable: Sequence[Candidate], goal: Goal) -> str:
    name, first = chosen.recipe.name, goal.minimise[0]
    if chosen.verdict == "baseline":
        return f"{name}: no candidate that keeps all limits is better than plain float32"
    tied = [c for c in usable if _ties(c, best, first)]
    words = {"latency": "fastest", "size": "smallest", "memory": "leanest"}
    figure = f"({speedup(chosen).value:.2f}x float)"
    if len(tied) == 1:
        return f"{name} is the {words[first]} candidate that keeps all limits {figure}"
    others = ", ".join(c.recipe.name for c in tied if c is not chosen)
    lead = f"the {words[first]}" if chosen is best else f"level with the {words[first]}"
    then = ", then ".join(words[quantity] for quantity in goal.minimise[1:]) or "truest"
    return f"{name} is {lead} {figure}, and the {then} of those that tie: {others}"


def pareto_front(candidates: Sequence[Candidate]) -> frozenset[str]:
    """Names of the accepted candidates that no other one beats in latency, size and metric."""
    usable = [c for c in candidates if c.verdict in _USABLE and c.measurement is not None]
    return frozenset(
        c.recipe.name for c in usable if not any(_dominates(other, c) for other in usable)
    )


def _dominates(left: Candidate, right: Candidate) -> bool:
    a, b = _axes(left), _axes(right)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _axes(candidate: Candidate) -> tuple[float, float, float]:
    found = measured(candidate)
    return -speedup(candidate).value, float(found.size_bytes), -found.metric.value


def nearest(candidates: Sequence[Candidate], *, goal: Goal) -> Candidate | None:
    """The candidate that is nearest to keeping all limits: it breaks the fewest, by the least."""

    def distance(candidate: Candidate) -> tuple[int, float]:
        over = broken_by(candidate, goal=goal)
        return len(over), sum(map(_excess, over))

    whole = [c for c in candidates if c.measurement is not None]
    return min(whole, key=distance, default=None)


def _excess(limit: Limit) -> float:
    return abs(limit.found - limit.allowed) / max(abs(limit.allowed), 1e-9)


def prices(
    candidates: Sequence[Candidate], chosen: Candidate | None, *, goal: Goal
) -> tuple[Price, ...]:
    """For each limit, the least relaxation of it alone that would give a lower cost.

    Between candidates that were measured, so a price is what is known to be had for it.
    """
    baseline = next(measured(c) for c in candidates if c.measurement is not None)
    first = goal.minimise[0]
    now = None if chosen is None else relative(chosen, baseline=baseline)[first]
    found: dict[str, Price] = {}
    for candidate in candidates:
        over = broken_by(candidate, goal=goal) if candidate.measurement is not None else ()
        if len(over) != 1 or candidate is chosen:
            continue
        then = relative(candidate, baseline=baseline)[first]
        known = found.get(over[0].quantity)
        gains = now is None or then < now
        if gains and (known is None or _excess(over[0]) < _excess(known.limit)):
            found[over[0].quantity] = Price(
                limit=over[0],
                candidate=candidate.recipe.name,
                cost=first,
                now=now,
                then=then,
            )
    return tuple(found.values())
