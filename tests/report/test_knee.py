"""The knee of curves whose knee is known."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from equipoise.report.knee import front, knee


def curve(function, *, low: float, high: float, count: int) -> list[tuple[float, float]]:
    xs = [low + (high - low) * i / (count - 1) for i in range(count)]
    return [(x, function(x)) for x in xs]


def test_the_knee_of_the_square_root_is_where_its_slope_is_that_of_the_chord() -> None:
    """The derivative of sqrt(x) - x is zero at a quarter."""
    points = curve(math.sqrt, low=0.0, high=1.0, count=101)
    found = knee(points)
    assert found is not None
    assert points[found][0] == 0.25


def test_the_knee_of_the_published_example() -> None:
    """Satopaa et al., figure 2: y = 5 - 1 / (x + 0.1) at ten points of [0, 1] bends at 0.22."""
    points = curve(lambda x: 5 - 1 / (x + 0.1), low=0.0, high=1.0, count=10)
    found = knee(points)
    assert found is not None
    assert round(points[found][0], 2) == 0.22


def test_units_and_order_do_not_matter() -> None:
    """Bytes or megabytes, sorted or not: the same point."""
    points = curve(math.sqrt, low=0.0, high=1.0, count=21)
    scaled = [(1e6 * x + 7, 0.001 * y - 3) for x, y in points]
    shuffled = random.Random(1).sample(scaled, len(scaled))
    first, second = knee(scaled), knee(shuffled)
    assert first is not None
    assert second is not None
    assert scaled[first] == shuffled[second]


def test_what_another_point_beats_is_never_the_knee() -> None:
    """A point far above the chord's foot but worse in both than a neighbour."""
    points = [(0.0, 0.0), (0.2, 0.8), (0.3, 0.79), (1.0, 1.0)]
    assert front(points) == (0, 1, 3)
    assert knee(points) == 1


def test_no_knee_without_a_bend() -> None:
    """Too few points, a straight front, and one that bends the other way."""
    assert knee([]) is None
    assert knee([(0.0, 0.0), (1.0, 1.0)]) is None
    assert knee([(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]) is None
    assert knee(curve(lambda x: x * x, low=0.0, high=1.0, count=11)) is None
    assert knee([(1.0, 1.0)] * 5) is None


COORDINATE = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))


@given(st.lists(st.tuples(COORDINATE, COORDINATE), max_size=30))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    """Against the definition, over all pairs; equal points count once."""

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] >= a[1] and b != a for b in points)

    kept = [points[i] for i in front(points)]
    assert set(kept) == {a for a in points if not beaten(a)}
    assert kept == sorted(set(kept))
    found = knee(points)
    assert found is None or points[found] in kept[1:-1]
