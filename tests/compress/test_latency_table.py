"""Tables of layer latencies: real ones of a few layers, and estimates from synthetic ones."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise import record
from equipoise.compress.latency.estimate import Estimator, Measured, validate
from equipoise.compress.latency.operators import one_layer
from equipoise.compress.latency.shapes import (
    check_shape,
    output_values,
    resized,
    shapes_of,
    structure_bytes,
    weight_values,
    working_sets_of,
)
from equipoise.compress.latency.surface import monotone
from equipoise.compress.latency.table import (
    LayerLatency,
    LayerTable,
    TableConfig,
    measure_layers,
)
from equipoise.compress.latency.timing import Timed, Turns, median_of, time_in_turns
from equipoise.compress.structure import Group, Layer, LayerShape, Structure
from equipoise.data.store import write_rows
from equipoise.errors import InputError, SourceError, UsageError
from equipoise.measure.interval import Interval
from equipoise.runtimes.onnxruntime.builder import BUILDER
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import builder, session_opener
from equipoise.targets.machine import detect_machine
from equipoise.targets.profile import Int8Scheme
from equipoise.targets.profiles import get_target


def conv(
    inputs: int, outputs: int, *, size: int = 8, kernel: int = 3, stride: int = 1, groups: int = 1
) -> LayerShape:
    return LayerShape(
        kind="conv", inputs=inputs, outputs=outputs, size=(size, size), kernel=(kernel, kernel),
        stride=(stride, stride), padding=(kernel // 2, kernel // 2), groups=groups,
    )  # fmt: skip


def linear(inputs: int, outputs: int, *, positions: int = 4) -> LayerShape:
    return LayerShape(kind="linear", inputs=inputs, outputs=outputs, size=(positions,))


def attention(heads: int, *, size: int = 16, positions: int = 8) -> LayerShape:
    width = heads * size
    return LayerShape(
        kind="attention", inputs=width, outputs=width, size=(positions,), groups=heads
    )


@pytest.fixture
def scheme() -> Int8Scheme:
    return get_target("x86-vnni", machine=detect_machine()).int8


def measured(*shapes: LayerShape, scheme: Int8Scheme, **settings: object) -> LayerTable:
    config = TableConfig(shapes=shapes, runtime="onnxruntime", machine="test", scheme=scheme)
    changed = dataclasses.replace(config, **settings)  # type: ignore[arg-type]
    return measure_layers(changed, output=Path())


# Real layers.


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_larger_layer_is_measured_slower(scheme: Int8Scheme, precision: str) -> None:
    """Sixteen times the work and more is seen through any noise, in both precisions."""
    shapes = (
        conv(16, 16), conv(128, 128, size=16), linear(32, 32), linear(512, 512, positions=32),
        attention(1), attention(8, size=64, positions=64),
    )  # fmt: skip
    table = measured(*shapes, scheme=scheme, precision=precision, rounds=9)
    assert [layer.shape for layer in table.layers] == list(shapes)
    times = [layer.latency_ms[0].value for layer in table.layers]
    for small, large in zip(times[::2], times[1::2], strict=True):
        assert small * 2 < large
    for layer in table.layers:
        (latency,) = layer.latency_ms
        assert 0 <= latency.low <= latency.value <= latency.high
    assert table.call_ms.value > 0
    assert table.whole_ms is None


def test_a_table_comes_back_from_its_record(scheme: Int8Scheme) -> None:
    table = measured(conv(4, 8), attention(2), scheme=scheme, rounds=3)
    assert record.loads(LayerTable, record.dumps(table), where="table") == table


def test_a_config_comes_back_from_its_record(scheme: Int8Scheme) -> None:
    config = TableConfig(
        shapes=(conv(4, 8), linear(2, 3)), runtime="onnxruntime", machine="{}", scheme=scheme,
        whole=Path("engine.onnx"), samples=Path("samples"),
    )  # fmt: skip
    assert record.loads(TableConfig, record.dumps(config), where="config") == config


def test_a_whole_model_is_timed_with_its_layers(
    scheme: Int8Scheme, conv_onnx: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows", [{"x": np.ones((1, 1, 8, 8), dtype=np.float32)}])
    table = measured(
        conv(1, 4), scheme=scheme, rounds=6, whole=conv_onnx, samples=tmp_path / "rows",
        working_sets=(1000, 2000),
    )  # fmt: skip
    assert table.whole_ms is not None
    assert table.whole_ms.value > table.call_ms.value
    assert table.whole_nodes >= 2
    assert 0 <= table.node_ms < table.call_ms.value


def test_a_table_of_hundreds_of_layers_takes_seconds(scheme: Int8Scheme) -> None:
    """Sixty layers in at most ten seconds on a core that others use too."""
    shapes = [conv(8 * i, 8 * o) for i in range(1, 9) for o in range(1, 9)][:60]
    begin = time.monotonic()
    table = measured(*shapes, scheme=scheme, rounds=12)
    assert len(table.layers) == 60
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "shape",
    [
        conv(8, 16, stride=2),
        conv(16, 16, groups=16),
        conv(16, 16, groups=4),
        conv(3, 20, kernel=1),
        LayerShape(kind="conv", inputs=4, outputs=8, size=(20,), kernel=(5,), stride=(2,),
                   padding=(0,)),
        LayerShape(kind="conv", inputs=4, outputs=8, size=(5, 7), kernel=(3, 1), stride=(1, 1),
                   padding=(1, 0)),
        linear(8, 16),
        linear(8, 16, positions=1),
        attention(3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("target", ["x86-vnni", "arm64", "openvino", "qnn-htp", "vitis-ai"])
def test_one_layer_gives_out_what_its_shape_says(
    shape: LayerShape, target: str, tmp_path: Path
) -> None:
    """Whatever the scheme, float and integer models run, with the sizes of the layer."""
    import onnx

    for precision in ("float32", "int8"):
        made = one_layer(
            shape, precision=precision, scheme=get_target(target, machine=detect_machine()).int8
        )  # type: ignore[arg-type]
        onnx.checker.check_model(made.model, full_check=True)
        path = tmp_path / f"{precision}.onnx"
        onnx.save(made.model, path)
        with session_opener("onnxruntime")(path, settings=SessionSettings()) as session:
            (result,) = session.run(made.feeds).values()
        assert result.size == output_values(shape)
        assert result.shape[0] == 1


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        (conv(32, 32), "QLinearConv"),
        (linear(64, 64), "MatMulIntegerToFloat"),
        (linear(64, 64, positions=1), "QGemm"),
    ],
)
def test_layers_in_int8_run_in_integers(
    scheme: Int8Scheme, tmp_path: Path, shape: LayerShape, kernel: str
) -> None:
    """The runtime takes them into its integer kernels, as it does inside a model."""
    import onnx

    path = tmp_path / "layer.onnx"
    onnx.save(one_layer(shape, precision="int8", scheme=scheme).model, path)
    built = BUILDER.build(path, tmp_path / "engine", settings=SessionSettings())
    assert kernel in built.kernels


def test_changes_of_layout_are_not_measured(scheme: Int8Scheme) -> None:
    """A lone convolution is brought into ONNX Runtime's layout and back; inside a model not."""
    from equipoise.compress.latency.bare import bare

    for precision in ("float32", "int8"):
        made = one_layer(conv(32, 48), precision=precision, scheme=scheme)  # type: ignore[arg-type]
        model, feeds = bare(made.model, made.feeds, settings=SessionSettings())
        operators = [node.op_type for node in model.graph.node]
        assert operators == ["QLinearConv" if precision == "int8" else "Conv"]
        assert {value.name for value in model.graph.input} == set(feeds)


def test_what_has_no_change_of_layout_stays_as_it_is(scheme: Int8Scheme) -> None:
    from equipoise.compress.latency.bare import bare

    made = one_layer(attention(2), precision="float32", scheme=scheme)
    assert bare(made.model, made.feeds, settings=SessionSettings())[0] is made.model


@pytest.mark.slow
def test_another_runtime_measures_too() -> None:
    if not builder("openvino").availability().available:
        pytest.skip("OpenVINO is not installed")
    own = get_target("openvino", machine=detect_machine()).int8
    for precision in ("float32", "int8"):
        table = measured(
            conv(16, 16), conv(256, 256, size=16), linear(64, 64), attention(2),
            scheme=own, runtime="openvino", precision=precision, rounds=9,
        )  # fmt: skip
        times = [layer.latency_ms[0].value for layer in table.layers]
        assert times[0] * 2 < times[1]


# Bad input.


@pytest.mark.parametrize(
    "wrong",
    [
        dataclasses.replace(conv(4, 4), inputs=0),
        dataclasses.replace(conv(4, 4), outputs=-8),
        dataclasses.replace(conv(4, 4), size=()),
        dataclasses.replace(conv(4, 4), size=(8,)),
        dataclasses.replace(conv(4, 4), kernel=(9, 9), padding=(0, 0)),
        dataclasses.replace(conv(4, 4), padding=(-1, 0)),
        dataclasses.replace(conv(4, 4), stride=(0, 1)),
        conv(4, 4, groups=3),
        dataclasses.replace(linear(4, 4), size=(2, 2)),
        dataclasses.replace(attention(3), outputs=47),
    ],
)
def test_a_shape_that_cannot_be_is_refused(scheme: Int8Scheme, wrong: LayerShape) -> None:
    with pytest.raises(InputError):
        measured(wrong, scheme=scheme)


def test_wrong_settings_are_refused(scheme: Int8Scheme, tmp_path: Path, conv_onnx: Path) -> None:
    with pytest.raises(InputError, match="no layer"):
        measured(scheme=scheme)
    with pytest.raises(UsageError, match="rounds"):
        measured(conv(4, 4), scheme=scheme, rounds=0)
    for wrong in ((), (4, 4), (8, 2)):
        with pytest.raises(UsageError, match="rise"):
            measured(conv(4, 4), scheme=scheme, working_sets=wrong)
    with pytest.raises(UsageError, match="samples"):
        measured(conv(4, 4), scheme=scheme, whole=conv_onnx)
    with pytest.raises(UsageError, match="onnxruntime"):
        measured(conv(4, 4), scheme=scheme, runtime="onnxruntim")
    write_rows(tmp_path / "rows", [{"x": np.ones((1, 1, 8, 8), dtype=np.float32)}])
    with pytest.raises(SourceError, match="no such engine"):
        measured(conv(4, 4), scheme=scheme, whole=tmp_path / "none.onnx", samples=tmp_path / "rows")


# Timing, on a clock that the test winds by hand.


class Session:
    """Takes a known time per call, and writes down who was called."""

    inputs = outputs = ()

    def __init__(self, name: str, clock: list[float], log: list[str], cost_s: float) -> None:
        self.name, self.clock, self.log, self.cost_s = name, clock, log, cost_s

    def run(self, _feeds: object) -> dict[str, object]:
        self.log.append(self.name)
        self.clock[0] += self.cost_s
        return {}


def sessions(costs: dict[str, float], *, read_bytes: int = 10) -> tuple[list[Timed], list[str]]:
    clock, log = [0.0], []
    made = [Session(name, clock, log, cost) for name, cost in costs.items()]
    timed = [Timed(session=s, feeds=({},), read_bytes=read_bytes) for s in made]  # type: ignore[arg-type]
    return timed, log


def wound(timed: list[Timed]) -> list[float]:
    return timed[0].session.clock  # type: ignore[attr-defined, no-any-return]


def test_each_call_is_given_its_time() -> None:
    timed, _ = sessions({"a": 1e-3, "b": 2e-6, "c": 0.3})
    (rows,) = time_in_turns(timed, turns=Turns(rounds=6), clock=lambda: wound(timed)[0])
    np.testing.assert_allclose(rows, [[1.0, 0.002, 300.0]] * 6)


def test_others_read_as_much_as_the_model_between_two_calls() -> None:
    """With a working set of 30 bytes and layers of 10, two others come between at least."""
    timed, log = sessions(dict.fromkeys("abcdefg", 1e-3))
    turns = Turns(rounds=3, working_sets=(30,))  # one order of engines
    time_in_turns(timed, turns=turns, clock=lambda: wound(timed)[0])
    calls = log[7 * 6 :]  # after the warm-up
    last: dict[str, int] = {}
    for place, name in enumerate(calls):
        if name in last and place - last[name] < 7:
            assert len(set(calls[last[name] + 1 : place])) >= 2
        last[name] = place


def test_every_engine_is_timed_with_every_working_set() -> None:
    timed, log = sessions(dict.fromkeys("abcdef", 1e-3))
    turns = Turns(rounds=3, working_sets=(10, 60))
    rows = time_in_turns(timed, turns=turns, clock=lambda: wound(timed)[0])
    assert rows.shape == (2, 3, 6)
    calls = log[6 * 6 :]  # after the warm-up
    near, far = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    assert sum(a != b for a, b in itertools.pairwise(near)) == 5  # each alone, warm
    assert all(len(set(far[i : i + 6])) == 6 for i in range(0, len(far), 6))  # all in turn


def test_timing_stops_when_every_median_is_certain() -> None:
    timed, _ = sessions({"a": 1e-3, "b": 2e-3})
    (rows,) = time_in_turns(
        timed, turns=Turns(rounds=90, least_rounds=12), clock=lambda: wound(timed)[0]
    )
    assert len(rows) == 12


def test_timing_stops_at_its_limit_of_time() -> None:
    """Noise of half the value would need all rounds; the limit ends it before."""
    timed, _ = sessions({"a": 1.0})
    noise = np.random.default_rng(0)
    session = timed[0].session
    run = session.run

    def noisy(feeds: object) -> dict[str, object]:
        session.cost_s = float(noise.uniform(0.5, 1.5))  # type: ignore[attr-defined]
        return run(feeds)  # type: ignore[arg-type, return-value]

    session.run = noisy  # type: ignore[assignment, method-assign]
    turns = Turns(rounds=300, least_rounds=3, most_s=30.0)
    (rows,) = time_in_turns(timed, turns=turns, clock=lambda: wound(timed)[0])
    assert 3 <= len(rows) < 60


def test_the_interval_of_a_median_covers_it() -> None:
    """In at least 90 of 100 draws of skewed noise, of which 95 are promised."""
    noise = np.random.default_rng(0).exponential(size=(30, 400))
    found = median_of(noise)
    covered = sum(each.low <= np.log(2) <= each.high for each in found)
    assert covered >= 0.93 * len(found)


def test_no_latency_is_negative() -> None:
    (found,) = median_of(np.full((5, 1), 0.003), less=0.004)
    assert found == Interval(value=0.0, low=0.0, high=0.0)


# Which shapes.


def block(hidden: int = 32, *, blocks: int = 2, heads: int = 4) -> Structure:
    """A transformer of two layers, as a table sees it."""
    size = hidden // heads
    layers = []
    for index in range(blocks):
        layers += [
            Layer(name=f"{index}.query", shape=linear(hidden, hidden), input_group="hidden",
                  output_group="heads", output_factor=size, block=index),
            Layer(name=f"{index}.attention", shape=attention(heads, size=size, positions=4),
                  input_group="heads", output_group="heads", input_factor=size,
                  output_factor=size, block=index),
            Layer(name=f"{index}.out", shape=linear(hidden, hidden), input_group="heads",
                  output_group="hidden", input_factor=size, block=index),
            Layer(name=f"{index}.up", shape=linear(hidden, 4 * hidden), input_group="hidden",
                  output_group="intermediate", block=index),
            Layer(name=f"{index}.down", shape=linear(4 * hidden, hidden),
                  input_group="intermediate", output_group="hidden", block=index),
        ]  # fmt: skip
    layers.append(Layer(name="head", shape=linear(hidden, 3, positions=1), input_group="hidden"))
    groups = tuple(
        Group(name=name, width=width, multiple=multiple, scores=(1.0,) * width)
        for name, width, multiple in (
            ("hidden", hidden, 8), ("heads", heads, 1), ("intermediate", 4 * hidden, 8),
        )
    )  # fmt: skip
    return Structure(groups=groups, layers=tuple(layers))


def synthetic(shapes: tuple[LayerShape, ...], cost: object, **settings: object) -> LayerTable:
    """A table of made-up figures: no measurement."""
    layers = []
    for shape in shapes:
        value = float(cost(shape))  # type: ignore[operator]
        interval = Interval(value=value, low=value * 0.98, high=value * 1.02)
        layers.append(LayerLatency(shape=shape, latency_ms=(interval,)))
    call = Interval(value=0.01, low=0.01, high=0.01)
    table = LayerTable(
        working_sets=(0,),
        layers=tuple(layers), call_ms=call, node_ms=0.0, whole_ms=None,
        whole_nodes=0, runtime="synthetic",
        precision="float32", threads=1, machine="synthetic", rounds=1, took_s=0.0,
    )  # fmt: skip
    return dataclasses.replace(table, **settings)  # type: ignore[arg-type]


def work(shape: LayerShape) -> float:
    """Bilinear in inputs and outputs, as multiply-accumulates and traffic are."""
    products = output_values(shape) * (shape.inputs // shape.groups)
    return 1e-6 * products + 1e-6 * output_values(shape) + 1e-6 * shape.inputs + 1e-3


def test_layers_of_one_form_share_their_measurements() -> None:
    few, many = (shapes_of(block(blocks=n)) for n in (1, 6))
    assert set(few) == set(many)
    assert len(many) == len(set(many))


def test_every_grid_has_the_full_width_and_valid_shapes() -> None:
    structure = block()
    shapes = shapes_of(structure, points=4)
    assert {layer.shape for layer in structure.layers} <= set(shapes)
    for shape in shapes:
        check_shape(shape)
        assert shape.inputs % 8 == 0


@given(width=st.integers(1, 600), multiple=st.integers(1, 64), points=st.integers(2, 9))
def test_a_grid_is_of_multiples_and_the_full_width(width: int, multiple: int, points: int) -> None:
    group = Group(name="g", width=width, multiple=1, scores=(1.0,) * width)
    layer = Layer(name="l", shape=linear(width, 5), input_group="g")
    shapes = shapes_of(
        Structure(groups=(group,), layers=(layer,)), multiple=multiple, points=points
    )
    widths = sorted(shape.inputs for shape in shapes)
    assert widths[-1] == width
    assert all(w % multiple == 0 for w in widths[:-1])
    assert 1 <= len(widths) <= points + 1


def test_depthwise_and_attention_keep_what_a_group_is() -> None:
    depthwise = Layer(
        name="d", shape=conv(32, 32, groups=32), input_group="g", output_group="g", depthwise=True
    )
    assert resized(depthwise, inputs=8, outputs=8).groups == 8
    heads = Layer(name="a", shape=attention(4), input_group="h", output_group="h", input_factor=16)
    assert resized(heads, inputs=32, outputs=32).groups == 2
    grouped = Layer(name="c", shape=conv(32, 32, groups=4), input_group="g", output_group="o")
    assert resized(grouped, inputs=8, outputs=16).groups == 4


def test_wrong_grids_are_refused() -> None:
    with pytest.raises(UsageError, match="points"):
        shapes_of(block(), points=1)
    with pytest.raises(UsageError, match="multiple"):
        shapes_of(block(), multiple=0)
    lost = Structure(groups=(), layers=block().layers)
    with pytest.raises(InputError, match="hidden"):
        shapes_of(lost)


def test_bytes_of_a_structure_follow_the_precision() -> None:
    structure = block()
    weights = sum(weight_values(layer.shape) for layer in structure.layers)
    assert structure_bytes(structure, precision="float32") == 4 * weights
    assert structure_bytes(structure, precision="int8") == weights


# Estimates from synthetic tables.


def exact(structure: Structure, widths: dict[str, int]) -> float:
    """Latency of the synthetic model, layer by layer."""
    return 0.01 + sum(map(work, _at(structure, widths)))


@given(hidden=st.integers(1, 4), heads=st.integers(1, 4), intermediate=st.integers(1, 16))
def test_an_estimate_between_points_is_exact_where_the_time_is_bilinear(
    hidden: int, heads: int, intermediate: int
) -> None:
    structure = block()
    table = synthetic(shapes_of(structure, points=3), work)
    widths = {"hidden": 8 * hidden, "heads": heads, "intermediate": 8 * intermediate}
    estimate = Estimator(table, structure).latency_ms(widths)
    assert estimate == pytest.approx(exact(structure, widths), rel=1e-9)


def test_the_rest_of_a_whole_model_follows_what_layers_give_out() -> None:
    structure = block()
    table = synthetic(shapes_of(structure), work)
    layers = Estimator(table, structure).full_ms
    estimator = Estimator(table, structure, whole_ms=layers + 1.0)
    assert estimator.rest == "outputs"
    assert estimator.rest_ms == pytest.approx(1.0)
    assert estimator.full_ms == pytest.approx(layers + 1.0)
    half = {"hidden": 16, "heads": 2, "intermediate": 64}
    assert estimator.latency_ms(half) == pytest.approx(exact(structure, half) + 0.5, rel=1e-2)


def test_layers_slower_alone_than_together_are_scaled() -> None:
    structure = block()
    table = synthetic(shapes_of(structure), work)
    layers = Estimator(table, structure).full_ms - 0.01
    whole = Interval(value=0.01 + layers / 2, low=0.0, high=1.0)
    estimator = Estimator(dataclasses.replace(table, whole_ms=whole), structure)
    assert estimator.rest == "scaled"
    assert estimator.full_ms == pytest.approx(whole.value)
    widths = {"intermediate": 8}
    wanted = 0.01 + (exact(structure, {"hidden": 32, "heads": 4, **widths}) - 0.01) / 2
    assert estimator.latency_ms(widths) == pytest.approx(wanted)


def test_a_narrower_model_has_more_of_it_in_the_caches() -> None:
    """Between two working sets the time goes with the logarithm of the bytes of the weights."""
    structure = block()
    whole = structure_bytes(structure, precision="float32")
    table = synthetic(shapes_of(structure), work)
    layers = [
        LayerLatency(shape=x.shape, latency_ms=(x.latency_ms[0], _times(x.latency_ms[0], 3.0)))
        for x in table.layers
    ]
    sets = (whole // 16, whole)
    table = dataclasses.replace(table, working_sets=sets, layers=tuple(layers))
    estimator = Estimator(table, structure)
    for widths in ({}, {"hidden": 16, "heads": 2, "intermediate": 64}, {"intermediate": 8}):
        named = {"hidden": 32, "heads": 4, "intermediate": 128, **widths}
        read = 4 * sum(weight_values(shape) for shape in _at(structure, named))
        colder = np.interp(np.log2(read), np.log2(sets), (1.0, 3.0))
        wanted = 0.01 + (exact(structure, named) - 0.01) * colder
        assert estimator.latency_ms(widths) == pytest.approx(wanted, rel=1e-6)


def _times(interval: Interval, factor: float) -> Interval:
    return Interval(
        value=interval.value * factor, low=interval.low * factor, high=interval.high * factor
    )


def _at(structure: Structure, widths: dict[str, int]) -> list[LayerShape]:
    return [
        resized(
            layer,
            inputs=widths.get(layer.input_group, 0) * layer.input_factor or layer.shape.inputs,
            outputs=widths.get(layer.output_group, 0) * layer.output_factor or layer.shape.outputs,
        )
        for layer in structure.layers
    ]


def test_working_sets_are_those_of_narrower_models() -> None:
    tiny, large = block(), block(hidden=512, heads=8, blocks=6)
    assert working_sets_of(tiny, precision="float32") == (
        structure_bytes(tiny, precision="float32"),
    )
    sets = working_sets_of(large, precision="float32")
    assert list(sets) == sorted(set(sets))
    assert sets[-1] == structure_bytes(large, precision="float32")
    assert len(sets) == 4


def test_layers_slower_alone_count_as_those_of_a_model_that_reads_less() -> None:
    """With a whole model half way between warm and cold, every width is half an octave warmer."""
    structure = block()
    read = structure_bytes(structure, precision="float32")
    table = synthetic(shapes_of(structure), work)
    layers = [
        LayerLatency(shape=x.shape, latency_ms=(x.latency_ms[0], _times(x.latency_ms[0], 2.0)))
        for x in table.layers
    ]
    warm = Estimator(table, structure).full_ms - 0.01
    table = dataclasses.replace(table, working_sets=(read // 2, read), layers=tuple(layers))
    estimator = Estimator(table, structure, whole_ms=0.01 + 1.5 * warm)
    assert estimator.rest == "warmer"
    assert estimator.full_ms == pytest.approx(0.01 + 1.5 * warm)
    narrow = {"hidden": 8, "heads": 1, "intermediate": 8}
    assert estimator.latency_ms(narrow) == pytest.approx(exact(structure, narrow))


def test_nodes_outside_of_the_layers_take_their_time_at_any_width() -> None:
    """Nodes that only begin do not get faster with narrower layers; they go with their blocks."""
    structure = block(blocks=2)
    table = synthetic(shapes_of(structure), work, node_ms=0.002)
    inside = 2 * (4 + 3) + 1
    layers = Estimator(table, structure).full_ms
    assert layers == pytest.approx(
        exact(structure, {"hidden": 32, "heads": 4, "intermediate": 128})
    )
    counted = dataclasses.replace(table, whole_nodes=inside + 22)
    estimator = Estimator(counted, structure, whole_ms=layers + 0.044)
    named = Estimator(table, structure, whole_ms=layers + 0.044, whole_nodes=inside + 22)
    assert named.start_ms == estimator.start_ms
    assert estimator.start_ms == pytest.approx(0.044)
    assert estimator.rest_ms == pytest.approx(0.0, abs=1e-9)
    narrow = {"hidden": 8, "heads": 1, "intermediate": 8}
    assert estimator.latency_ms(narrow) == pytest.approx(exact(structure, narrow) + 0.044)
    gone = estimator.full_ms - estimator.latency_ms({}, blocks=0)
    assert gone == pytest.approx(layers - 0.01 - work(structure.layers[-1].shape) + 0.044 * 10 / 11)


def test_blocks_that_go_take_their_layers_with_them() -> None:
    structure = block(blocks=4)
    estimator = Estimator(synthetic(shapes_of(structure), work), structure)
    outside = 0.01 + work(structure.layers[-1].shape)
    whole = estimator.full_ms
    for blocks in range(5):
        wanted = outside + (whole - outside) * blocks / 4
        assert estimator.latency_ms({}, blocks=blocks) == pytest.approx(wanted)


def test_layers_of_one_form_with_other_widths_do_not_disturb() -> None:
    """Points that another layer put on the plane do not break the rectangle of this one."""
    sizes = {"a": 64, "b": 40, "c": 104}
    groups = tuple(Group(name=n, width=w, multiple=8, scores=(1.0,) * w) for n, w in sizes.items())
    layers = tuple(
        Layer(name=f"{i}{o}", shape=conv(sizes[i], sizes[o]),
              input_group=i, output_group=o)
        for i, o in (("a", "b"), ("b", "c"), ("c", "a"), ("a", "a"))
    )  # fmt: skip
    structure = Structure(groups=groups, layers=layers)
    estimator = Estimator(synthetic(shapes_of(structure, points=4), work), structure)
    widths = {"a": 24, "b": 16, "c": 56}
    tied = work(conv(24, 24))
    bilinear = sum(work(conv(widths[x.input_group], widths[x.output_group])) for x in layers[:3])
    assert estimator.latency_ms(widths) == pytest.approx(0.01 + bilinear + tied, rel=0.1)


def test_a_table_of_the_original_serves_what_was_cut_from_it() -> None:
    structure = block()
    table = synthetic(shapes_of(structure), work)
    narrower = {"hidden": 24, "heads": 3, "intermediate": 40}
    assert Estimator(table, structure).latency_ms(narrower) == pytest.approx(
        exact(structure, narrower)
    )


def test_noise_is_made_monotone_and_a_real_slow_down_stays() -> None:
    """A narrower layer that is slower by less than its interval is noise; by more it is not."""
    group = Group(name="g", width=40, multiple=8, scores=(1.0,) * 40)
    layer = Layer(name="l", shape=linear(40, 8), input_group="g")
    structure = Structure(groups=(group,), layers=(layer,))
    noise = {8: 1.0, 16: 1.01, 24: 1.0, 32: 1.5, 40: 1.49}
    slow = {**noise, 24: 3.0}
    quiet = Estimator(synthetic(shapes_of(structure), lambda s: noise[s.inputs]), structure)
    times = [quiet.latency_ms({"g": width}) for width in (8, 16, 24, 32, 40)]
    assert times == sorted(times)
    bumpy = Estimator(synthetic(shapes_of(structure), lambda s: slow[s.inputs]), structure)
    assert bumpy.latency_ms({"g": 24}) > 2.9


@given(
    st.lists(st.lists(st.floats(0, 100), min_size=4, max_size=4), min_size=1, max_size=6).map(
        np.array
    )
)
def test_monotone_rises_along_both_axes_and_keeps_what_rises(values: np.ndarray) -> None:
    found = monotone(values)
    assert np.all(np.diff(found, axis=0) >= -1e-9)
    assert np.all(np.diff(found, axis=1) >= -1e-9)
    np.testing.assert_allclose(monotone(found), found, atol=1e-9)
    assert found.min() >= values.min() - 1e-9
    assert found.max() <= values.max() + 1e-9
    assert found.sum() == pytest.approx(values.sum())


def test_estimates_are_checked_against_whole_models() -> None:
    structure = block()
    estimator = Estimator(synthetic(shapes_of(structure), work), structure)
    full = estimator.full_ms
    found = validate(
        estimator,
        [Measured(widths={}, latency_ms=full), Measured(widths={}, latency_ms=full / 1.1)],
    )
    assert [check.error for check in found.checks] == pytest.approx([0.0, 0.1])
    assert found.worst_error == pytest.approx(0.1)
    assert record.loads(type(found), record.dumps(found), where="validation") == found


def test_what_does_not_fit_is_refused() -> None:
    structure = block()
    table = synthetic(shapes_of(structure), work)
    estimator = Estimator(table, structure)
    for widths in ({"hiden": 8}, {"hidden": 0}, {"hidden": 33}):
        with pytest.raises(UsageError):
            estimator.latency_ms(widths)
    with pytest.raises(UsageError, match="blocks"):
        estimator.latency_ms({}, blocks=3)
    with pytest.raises(InputError, match=r"0\.query"):
        Estimator(dataclasses.replace(table, layers=()), structure)
    with pytest.raises(InputError, match="call of nothing"):
        Estimator(table, structure, whole_ms=0.001)
    with pytest.raises(InputError, match="positive"):
        validate(estimator, [])
