"""Names in a plot: each is inside of it, and none covers another one or a mark."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from equipoise.report.labels import Leader, Place, leaders

SHARES = st.floats(0, 1)
PLACES = st.builds(lambda x, y: Place(x=x, y=y), SHARES, SHARES)
NAMES = st.lists(st.tuples(st.text("ab-", min_size=1, max_size=60), PLACES), max_size=8)


def middle(place: Place, leader: Leader) -> tuple[float, float]:
    """Of a name on a page that is 900 pixels wide; y goes down."""
    return 900 * place.x + leader.x, leader.y - 360 * place.y


@given(names=NAMES)
def test_no_name_covers_another(names: list[tuple[str, Place]]) -> None:
    """Nor a mark, but for the first one, which has to be somewhere."""
    found = leaders(names, marks=[place for _, place in names])
    shown = [(t, middle(p, at)) for (t, p), at in zip(names, found, strict=True) if at]
    for (text, (x, y)), (other, (x2, y2)) in itertools.combinations(shown, 2):
        beside = abs(x - x2) >= 3.2 * (len(text) + len(other)) - 1e-6
        assert beside or abs(y - y2) >= 15 - 1e-6
    for (text, (x, y)), (_, place) in itertools.product(shown[1:], names):
        beside = abs(x - 900 * place.x) >= 3.2 * len(text) + 7 - 1e-6
        assert beside or abs(y + 360 * place.y) >= 14.5 - 1e-6


@given(names=NAMES.filter(bool))
def test_the_first_name_is_always_there_and_inside(names: list[tuple[str, Place]]) -> None:
    """What is most important is shown wherever it is; others where there is room."""
    (text, place), leader = names[0], leaders(names, marks=[])[0]
    assert leader is not None
    x, y = middle(place, leader)
    half = 3.2 * len(text)
    assert half - 1e-6 <= x <= 900 - half + 1e-6
    assert -360 < y < 0


def test_names_of_a_crowd_are_left_out() -> None:
    """Twenty names at one place have no room; hovers tell them."""
    crowd = [("pruned-1.6x-int8-dynamic", Place(x=0.5, y=0.5))] * 20
    found = leaders(crowd, marks=[Place(x=0.5, y=0.5)])
    assert found[0] is not None
    assert 2 <= sum(one is not None for one in found) < 10
