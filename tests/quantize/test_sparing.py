"""What goes back to float: the planted node and no other, the cheapest first, within the time."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest

from equipoise.quantize import sparing
from equipoise.quantize.borders import STATES, BorderTimes, LatencyModel, find_borders, find_joins
from equipoise.quantize.profiling import timer_here
from equipoise.quantize.schemes import StaticInt8
from equipoise.quantize.sparing import Spared, Sparing, spare
from equipoise.quantize.static import prepare_static, written, written_alone
from equipoise.quantize.sweeps import Judge, noise_power
from equipoise.quantize.timing import Timing
from equipoise.quantize.weighing import Timer

RANDOM = np.random.default_rng(0)
ROWS = [{"x": RANDOM.normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(24)]
LOUD = np.array([1.0, 1.0, 100.0, 1.0]).reshape(1, 4, 1, 1)
"""One channel of an activation a hundred times as loud as the others."""

FRAGILE = """
    planted (float[batch, 4, 8, 8] x) => (float[batch, 4, 8, 8] y) {
        first = Conv(x, w1)
        loud = Mul(first, gain)
        fragile = Conv(loud, w2)
        calm = Relu(fragile)
        third = Conv <pads = [1, 1, 1, 1]> (calm, w3)
        both = Add(third, calm)
        y = Conv(both, w4)
    }
"""
TWINS = """
    twins (float[batch, 4, 8, 8] x) => (float[batch, 8, 8, 8] y) {
        first = Mul(x, gain)
        left = Conv(first, w1)
        right = Conv(first, w2)
        y = Concat <axis = 1> (left, right)
    }
"""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same numbers whichever tests run before."""
    RANDOM.bit_generator.state = np.random.default_rng(1).bit_generator.state


def kernel(size: int = 1) -> np.ndarray:
    return RANDOM.normal(size=(4, 4, size, size)) / 2 / size


def quiet(weight: np.ndarray) -> np.ndarray:
    """A weight that takes the loud channel back to the others."""
    return weight / LOUD


@pytest.fixture
def prepare(build, run, calibrated, scheme):
    def prepared(text: str, weights) -> tuple:
        model = build(text, {"gain": LOUD, **weights})
        seen = calibrated(model, ROWS)
        judge = Judge(feeds=ROWS[:8], references=[run(model, row) for row in ROWS[:8]])
        settings = StaticInt8(rounding=None)
        return prepare_static(model, seen, scheme=scheme, settings=settings), judge

    return prepared


@pytest.fixture
def planted(prepare):
    weights = {"w1": kernel(), "w2": quiet(kernel()), "w3": kernel(3), "w4": kernel()}
    return prepare(FRAGILE, weights)


@pytest.fixture
def twins(prepare):
    return prepare(TWINS, {"w1": quiet(kernel()), "w2": quiet(kernel())})


def integers(model) -> int:
    """Number of layers with weights in int8."""
    types = [t.data_type for t in model.graph.initializer if len(t.dims) == 4]
    return types.count(onnx.TensorProto.INT8)


def spared(
    given: tuple, *, min_sqnr_db: float, budget_s: float = 60.0, timer: Timer | None = None
) -> Spared:
    prepared, judge = given
    timer = timer or timer_here(threads=1)
    asked = Sparing(min_sqnr_db=min_sqnr_db, budget_s=budget_s, timer=timer)
    return spare(prepared, judge=judge, asked=asked)


def _saving(prepared, saved_ms: dict[str, float]):
    """In the place of measuring: float nodes of 100 ms, and what each saves in integers."""
    times = {border.tensor: border for border in find_borders(prepared)}
    model = LatencyModel(
        base_ms=100.0,
        changes_ms={name: -saved_ms.get(name, 0.0) for name in prepared.placement.nodes},
        borders=tuple(
            BorderTimes(
                border=border,
                float_ms=0.0,
                integer_ms=0.0,
                rounded_ms=0.0,
                restored_ms=0.0,
                measured=STATES,
            )
            for border in times.values()
        ),
        joins=find_joins(prepared),
    )
    return lambda *_, **__: Timing(model=model, nodes={}, others={}, designs=())


def test_the_fragile_layer_alone_goes_back_to_float(planted) -> None:
    """It is told with what it would cost; the three others keep their integers, which save time."""
    prepared, judge = planted
    saves = dict.fromkeys(prepared.placement.nodes, 10.0)
    broken = judge.rounding(written(prepared)).sqnr_db
    found = spared(planted, min_sqnr_db=30, timer=_saving(prepared, saves))
    assert broken < 10
    assert [(node.name, node.operator) for node in found.nodes] == [("node_fragile", "Conv")]
    harm = judge.rounding(written_alone(prepared, "node_fragile")).sqnr_db
    assert found.nodes[0].reason == f"alone it would leave the outputs {harm:.1f} dB"
    assert found.enough
    assert found.sqnr_db > 30
    assert found.notes == ()
    assert integers(found.model) == 3
    assert judge.rounding(found.model).sqnr_db == pytest.approx(found.sqnr_db)
    assert judge.score(found.model).sqnr_db == pytest.approx(found.sqnr_db, abs=2)


def test_with_measured_times_the_fragile_layer_goes_back_too(planted) -> None:
    """Whatever else this machine computes faster in float: the outputs keep what was asked for."""
    prepared, _ = planted
    found = spared(planted, min_sqnr_db=30)
    assert "node_fragile" in {node.name for node in found.nodes}
    assert {node.name for node in found.nodes} <= prepared.placement.nodes
    assert found.enough
    assert found.sqnr_db > 30


def test_good_enough_is_left_alone(planted, monkeypatch) -> None:
    """Nothing is measured when nothing needs to go back."""
    monkeypatch.setattr(sparing, "harms_of", None)
    found = spared(planted, min_sqnr_db=-100)
    assert (found.nodes, found.notes, found.enough) == ((), (), True)
    assert integers(found.model) == 4


def test_what_saves_most_time_stays_in_integers(twins) -> None:
    """Of two nodes that do the same harm the one whose integers gain less goes back."""
    prepared, judge = twins
    harms = {
        name: noise_power(judge.rounding(written_alone(prepared, name)))
        for name in ("node_left", "node_right")
    }
    goal = -10 * np.log10(max(harms.values()) * 1.2)
    for cheap, dear in (("node_left", "node_right"), ("node_right", "node_left")):
        timed = _saving(prepared, {cheap: 1.0, dear: 50.0})
        found = spared(twins, min_sqnr_db=goal, timer=timed)
        assert [node.name for node in found.nodes] == [cheap]
        assert found.enough


def test_integers_that_save_no_time_stay_while_they_do_no_harm(twins) -> None:
    """They are a quarter of the size: float is for what has to be, not for what would be faster."""
    prepared, judge = twins
    slower = dict.fromkeys(prepared.placement.nodes, -10.0)
    harms = [noise_power(judge.rounding(written_alone(prepared, name))) for name in slower]
    found = spared(
        twins, min_sqnr_db=-10 * np.log10(max(harms) * 1.2), timer=_saving(prepared, slower)
    )
    assert len(found.nodes) == 1
    assert integers(found.model) == 1


def test_a_goal_out_of_reach_is_said(planted) -> None:
    """Even float kernels add in another order: nobody keeps 300 dB."""
    found = spared(planted, min_sqnr_db=300)
    assert not found.enough
    assert found.sqnr_db is None or found.sqnr_db > 60
    assert any("less than 300 dB" in note for note in found.notes)


@pytest.mark.parametrize("min_sqnr_db", [30, 300])
def test_no_time_still_gives_a_model(planted, min_sqnr_db: float) -> None:
    """One node is measured, and the others are said not to have been."""
    start = time.monotonic()
    found = spared(planted, min_sqnr_db=min_sqnr_db, budget_s=0.0)
    assert time.monotonic() < start + 10
    assert not found.enough
    assert any("time ran out before 4 nodes were measured" in note for note in found.notes)
    onnx.checker.check_model(found.model, full_check=True)
    assert integers(found.model) >= 3


def test_nodes_that_hang_on_one_in_float_go_with_it(planted) -> None:
    """An Add between float and integers would round for nobody."""
    prepared, _ = planted
    assert "node_both" in prepared.placement.nodes
    model = written(prepared, without=["node_third"])
    both = next(node for node in model.graph.node if node.name == "node_both")
    assert "third" in both.input
    assert not any(name.startswith("third.") for node in model.graph.node for name in node.input)
    assert integers(model) == 3
