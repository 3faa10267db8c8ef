"""The fastest choice of precisions: against all choices there are, and at its edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from equipoise.quantize.borders import STATES, Border, BorderTimes, Join, LatencyModel
from equipoise.quantize.front import front
from equipoise.quantize.knapsack import fastest, worth_of_integers

NODES = ("a", "b", "c", "d", "sum", "e")
"""Four layers, a join of two of them, and a layer behind it."""


def border(tensor: str, producer: str, readers: str, *, outside=False, joint=False) -> Border:
    return Border(
        tensor=tensor,
        producer=producer,
        readers=tuple(readers.split()),
        outside=outside,
        joint=joint,
    )


BORDERS = (
    border("x", "", "a b"),
    border("ta", "a", "c"),
    border("tb", "b", "d sum", joint=True),
    border("tc", "c", "sum"),
    border("td", "d", "", outside=True),
    border("ts", "sum", "e"),
    border("te", "e", "", outside=True, joint=True),
)
JOINS = (Join(name="sum", producers=("c", "b"), readers=("e",)),)


def drawn_model(seed: int) -> LatencyModel:
    """Gains of either sign, and borders that cost up to as much as a node."""
    random = np.random.default_rng(seed)
    borders = []
    for one in BORDERS:
        plain, integer = random.exponential(0.1, size=2)
        borders.append(
            BorderTimes(
                border=one,
                float_ms=plain,
                integer_ms=integer,
                rounded_ms=plain + random.exponential(0.5),
                restored_ms=integer + random.exponential(0.5),
                measured=STATES,
            )
        )
    changes = dict(zip(NODES, random.normal(-0.5, 1.0, size=len(NODES)).tolist(), strict=True))
    return LatencyModel(base_ms=8.0, changes_ms=changes, borders=tuple(borders), joins=JOINS)


def drawn_noise(seed: int) -> dict[str, float]:
    random = np.random.default_rng(100 + seed)
    return dict(zip(NODES, random.exponential(1e-3, size=len(NODES)).tolist(), strict=True))


def all_choices(model: LatencyModel) -> list[frozenset[str]]:
    subsets = (
        frozenset(names)
        for count in range(len(NODES) + 1)
        for names in itertools.combinations(NODES, count)
    )
    return [names for names in subsets if model.settled(names) == names]


def total(noise: dict[str, float], names: frozenset[str]) -> float:
    return math.fsum(noise[name] for name in names)


FREE = dict.fromkeys(NODES, 0.0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8, math.inf])
def test_no_choice_within_the_budget_is_faster(seed: int, share: float) -> None:
    """Exact: with borders, joins that follow, and products that give integers to all or none."""
    model, noise = drawn_model(seed), drawn_noise(seed)
    most = share * sum(noise.values())
    found = fastest(model, noise, most_noise=most, worth_ms=FREE)
    allowed = [names for names in all_choices(model) if total(noise, names) <= most]
    assert found.integers in allowed
    assert found.noise == pytest.approx(total(noise, found.integers))
    assert found.ms == pytest.approx(model.predict_ms(found.integers))
    assert found.ms == pytest.approx(min(map(model.predict_ms, allowed)), rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_below_the_least_time_worth_alone_decides(seed: int) -> None:
    """Among choices that are fast enough, the one whose integers are worth most."""
    model, noise = drawn_model(seed), drawn_noise(seed)
    worth = dict(zip(NODES, (0.4, 0.1, 0.2, 0.3, 0.05, 0.25), strict=True))
    most = 0.6 * sum(noise.values())
    allowed = [names for names in all_choices(model) if total(noise, names) <= most]
    least = float(np.median([model.predict_ms(names) for names in allowed]))

    def cost(names: frozenset[str]) -> float:
        return max(model.predict_ms(names), least) - sum(worth[name] for name in names)

    found = fastest(model, noise, most_noise=most, worth_ms=worth, least_ms=least)
    assert cost(found.integers) == pytest.approx(min(map(cost, allowed)), abs=1e-4)


def test_what_was_not_measured_stays_in_integers() -> None:
    """Whatever it costs: nobody knows what its float form would bring."""
    model = drawn_model(0)
    known = {"a": 1.0, "b": 1.0}
    found = fastest(model, known, most_noise=0.0, worth_ms=FREE)
    assert {"c", "d", "e"} <= found.integers
    assert not {"a", "b", "sum"} & found.integers
    assert found.noise == 0.0


def test_a_budget_of_nothing_leaves_what_makes_no_noise() -> None:
    model = drawn_model(1)
    noise = {**dict.fromkeys(NODES, 1e-3), "d": 0.0}
    found = fastest(model, noise, most_noise=0.0, worth_ms=dict.fromkeys(NODES, 10.0))
    assert found.integers == {"d"}


def test_a_node_in_float_between_two_in_integers_pays_both_borders() -> None:
    """Three in a row: the middle one is faster in float, and not by enough to leave alone."""
    borders = tuple(
        BorderTimes(
            border=border(tensor, producer, reader, outside=not reader),
            float_ms=0.0,
            integer_ms=0.0,
            rounded_ms=0.3,
            restored_ms=0.3,
            measured=STATES,
        )
        for tensor, producer, reader in (
            ("x", "", "one"), ("t1", "one", "two"), ("t2", "two", "three"), ("t3", "three", ""),
        )
    )  # fmt: skip
    changes = {"one": -2.0, "two": 0.5, "three": -2.0}
    model = LatencyModel(base_ms=10.0, changes_ms=changes, borders=borders, joins=())
    whole = frozenset(changes)
    assert model.predict_ms(whole) == pytest.approx(10 - 3.5 + 0.6)
    assert model.predict_ms(whole - {"two"}) == pytest.approx(10 - 4 + 1.2)
    quiet = dict.fromkeys(changes, 1e-6)
    found = fastest(model, quiet, most_noise=1.0, worth_ms=dict.fromkeys(changes, 0.0))
    assert found.integers == whole


def test_products_share_the_rounding_of_what_they_read() -> None:
    """One kernel rounds for all three: the last of them to leave takes it along."""
    shared = BorderTimes(
        border=border("x", "", "q k v"),
        float_ms=0.0,
        integer_ms=0.0,
        rounded_ms=0.5,
        restored_ms=0.0,
        measured=STATES,
    )
    gains = dict.fromkeys(("q", "k", "v"), -0.2)
    model = LatencyModel(base_ms=3.0, changes_ms=gains, borders=(shared,), joins=())
    times = [model.predict_ms(names) for names in ((), ("q",), ("q", "k"), ("q", "k", "v"))]
    assert times == pytest.approx([3.0, 3.3, 3.1, 2.9])


def test_hundreds_of_nodes_are_solved_to_the_end() -> None:
    """A chain of 300: the Lagrangian bound of the relaxation is met within a thousandth."""
    random = np.random.default_rng(3)
    names = [f"node {index}" for index in range(300)]
    borders = tuple(
        BorderTimes(
            border=Border(
                tensor=f"t{index}", producer=before, readers=(name,), outside=False, joint=False
            ),
            float_ms=0.0,
            integer_ms=0.0,
            rounded_ms=0.05,
            restored_ms=0.05,
            measured=STATES,
        )
        for index, (before, name) in enumerate(itertools.pairwise(["", *names]))
    )
    changes = dict(zip(names, (-random.exponential(1.0, size=300)).tolist(), strict=True))
    noise = dict(zip(names, random.lognormal(-8, 2, size=300).tolist(), strict=True))
    model = LatencyModel(base_ms=900.0, changes_ms=changes, borders=borders, joins=())
    most = 0.2 * sum(noise.values())
    free = dict.fromkeys(names, 0.0)
    found = fastest(model, noise, most_noise=most, worth_ms=free)
    # Any price of noise gives a lower bound: the least of time plus price over all choices.
    bounds = []
    for price in np.geomspace(1e-2, 1e4, 40) / most:
        charged = {name: changes[name] + price * noise[name] for name in names}
        relaxed = LatencyModel(base_ms=900.0, changes_ms=charged, borders=borders, joins=())
        least = fastest(relaxed, noise, most_noise=math.inf, worth_ms=free)
        bounds.append(least.ms - price * most)
    assert found.noise <= most
    assert found.ms <= max(bounds) + 1e-3 * 900


def test_worth_is_shared_by_weights_and_covers_what_cannot_be_told() -> None:
    """A thousandth of the float time in all, and the uncertainty of each gain: a tick at least."""
    sizes = {"large": 998, "join": 0}
    worth = worth_of_integers(sizes, {"large": 0.5}, float_ms=2.0)
    assert worth["large"] == pytest.approx(0.999 * 2e-3 + 0.5)
    assert worth["join"] == pytest.approx(0.001 * 2e-3 + 1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_the_front_falls_in_noise_and_rises_in_time(seed: int) -> None:
    """Every choice is the fastest for its noise, and no two are the same."""
    model, noise = drawn_model(seed), drawn_noise(seed)
    found = front(model, noise, worth_ms=FREE, count=6)
    assert 1 <= len(found) <= 6
    assert len({choice.integers for choice in found}) == len(found)
    assert found[0].ms == pytest.approx(min(map(model.predict_ms, all_choices(model))), rel=1e-5)
    for left, right in itertools.pairwise(found):
        assert right.noise < left.noise
        assert right.ms >= left.ms * (1 - 1e-6)
    for choice in found:
        rivals = [n for n in all_choices(model) if total(noise, n) <= choice.noise]
        assert choice.ms == pytest.approx(min(map(model.predict_ms, rivals)), rel=1e-5)


def test_integers_that_never_gain_have_no_front() -> None:
    """The float model is the fastest there is: no plan is better than it."""
    changes = dict.fromkeys(NODES, 1.0)
    borders = drawn_model(0).borders
    model = LatencyModel(base_ms=5.0, changes_ms=changes, borders=borders, joins=JOINS)
    assert front(model, dict.fromkeys(NODES, 1e-3), worth_ms=FREE, count=5) == ()
