"""Which recipe to try next: a few of each kind by their price, then where most is to be gained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise.recipe import Recipe
from equipoise.search.goal import Limited
from equipoise.search.space import BASELINE, AxisName, Point, Space
from equipoise.search.surrogate import (
    Coordinates,
    expected_improvement,
    fit_and_predict,
    probability_below,
)

_LEAST_GAIN: Final = 0.003
"""Expected gains below this share of the cost are not worth a trial."""

_HOPELESS: Final = 3.0
"""The excess that stands for a recipe that failed: far over any limit."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A recipe to try.

    Attributes:
        recipe: What.
        origin: What proposed it.
        point: Its place in the space; None for one beside it.
    """

    recipe: Recipe
    origin: str
    point: Point | None = None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of a recipe that was tried.

    Attributes:
        point: Its place in the space.
        log_cost: The one number that guides the search; None if it was not measured.
        excess: Limit -> by how much it is broken, 0 at the limit and below where it is kept; see
            :func:`scaled_excess`.
        failed: Whether it could not be measured.
    """

    point: Point
    log_cost: float | None = None
    excess: Mapping[Limited, float] | None = None
    failed: bool = False


def scaled_excess(quantity: Limited, *, allowed: float, found: float) -> float:
    """How far ``found`` is over what is ``allowed``, on a scale on which models can be fitted.

    Drops spread over decades, from a thousandth to the whole metric: their excess goes through an
    inverse hyperbolic sine, which is linear near the limit and logarithmic far from it.
    """
    if quantity in {"drop", "metric"}:
        over = found - allowed if quantity == "drop" else allowed - found
        unit = allowed if quantity == "drop" and allowed > 0 else 0.01
        return math.asinh(over / unit)
    return math.log(found / allowed)


class Proposer:
    """Proposes points of a space.

    Args:
        space: Where to look.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._points = list(space.points())
        self._starts = tuple(self._first_ones())
        self._coordinates = Coordinates(space)

    @property
    def starts(self) -> tuple[Proposal, ...]:
        """A few recipes of each kind, the cheapest first: training comes last."""
        return self._starts

    def _first_ones(self) -> Iterator[Proposal]:
        for labels in _starts(self._space):
            point = self._space.at(labels)
            yield Proposal(recipe=self._space.recipe(point), origin="start", point=point)

    def may_apply(self, point: Point | None) -> bool:
        """Whether nothing is known that makes ``point`` impossible."""
        return point is None or point in self._points

    def exclude(self, point: Point, *, applicable: Iterable[Point]) -> None:
        """Learn that the recipe at ``point`` changes nothing, or cannot be made of this model.

        Where another recipe that differs from it by one choice alone is possible, it is that choice
        that is not, whatever stands beside it; of several such choices the one on the last axis,
        which says the least. What cannot be pruned so far cannot be pruned further either.
        """
        known = set(applicable)
        for axis, index in reversed(list(enumerate(point))):
            other = self._space.canonical((*point[:axis], 0, *point[axis + 1 :]))
            if index and other in known:
                struck = self._struck(axis, index)
                self._points = [p for p in self._points if p[axis] not in struck]
                return
        self._points = [p for p in self._points if p != point]

    def exclude_same(self, point: Point, *, kept_db: float) -> None:
        """Learn how much of the signal static int8 at ``point`` keeps.

        Asked for that much, or for anything between that and what it was asked for, it makes the
        same engine again. Where it keeps less than it was asked for, nothing more can be had.
        """
        axis = self._index("kept")
        levels = [choice.value for choice in self._space.axes[axis].choices]
        asked = levels[point[axis]]
        most = kept_db if kept_db >= asked else math.inf
        same = {
            (*point[:axis], index, *point[axis + 1 :])
            for index, level in enumerate(levels)
            if index != point[axis] and min(asked, kept_db) < level <= most
        }
        self._points = [one for one in self._points if one not in same]

    def exclude_alike(self, point: Point, *, twin: Point) -> None:
        """Learn that the recipes at two points make the same engine.

        Where nothing but the ranges tells static int8 at ``point`` from its twin, they are
        taken to make no difference where at least as much is kept: more nodes are in float there.
        """
        ranges, kept = self._index("ranges"), self._index("kept")
        others = [i for i in range(len(point)) if i not in {ranges, kept}]
        if point[ranges] == twin[ranges] or any(point[i] != twin[i] for i in others):
            return
        levels = [choice.value for choice in self._space.axes[kept].choices]
        least = max(levels[point[kept]], levels[twin[kept]])
        same = {
            (*point[:kept], index, *point[kept + 1 :])
            for index, level in enumerate(levels)
            if level >= least
        }
        self._points = [one for one in self._points if one not in same]

    def _index(self, name: AxisName) -> int:
        return next(i for i, one in enumerate(self._space.axes) if one.name == name)

    def _struck(self, axis: int, index: int) -> set[int]:
        """Choices of an axis that are impossible when the one at ``index`` is."""
        found = self._space.axes[axis]
        positions = found.positions()
        if found.name != "model" or positions is None:
            return {index}
        return {i for i, position in enumerate(positions) if position >= positions[index]}

    def next(
        self,
        seen: Sequence[Seen],
        *,
        best: float | None,
        pending: Iterable[Point] = (),
        affordable: Callable[[Point], bool] = lambda _: True,
    ) -> Proposal | None:
        """The point of the largest expected gain, or None when none is worth a trial.

        Args:
            seen: What was tried.
            best: The least ``log_cost`` that keeps all limits; None while there is none.
            pending: Points that are being tried.
            affordable: Whether there is time for a point.
        """
        taken = {one.point for one in seen} | set(pending)
        open_points = [p for p in self._points if p not in taken and affordable(p)]
        priced = [one for one in seen if one.log_cost is not None]
        if not open_points or len(priced) < 2:
            return self._first(open_points)
        gains = self._gains(seen, priced, open_points, best=best)
        index = int(gains.argmax())
        if gains[index] < _LEAST_GAIN:
            return None
        return self._proposal(open_points[index])

    def _first(self, points: Sequence[Point]) -> Proposal | None:
        return self._proposal(points[0]) if points else None

    def _proposal(self, point: Point) -> Proposal:
        return Proposal(recipe=self._space.recipe(point), origin="model", point=point)

    def _gains(
        self,
        seen: Sequence[Seen],
        priced: Sequence[Seen],
        points: Sequence[Point],
        *,
        best: float | None,
    ) -> np.ndarray:
        """``[points]``: expected gain in log cost, times the chance to keep every limit."""
        costs = [one.log_cost or 0.0 for one in priced]
        cost = fit_and_predict(self._coordinates, [one.point for one in priced], costs, points)
        # Without a recipe that keeps all limits, any that does is a gain.
        limit = max(costs) if best is None else best
        gains = expected_improvement(cost, limit)
        for quantity in {name for one in seen for name in one.excess or {}}:
            known = [one for one in seen if one.failed or quantity in (one.excess or {})]
            values = [_HOPELESS if one.failed else (one.excess or {})[quantity] for one in known]
            excess = fit_and_predict(
                self._coordinates, [one.point for one in known], values, points
            )
            gains = gains * probability_below(excess, 0.0)
        found: np.ndarray = gains
        return found


def _starts(space: Space) -> Iterator[dict[AxisName, str]]:
    """Choices of the first recipes, by what they cost to make."""
    labels = {
        axis.name: [choice.label for choice in axis.choices if not choice.later]
        for axis in space.axes
    }
    precisions, fused = labels["precision"], "fused" in labels.get("graph", [])
    yield {"precision": BASELINE}
    if fused:
        yield {"precision": BASELINE, "graph": "fused"}
    for precision in precisions[1:]:
        yield {"precision": precision}
        if fused and precision in {"int8-dynamic", "int8-static"}:
            yield {"precision": precision, "graph": "fused"}
    for tables in labels.get("tables", [])[1:]:
        yield {"precision": "int8-dynamic", "tables": tables}
    for target in labels.get("target", [])[1:]:
        for precision in (BASELINE, "int8-weights", "int8-static"):
            yield {"target": target, "precision": precision}
    for model in labels.get("model", [])[1:]:
        for precision in (BASELINE, "int8-dynamic", "int8-static"):
            yield {"model": model, "precision": precision}
