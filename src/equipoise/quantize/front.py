"""The front of noise against time: the fastest choice of precisions for each of a few budgets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from equipoise.quantize.borders import LatencyModel
from equipoise.quantize.knapsack import Choice, fastest

_LEAST_SHARE: Final = 1e-3
"""Of the noise of the fastest choice: 30 dB below it nothing is left to gain."""

_MOST_SOLVED: Final = 60
_CLOSE: Final = 1.02
"""Budgets nearer than by this factor have no choice between them that is worth a plan."""


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A choice, and the least budget that is known to give it."""

    budget: float
    choice: Choice


def front(
    model: LatencyModel, noise: Mapping[str, float], *, worth_ms: Mapping[str, float], count: int
) -> tuple[Choice, ...]:
    """Choices spread evenly along the front, the fastest first, each less noisy than the last.

    Budgets of noise are halved, as decibels are, where the front has its largest gap.

    Args:
        model: What each choice costs.
        noise: Node -> noise power that it makes in integers.
        worth_ms: As of :func:`~equipoise.quantize.knapsack.fastest`.
        count: Most choices. The one with nothing in integers is none.
    """
    return _Front(model, noise, worth_ms=worth_ms).spread(count)


class _Front:
    def __init__(
        self, model: LatencyModel, noise: Mapping[str, float], *, worth_ms: Mapping[str, float]
    ) -> None:
        self._model, self._noise, self._worth = model, noise, worth_ms

    def spread(self, count: int) -> tuple[Choice, ...]:
        first = self._at(math.inf)
        last = self._at(first.noise * _LEAST_SHARE)
        points = [_Point(budget=first.noise, choice=first)]
        if last.integers != first.integers:
            points.append(_Point(budget=first.noise * _LEAST_SHARE, choice=last))
        for _ in range(_MOST_SOLVED):
            gap = self._widest(points)
            if gap is None or self._useful(points) >= count:
                break
            self._halve(points, gap)
        return tuple(p.choice for p in points if p.choice.integers)[:count]

    def _at(self, budget: float) -> Choice:
        return fastest(self._model, self._noise, most_noise=budget, worth_ms=self._worth)

    def _useful(self, points: list[_Point]) -> int:
        return sum(bool(point.choice.integers) for point in points)

    def _widest(self, points: list[_Point]) -> int | None:
        """The index of the point before the widest gap; None when no gap is left."""
        span_ms = points[-1].choice.ms - points[0].choice.ms or 1.0
        gaps = [
            math.hypot(
                (right.choice.ms - left.choice.ms) / span_ms,
                math.log(left.budget / right.budget) / -math.log(_LEAST_SHARE),
            )
            if left.choice.noise > right.budget * _CLOSE
            else 0.0
            for left, right in itertools.pairwise(points)
        ]
        return gaps.index(max(gaps)) if gaps and max(gaps) > 0 else None

    def _halve(self, points: list[_Point], gap: int) -> None:
        """Put a point between two; where there is none, move the one that the middle belongs to."""
        left, right = points[gap], points[gap + 1]
        middle = math.sqrt(left.choice.noise * right.budget)
        choice = self._at(middle)
        point = _Point(budget=middle, choice=choice)
        if choice.integers == right.choice.integers:
            points[gap + 1] = point
        else:
            points.insert(gap + 1, point)
