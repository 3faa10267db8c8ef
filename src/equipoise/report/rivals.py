"""Who came next, and who would have cost less if it were allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from equipoise.report.figures import Figures, chosen, figures, guiding_cost, overlap, usable
from equipoise.report.rows import interval, size
from equipoise.search.goal import Quantity
from equipoise.search.result import Candidate, TuneResult

_TIES: Final = {"size": 0.01, "memory": 0.05}
"""What of size and memory is no difference: the latter repeats to a few per cent only."""

_WORSE: Final[dict[Quantity, str]] = {
    "latency": "slower", "size": "larger", "memory": "needs more memory"
}  # fmt: skip
_TIED: Final[dict[Quantity, str]] = {
    "latency": "as fast within the intervals", "size": "as large", "memory": "takes as much memory"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A candidate that was not chosen, and why not, in words."""

    name: str
    why_not: str


def runner_up(result: TuneResult) -> Rival | None:
    """The best of the others by the cost that guided the search."""
    best = chosen(result)
    others = [c for c in usable(result) if best is not None and c is not best]
    ranked = sorted(others, key=lambda c: _cost(c, result))
    if best is None or not ranked:
        return None
    return Rival(name=ranked[0].recipe.name, why_not=_why_not(ranked[0], best, result))


def cheapest_refused(result: TuneResult) -> Rival | None:
    """What would cost less than the choice, or least of all where there is none."""
    best = chosen(result)
    most = _cost(best, result) if best is not None else math.inf
    cheaper = [c for c in result.candidates if c.verdict == "refused" and _cost(c, result) < most]
    if not cheaper:
        return None
    cheapest = min(cheaper, key=lambda c: _cost(c, result))
    return Rival(name=cheapest.recipe.name, why_not=cheapest.reason)


def _cost(candidate: Candidate, result: TuneResult) -> float:
    cost = guiding_cost(candidate, result)
    return math.inf if cost is None else cost


def _why_not(rival: Candidate, best: Candidate, result: TuneResult) -> str:
    """In which cost it is worse, and in which ones before that it ties."""
    if result.goal.weights:
        ours, theirs = _cost(best, result), _cost(rival, result)
        return f"its weighted cost over that of float is {theirs:.3f}, against {ours:.3f}"
    tied: list[str] = []
    for quantity in result.goal.minimise:
        if not _ties(quantity, rival, best):
            worse = f"{_WORSE[quantity]} ({_against(quantity, figures(rival), figures(best))})"
            return f"{', '.join(tied)}, but {worse}" if tied else worse
        tied.append(_TIED[quantity])
    return f"tied with the choice in every cost ({', '.join(tied)})"


def _ties(quantity: Quantity, rival: Candidate, best: Candidate) -> bool:
    """Whether they cannot be told apart, or the rival is the better one, in this cost."""
    ours, theirs = figures(best), figures(rival)
    if quantity == "latency":
        return not (ours.ratio and theirs.ratio) or overlap(ours.ratio, theirs.ratio)
    known, other = _bytes(quantity, ours), _bytes(quantity, theirs)
    return other <= known * (1 + _TIES[quantity])


def _bytes(quantity: Quantity, found: Figures) -> int:
    return (found.size_bytes if quantity == "size" else found.memory_bytes) or 0


def _against(quantity: Quantity, rival: Figures, best: Figures) -> str:
    if quantity != "latency":
        return f"{size(_bytes(quantity, rival))} against {size(_bytes(quantity, best))}"
    parts = [interval(f.ratio, digits=2) if f.ratio else "unknown" for f in (rival, best)]
    return f"{parts[0]} against {parts[1]} of float"
