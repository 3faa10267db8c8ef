"""The Pareto front in two dimensions, and its knee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

Point = tuple[float, float]
"""A cost, the less the better, and a gain, the more the better."""

_FEWEST: Final = 3
_STRAIGHT: Final = 1e-9


def front(points: Sequence[Point]) -> tuple[int, ...]:
    """Indices of the points that no other one beats in both, from the least cost on."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept: list[int] = []
    for index in order:
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return tuple(kept)


def knee(points: Sequence[Point]) -> int | None:
    """Index of the point of the front beyond which a gain costs more than before.

    With both axes scaled to the front, it is the point farthest above the chord between the ends
    (Satopaa et al., Finding a "Kneedle" in a Haystack, ICDCSW 2011). It says where the front bends,
    and nothing of what a user asked for.

    Args:
        points: Costs and gains, in any order; those that another one beats are left out.

    Returns:
        None when the front has fewer than three points, or none above the chord.
    """
    kept = front(points)
    if len(kept) < _FEWEST:
        return None
    heights = _above_chord([points[i] for i in kept])
    highest = max(heights)
    return kept[heights.index(highest)] if highest > _STRAIGHT else None


def _above_chord(curve: Sequence[Point]) -> list[float]:
    """Distance of each point from the chord in the unit square, negative below it."""
    (left, low), (right, high) = curve[0], curve[-1]
    return [
        ((gain - low) / (high - low) - (cost - left) / (right - left)) / math.sqrt(2)
        for cost, gain in curve
    ]
