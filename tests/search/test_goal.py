"""Goals: what they accept, what they refuse, and what they cost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import UsageError
from equipoise.search.goal import QUANTITIES, Goal, Limit, check_goal, parse_minimise


@pytest.mark.parametrize(
    ("text", "names", "weights"),
    [
        ("latency", ("latency",), ()),
        ("size, latency", ("size", "latency"), ()),
        ("latency=2,size=0.5", ("latency", "size"), (2.0, 0.5)),
    ],
)
def test_costs_in_order_or_with_weights(text: str, names: tuple, weights: tuple) -> None:
    assert parse_minimise(text) == (names, weights)


@pytest.mark.parametrize(
    "text",
    ["", "speed", "latency,latency", "latency=2,size", "latency=0", "latency=x", "size=-1",
     "latency=inf", "=2", "latency=nan"],
)  # fmt: skip
def test_what_is_no_list_of_costs(text: str) -> None:
    with pytest.raises(UsageError):
        parse_minimise(text)


@pytest.mark.parametrize(
    "goal",
    [
        Goal(max_drop=-0.1), Goal(max_drop=math.nan), Goal(max_latency_ms=0),
        Goal(max_size_bytes=-1), Goal(max_memory_bytes=math.inf), Goal(confidence=1.0),
        Goal(confidence=0.4), Goal(confidence=math.nan),
    ],
)  # fmt: skip
def test_limits_that_nothing_could_keep(goal: Goal) -> None:
    with pytest.raises(UsageError):
        check_goal(goal)


def test_a_limit_of_the_metric_is_kept_from_above() -> None:
    assert Limit(quantity="metric", allowed=0.9, found=0.95).kept
    assert not Limit(quantity="metric", allowed=0.9, found=0.85).kept
    assert Limit(quantity="size", allowed=10, found=10).kept


@given(st.dictionaries(st.sampled_from(QUANTITIES), st.floats(0.01, 100), min_size=3))
def test_less_of_any_cost_is_never_worse(relative: dict) -> None:
    """In an order and with weights alike."""
    for goal in (Goal(), Goal(minimise=("size", "memory"), weights=(1.0, 3.0))):
        cost = goal.log_cost(relative)
        for name, value in relative.items():
            assert goal.log_cost({**relative, name: value / 2}) <= cost
