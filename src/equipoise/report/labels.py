"""Where names stand beside their marks in a plot, so that none covers another one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

_WIDTH, _HEIGHT = 900.0, 360.0
"""Of a plot in pixels, on a page of usual width."""

_CHARACTER, _LINE = 6.4, 15.0
"""Of a name in pixels."""

_MARK: Final = 14.0
_LEADERS: Final = (32, 46, 60, 74, 88)
"""Lengths of the leaders from marks to names, in pixels."""

_AT_EDGE: Final = 0.2
"""So near to an edge of the plot, as a share of its height, a leader goes the other way."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a mark is, as shares of the plot from its lower left corner.

    Attributes:
        x: Across.
        y: Up.
    """

    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Leader:
    """From a mark to the middle of its name, in pixels; right and down are above zero."""

    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class _Box:
    x: float
    y: float
    width: float
    height: float

    def covers(self, other: _Box) -> bool:
        beside = abs(self.x - other.x) * 2 >= self.width + other.width
        apart = abs(self.y - other.y) * 2 >= self.height + other.height
        return not (beside or apart)


def leaders(names: Sequence[tuple[str, Place]], *, marks: Sequence[Place]) -> list[Leader | None]:
    """One for each name; None where there is no room for it that covers no other name or mark.

    The first name is shown in any case.

    Args:
        names: What is to be read, the most important first, and the place of its mark.
        marks: All marks of the plot.
    """
    taken = [_Box(x=m.x * _WIDTH, y=-m.y * _HEIGHT, width=_MARK, height=_MARK) for m in marks]
    found: list[Leader | None] = []
    for number, (text, place) in enumerate(names):
        ways = list(_ways(text, place))
        free = [w for w in ways if not any(_box(text, place, w).covers(box) for box in taken)]
        chosen = next(iter(free or (ways if number == 0 else [])), None)
        found.append(chosen)
        if chosen is not None:
            taken.append(_box(text, place, chosen))
    return found


def _ways(text: str, place: Place) -> Iterator[Leader]:
    """Short ones first; the name stays inside of the plot."""
    half = min(len(text) * _CHARACTER, _WIDTH) / 2
    x = min(max(place.x * _WIDTH, half), _WIDTH - half) - place.x * _WIDTH
    signs = [-1] * (place.y < 1 - _AT_EDGE) + [1] * (place.y > _AT_EDGE)
    for length, sign in itertools.product(_LEADERS, signs):
        yield Leader(x=x, y=sign * length)


def _box(text: str, place: Place, leader: Leader) -> _Box:
    x, y = place.x * _WIDTH + leader.x, leader.y - place.y * _HEIGHT
    return _Box(x=x, y=y, width=len(text) * _CHARACTER, height=_LINE)
