"""What nodes harm and gain in integers: borders as the runtime has them, times that add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from equipoise import onnxio, record
from equipoise.data.store import write_rows
from equipoise.errors import RecipeError, SourceError
from equipoise.quantize.attribution import Attribution, unprofiled
from equipoise.quantize.borders import find_borders, find_joins
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.gains import weigh_nodes
from equipoise.quantize.nodes import connected
from equipoise.quantize.plans import GainsRecord, node_facts, plans
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.rewritten import Kernel, profile_kernels
from equipoise.quantize.schemes import DynamicInt8, StaticInt8
from equipoise.quantize.static import prepare_static, written
from equipoise.quantize.weighing import TimingSettings, designs, time_nodes

RANDOM = np.random.default_rng(5)
SIDE, WIDTH = 24, 16
RESIDUAL = f"""
    residual (float[batch, 3, {SIDE}, {SIDE}] x) => (float[batch, 10] y) {{
        stem = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
        start = Relu(stem)
        first = Conv <pads = [1, 1, 1, 1]> (start, w1, b1)
        inner = Relu(first)
        second = Conv <pads = [1, 1, 1, 1]> (inner, w2, b2)
        both = Add(second, start)
        out = Relu(both)
        wide = Conv(out, w3, b3)
        shown = Relu(wide)
        pooled = GlobalAveragePool(shown)
        flat = Flatten(pooled)
        hidden = Gemm(flat, w4, b4)
        calm = Relu(hidden)
        y = MatMul(calm, w5)
    }}
"""
MIXER = """
    mixer (float[batch, 12, 64] x) => (float[batch, 12, 64] y) {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        turned = Transpose <perm = [0, 2, 1]> (k)
        scores = MatMul(q, turned)
        weights = Softmax <axis = -1> (scores)
        mixed = MatMul(weights, v)
        given = MatMul(mixed, wo)
        biased = Add(given, bo)
        grown = Add(x, biased)
        up = MatMul(grown, w1)
        shaped = Add(up, b1)
        bent = Relu(shaped)
        y = MatMul(bent, w2)
    }
"""


def _normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape) / np.sqrt(np.prod(shape[1:]))


def _residual_weights() -> dict[str, np.ndarray]:
    square = (WIDTH, WIDTH, 3, 3)
    shapes = {"w0": (WIDTH, 3, 3, 3), "w1": square, "w2": square, "w3": (32, WIDTH, 1, 1)}
    weights = {name: _normal(*shape) for name, shape in shapes.items()}
    weights |= {f"b{i}": _normal(shape[0], 1)[:, 0] / 4 for i, shape in enumerate(shapes.values())}
    return {**weights, "w4": _normal(32, 24), "b4": _normal(24, 1)[:, 0], "w5": _normal(24, 10)}


def _mixer_weights() -> dict[str, np.ndarray]:
    shapes = dict.fromkeys(("wq", "wk", "wv", "wo"), (64, 64)) | {"w1": (64, 256), "w2": (256, 64)}
    weights = {name: _normal(*shape) for name, shape in shapes.items()}
    return {**weights, "bo": _normal(64, 1)[:, 0], "b1": _normal(256, 1)[:, 0]}


CASES = {
    "residual": (RESIDUAL, _residual_weights, {"x": (1, 3, SIDE, SIDE)}),
    "mixer": (MIXER, _mixer_weights, {"x": (1, 12, 64)}),
}


def rows_of(name: str, count: int) -> list[dict[str, np.ndarray]]:
    shapes = CASES[name][2]
    return [
        {tensor: RANDOM.normal(size=shape).astype(np.float32) for tensor, shape in shapes.items()}
        for _ in range(count)
    ]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same numbers whichever tests run before."""
    RANDOM.bit_generator.state = np.random.default_rng(7).bit_generator.state


@pytest.fixture(params=list(CASES))
def prepared(request, build, calibrated, scheme):
    """A model that is ready for integers, and its rows."""
    text, weights, _ = CASES[request.param]
    model, rows = build(text, weights()), rows_of(request.param, 12)
    settings = StaticInt8(rounding=None)
    seen = calibrated(model, rows)
    return prepare_static(model, seen, scheme=scheme, settings=settings), rows


# Borders.


def drawn_designs(prepared, count: int) -> list[frozenset[str]]:
    random = np.random.default_rng(11)
    nodes = sorted(prepared.placement.nodes)
    drawn = [[n for n in nodes if random.random() < 0.6] for _ in range(count)]
    return [connected(prepared.model, names) for names in drawn]


def test_the_states_of_borders_are_those_of_the_written_graph(prepared) -> None:
    """Whatever goes to float: a tensor has a pair exactly when its border is no float one."""
    model, _ = prepared
    borders = find_borders(model)
    for design in [model.placement.nodes, *drawn_designs(model, 20)]:
        graph = written(model, without=model.placement.nodes - design).graph
        rounded = {
            n.input[0].removesuffix(".float") for n in graph.node if n.op_type == "QuantizeLinear"
        }
        for border in borders:
            state = border.state(design)
            # A Relu whose grid does its work is gone, and the pair stands where it stood.
            names = {border.tensor, *_behind(model.model, border.tensor)}
            assert bool(rounded & names) == (state != "float"), (border, state, sorted(design))


def _followers(model, name: str) -> list[str]:
    """Nodes that a runtime may call the kernel of ``name`` by: what alone reads it."""
    outputs = next(n.output for n in model.graph.node if n.name == name)
    return [n.name for n in model.graph.node if set(outputs) & set(n.input)]


def _behind(model, tensor: str) -> list[str]:
    return [n.output[0] for n in model.graph.node if n.op_type == "Relu" and tensor in n.input]


def test_what_can_be_chosen_is_what_the_writer_does(prepared) -> None:
    """Joins go to float with what they hang on, in the model of time as in the graph."""
    model, rows = prepared
    timing = time_nodes(
        model, feeds=rows[:1], settings=TimingSettings(openings=1, runs=1, least_s=0.0)
    )
    random = np.random.default_rng(3)
    nodes = sorted(model.placement.nodes)
    for _ in range(50):
        names = frozenset(n for n in nodes if random.random() < 0.7)
        assert timing.model.settled(names) == connected(model.model, names)


def test_the_join_of_a_residual_network_hangs_on_both_sides(build, calibrated, scheme) -> None:
    text, weights, _ = CASES["residual"]
    model, rows = build(text, weights()), rows_of("residual", 12)
    seen = calibrated(model, rows)
    ready = prepare_static(model, seen, scheme=scheme, settings=StaticInt8(rounding=None))
    joins = {join.name: join for join in find_joins(ready)}
    assert set(joins["node_both"].producers) == {"node_second", "node_stem"}
    assert joins["node_both"].readers == ("node_wide",)
    borders = {border.tensor: border for border in find_borders(ready)}
    assert set(borders["stem"].readers) == {"node_first", "node_both"}
    assert borders["x"].producer == ""
    assert borders["hidden"].joint
    last = next(border for border in borders.values() if border.producer == "node_y")
    assert (last.readers, last.outside, last.joint) == ((), True, True)


def test_designs_show_every_border_from_both_sides(prepared) -> None:
    """Where a side can be taken at all: the state is seen in one design or another."""
    model, _ = prepared
    borders = find_borders(model)
    chosen = designs(model, borders)
    assert chosen[:2] == (frozenset(), model.placement.nodes)
    assert all(connected(model.model, design) == design for design in chosen)
    everywhere = [model.placement.nodes, *chosen, *drawn_designs(model, 60)]
    for border in borders:
        possible = {border.state(design) for design in everywhere}
        seen = {border.state(design) for design in chosen}
        assert len(possible - seen) <= 1, (border, possible, seen)


# Whose time is it.


def test_every_kernel_belongs_to_a_node_or_a_border(prepared, tmp_path: Path) -> None:
    """Nearly all time has a place, whatever the runtime merges, renames and reorders."""
    model, rows = prepared
    attribution = Attribution(model.model)
    borders = {border.tensor for border in find_borders(model)}
    for index, design in enumerate(designs(model, find_borders(model))):
        path = tmp_path / f"{index}.onnx"
        onnxio.save_model(written(model, without=model.placement.nodes - design), path)
        kernels, times = profile_kernels(path, feeds=rows[:1], runs=3)
        places = attribution.places(kernels)
        spent = attribution.spent(kernels, times)
        assert spent.total == pytest.approx(sum(ms for _, ms in times.values()))
        assert spent.other < 0.1 * spent.total
        assert set(times) == {kernel.name for kernel in kernels}
        present = frozenset(p.name for p in places.values() if p.kind == "node")
        assert present == frozenset(spent.nodes)
        for name in model.placement.nodes - {join.name for join in find_joins(model)}:
            assert present & {name, *_followers(model.model, name)}, (name, present)
        passed = {p.name for p in places.values() if p.kind == "border"}
        assert passed & borders or not design


KERNELS = [
    Kernel(name="a", operator="Conv", inputs=("x", "w"), outputs=("t",)),
    Kernel(name="b", operator="QLinearConv", inputs=("t",) * 8, outputs=("y",)),
]


def test_times_of_kernels_add_up_to_the_run_without_a_profile() -> None:
    """What is too much is taken off by inputs."""
    times = {"a": ("Conv", 0.010), "b": ("QLinearConv", 0.010)}
    found = unprofiled(KERNELS, times, whole_ms=0.016)
    assert {name: ms for name, (_, ms) in found.items()} == pytest.approx(
        {"a": 0.0092, "b": 0.0068}
    )
    assert found["b"][0] == "QLinearConv"


@pytest.mark.parametrize(("whole_ms", "kept"), [(0.001, 0.015), (5.0, 0.022)])
def test_a_run_that_other_load_disturbed_changes_little(whole_ms: float, kept: float) -> None:
    """Half a microsecond for an input at most, and one for a kernel; and none comes to nothing."""
    times = {"a": ("Conv", 0.0195), "b": ("QLinearConv", 0.0005)}
    found = unprofiled(KERNELS, times, whole_ms=whole_ms)
    assert sum(ms for _, ms in found.values()) == pytest.approx(kept)
    assert all(ms > 0 for _, ms in found.values())


def test_times_add_up_to_those_of_the_plain_models(prepared) -> None:
    """Sums over nodes and borders give back the kernels' times of all in float and in integers."""
    model, rows = prepared
    timing = time_nodes(
        model, feeds=rows[:2], settings=TimingSettings(openings=3, runs=4, least_s=0.0)
    )
    able = model.placement.nodes
    assert set(timing.nodes) == set(timing.model.changes_ms) == able
    assert timing.model.predict_ms(()) > 0
    known = [t.float_ms for t in timing.nodes.values() if t.float_ms is not None]
    together = sum(known) + sum(timing.others.values())
    assert together == pytest.approx(timing.model.predict_ms(()), rel=0.35)
    assert all(t.integer_ms is None or t.integer_ms >= 0 for t in timing.nodes.values())
    assert all(t.spread_ms >= 0 for t in timing.nodes.values())
    for times in timing.model.borders:
        assert times.rounded_ms >= times.float_ms >= 0
        assert times.restored_ms >= times.integer_ms >= 0


# The stage.


@pytest.fixture(scope="module", autouse=True)
def _briefly():
    """As long as it takes to see what is there; no test here believes a time."""
    with pytest.MonkeyPatch.context() as patched:
        brief = TimingSettings(openings=2, runs=3, least_s=0.01)
        patched.setattr("equipoise.quantize.gains._TIMING", brief)
        patched.setattr("equipoise.quantize.gains._ROUNDS", 8)
        yield


@pytest.fixture(scope="module")
def weighed(tmp_path_factory, build, scheme, _briefly) -> tuple[QuantizeConfig, GainsRecord]:
    folder = tmp_path_factory.mktemp("weighed")
    text, weights, _ = CASES["residual"]
    RANDOM.bit_generator.state = np.random.default_rng(7).bit_generator.state
    onnx.save(build(text, weights()), folder / "model.onnx")
    write_rows(folder / "rows", rows_of("residual", 16))
    calibrate(
        CalibrateConfig(model=folder / "model.onnx", samples=folder / "rows"),
        output=folder / "statistics",
    )
    config = QuantizeConfig(
        model=folder / "model.onnx",
        quantization=StaticInt8(rounding=None),
        scheme=scheme,
        samples=folder / "rows",
        statistics=folder / "statistics",
    )
    return config, weigh_nodes(config, output=folder)


def test_the_record_has_every_node_and_comes_back_from_json(weighed) -> None:
    _, found = weighed
    assert record.loads(GainsRecord, record.dumps(found), where="gains.json") == found
    nodes = {node.name: node for node in found.nodes}
    able = {n for n, node in nodes.items() if node.able}
    assert able >= {f"node_{n}" for n in ("stem", "first", "second", "both", "wide", "hidden", "y")}
    assert all(nodes[name].measured for name in able)
    assert all(nodes[name].noise >= 0 for name in able)
    assert nodes["node_first"].weights == WIDTH * WIDTH * 9
    assert nodes["node_both"].weights == 0
    assert nodes["node_first"].sqnr_db == pytest.approx(-10 * np.log10(nodes["node_first"].noise))
    assert nodes["node_first"].float_ms > 0
    assert nodes["node_first"].integer_ms > 0
    assert sum(found.harms.values()) == pytest.approx(found.noise)
    assert "openings" in found.notes[0]


def test_predictions_stand_beside_measured_whole_models(weighed) -> None:
    """Everything in integers first; times of a busy machine are within a factor, never nonsense."""
    _, found = weighed
    assert found.checks[0].float_nodes == ()
    assert found.checks[0].measured_ms == found.integer_ms
    assert all(check.float_nodes for check in found.checks[1:])
    for check in found.checks:
        assert 0.2 < check.predicted_ms / check.measured_ms.value < 5
        assert check.measured_ms.low <= check.measured_ms.value <= check.measured_ms.high
        assert check.measured_ms.value > 0
        assert check.measured_noise < found.noise * 1.5
        assert check.error == pytest.approx(check.predicted_ms / check.measured_ms.value - 1)


def test_the_gain_of_a_node_is_what_the_whole_loses_without_it(weighed) -> None:
    _, found = weighed
    whole = found.latency.predict_ms(found.able)
    for node in (node for node in found.nodes if node.able):
        without = found.latency.settled(found.able - {node.name})
        assert node.gain_ms == pytest.approx(found.latency.predict_ms(without) - whole)


def test_plans_go_from_everything_in_integers_to_little(weighed) -> None:
    """Named nodes and no others end in float, and a recipe of them is quantised as planned."""
    _, found = weighed
    front = plans(found, count=6)
    assert front[0].float_nodes == ()
    assert len(front) <= 6
    assert len({plan.float_nodes for plan in front}) == len(front)
    noises = [plan.predicted_noise for plan in front]
    assert noises == sorted(noises, reverse=True)
    for plan in front:
        integers = found.latency.settled(found.able - set(plan.float_nodes))
        assert found.latency.predict_ms(integers) == pytest.approx(plan.predicted_ms)
        float_ms = found.latency.predict_ms(())
        assert plan.predicted_speedup == pytest.approx(float_ms / plan.predicted_ms)


def test_a_plan_is_a_scheme_that_leaves_those_nodes_in_float(weighed, tmp_path: Path) -> None:
    config, found = weighed
    base = StaticInt8(rounding=None, float_nodes=("node_stem",), min_sqnr_db=60.0)
    plan = next((p for p in plans(found, count=8) if p.float_nodes), None)
    if plan is None:
        pytest.skip("on this machine no node of this model gains anything in integers")
    settings = plan.settings(base)
    assert set(settings.float_nodes) == {"node_stem", *plan.float_nodes}
    made = QuantizeConfig(
        model=config.model,
        quantization=plan.settings(StaticInt8(rounding=None)),
        scheme=config.scheme,
        samples=config.samples,
        statistics=config.statistics,
    )
    made_record = quantize(made, output=tmp_path)
    assert {node.name for node in made_record.float_nodes} >= set(plan.float_nodes)
    assert made_record.sqnr_db == pytest.approx(plan.predicted_sqnr_db, abs=4)


def test_facts_say_of_each_node_what_it_is_in_and_why(weighed) -> None:
    _, found = weighed
    left = {"node_second": "", "node_wide": "named to stay in float"}
    facts = {fact.name: fact for fact in node_facts(found, float_nodes=left)}
    assert [fact.name for fact in facts.values()] == [node.name for node in found.nodes]
    assert facts["node_first"].precision == "int8"
    assert facts["node_first"].reason == ""
    assert facts["node_second"].precision == "float32"
    assert "gain" in facts["node_second"].reason
    assert facts["node_wide"].reason == "named to stay in float"
    assert facts["node_both"].precision == "float32"
    assert facts["node_both"].reason == "what it reads or leads to is in float"


def test_what_time_did_not_reach_stays_and_is_said(weighed, tmp_path: Path) -> None:
    config, _ = weighed
    settings = StaticInt8(rounding=None, budget_s=0.0)
    hurried = QuantizeConfig(
        model=config.model, quantization=settings, scheme=config.scheme,
        samples=config.samples, statistics=config.statistics,
    )  # fmt: skip
    found = weigh_nodes(hurried, output=tmp_path)
    unmeasured = [node for node in found.nodes if node.able and not node.measured]
    assert len(unmeasured) == len(found.able) - 1
    assert any(f"noise of {len(unmeasured)} nodes" in note for note in found.notes)
    layers = {node.name for node in unmeasured if node.weights}
    for plan in plans(found):
        assert not layers & set(plan.float_nodes)


def test_bad_inputs_are_said(weighed, tmp_path: Path) -> None:
    config, _ = weighed

    def refused(changes: dict[str, object]):
        fields = json.loads(record.dumps(config)) | changes
        made = record.from_json(QuantizeConfig, fields)
        return weigh_nodes(made, output=tmp_path)

    with pytest.raises(RecipeError, match="static int8, not for 'dynamic'"):
        refused({"quantization": record.to_json(DynamicInt8())})
    with pytest.raises(RecipeError, match="needs calibrated ranges"):
        refused({"statistics": None})
    with pytest.raises(SourceError, match="no such ONNX file"):
        refused({"model": str(tmp_path / "missing.onnx")})
    every = [node.name for node in onnx.load(config.model).graph.node]
    settings = record.to_json(StaticInt8(rounding=None, float_nodes=tuple(every)))
    with pytest.raises(RecipeError, match="nothing in the model can run in integers"):
        refused({"quantization": settings})
