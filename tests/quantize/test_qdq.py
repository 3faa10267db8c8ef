"""Graphs with Q/DQ compute what NumPy computes on the grids, in ONNX Runtime at both ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from equipoise.quantize.grids import activation_grid, weight_grid
from equipoise.quantize.layers import find_layers, read_array
from equipoise.quantize.observe import observing
from equipoise.quantize.qdq import IntegerWeight, Placement, absorb_activations, write_qdq

node, info = helper.make_node, helper.make_tensor_value_info
LEVELS = onnxruntime.GraphOptimizationLevel
LOWEST, HIGHEST = LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL
RNG = np.random.default_rng(0)
X = RNG.normal(1, 1, size=(2, 3, 8, 8)).astype(np.float32)


def model(nodes: list, constants: dict, *, outputs=("y",)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def network(*, act: str = "Clip") -> onnx.ModelProto:
    """Conv, activation, depthwise, Conv, residual Add, pool, Gemm: what placement has to handle."""
    bounds = ["zero", "six"] if act == "Clip" else []
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1] * 4),
        node(act, ["c1", *bounds], ["a1"], name="act1"),
        node("Conv", ["a1", "w2"], ["c2"], name="depthwise", group=8, pads=[1] * 4),
        node(act, ["c2", *bounds], ["a2"], name="act2"),
        node("Conv", ["a2", "w3", "b3"], ["c3"], name="conv3"),
        node("Add", ["c3", "a1"], ["s"], name="add"),
        node("GlobalAveragePool", ["s"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flatten"),
        node("Gemm", ["f", "w4", "b4"], ["y"], name="gemm"),
    ]
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 1, 3, 3), "w3": (8, 8, 1, 1), "w4": (8, 5)}
    constants = {n: RNG.normal(size=s) / np.sqrt(np.prod(s[1:])) for n, s in shapes.items()}
    biases = {"b1": RNG.normal(size=8), "b3": RNG.normal(size=8), "b4": RNG.normal(size=(1, 5))}
    return model(nodes, {**constants, **biases, "zero": 0.0, "six": 6.0})


def placed(proto: onnx.ModelProto, nodes: set[str], **changes: bool) -> Placement:
    """Grids by the extremes on ``X``; weights at 7 bits, which cannot saturate."""
    constants = {t.name for t in proto.graph.initializer}
    names = dict.fromkeys(
        name for n in proto.graph.node for name in (*n.input, *n.output) if name not in constants
    )
    with observing(proto, names) as observe:
        seen = observe({"x": X})
    weights = {}
    for layer in find_layers(proto):
        stored = read_array(proto, layer.weight)
        others = tuple(i for i in range(stored.ndim) if i != layer.channel_axis)
        grid = weight_grid(np.abs(stored).max(axis=others), axis=layer.channel_axis, bits=7)
        weights[layer.weight] = IntegerWeight(values=grid.quantize(stored), grid=grid)
    made = Placement(
        nodes=frozenset(nodes),
        activations={
            name: activation_grid(float(a.min()), float(a.max()), dtype="uint8", symmetric=False)
            for name, a in seen.items()
        },
        weights=weights,
    )
    return replace(made, **changes)


def written(proto: onnx.ModelProto, placement: Placement) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    write_qdq(made, placement)
    return made


def run(proto: onnx.ModelProto, *, level=HIGHEST) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, {"x": X})


def optimized(proto: onnx.ModelProto, path) -> list[str]:
    """Operators that the runtime is left with."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return [n.op_type for n in onnx.load(path).graph.node]


def sqnr(wanted: np.ndarray, got: np.ndarray) -> float:
    noise = np.square(wanted - got, dtype=np.float64).sum()
    return 10 * np.log10(np.square(wanted, dtype=np.float64).sum() / max(noise, 1e-30))


ALL = {"conv1", "depthwise", "conv3", "add", "pool", "flatten", "gemm"}


@pytest.mark.parametrize("act", ["Clip", "Relu"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"integer_bias": False}, {"quantize_outputs": False, "absorbs_clips": False},
     {"absorbs_clips": False},
     {"quantize_outputs": False, "absorbs_clips": False, "fuses_adds": True}],
    ids=str,
)  # fmt: skip
def test_every_form_is_near_the_float_model_at_both_levels(act: str, changes: dict) -> None:
    """And the same whether or not the runtime rewrites it."""
    proto = network(act=act)
    made = written(proto, placed(proto, ALL, **changes))
    (wanted,) = run(proto)
    (high,), (low,) = run(made), run(made, level=LOWEST)
    assert sqnr(wanted, high) > 25
    assert sqnr(wanted, low) > 25
    assert sqnr(low, high) > 30


CHOICES = [{"conv1"}, {"depthwise"}, {"conv3", "add"}, {"gemm"}, ALL - {"conv3"}]


@pytest.mark.parametrize("names", CHOICES, ids=lambda names: "+".join(sorted(names)))
def test_any_choice_of_nodes_is_a_sound_graph(names: set[str]) -> None:
    """The others stay in float, with float weights."""
    proto = network()
    made = written(proto, placed(proto, names))
    assert sqnr(run(proto)[0], run(made, level=LOWEST)[0]) > 25
    assert sqnr(run(proto)[0], run(made)[0]) > 25
    constants = {t.name for t in made.graph.initializer}
    weight_of = {"conv1": "w1", "depthwise": "w2", "conv3": "w3", "gemm": "w4"}
    for name, weight in weight_of.items():
        assert (weight in constants) == (name not in names)


def test_all_runs_in_integers(tmp_path) -> None:
    """No convolution, product or Add is left in float, and no Clip between them."""
    proto = network()
    left = optimized(written(proto, placed(proto, ALL)), tmp_path / "o.onnx")
    assert left.count("QLinearConv") == 3
    assert {"QLinearAdd", "QGemm"} <= set(left)
    assert not {"Conv", "Gemm", "Add", "Clip"} & set(left)


def test_one_layer_is_exactly_what_its_grids_say() -> None:
    """Integers of the weights and of the bias, rounded input: NumPy in float64."""
    proto = network()
    placement = placed(proto, {"conv1"}, absorbs_clips=False)
    (layer, *_) = find_layers(proto)
    made = written(proto, placement)
    with observing(made, ["c1"], threads=1) as observe:
        got = layer.flat_output(observe({"x": X})["c1"])
    weight, grid = placement.weights["w1"], placement.activations["x"]
    rows = layer.rows(weight.grid.dequantize(weight.values)).astype(np.float64)
    scale = grid.scale * weight.grid.scale
    bias = np.rint(read_array(proto, "b1") / scale) * scale
    wanted = layer.patches(grid.round(X).astype(np.float64))[0] @ rows[0].T + bias
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_bias_far_beyond_its_weights_is_kept() -> None:
    """A dead channel: weights of 1e-12 and a bias of 7 would not fit into int32."""
    proto = network()
    weight, bias = read_array(proto, "w1").copy(), read_array(proto, "b1").copy()
    weight[2], bias[2], weight[3], bias[3] = 1e-12, 7.0, 0.0, -3.0
    for name, array in (("w1", weight), ("b1", bias)):
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    made = written(proto, placed(proto, {"conv1"}, absorbs_clips=False))
    with observing(made, ["c1"]) as observe:
        got = observe({"x": X})["c1"]
    np.testing.assert_allclose(got[:, 2], 7.0, rtol=1e-3)
    np.testing.assert_allclose(got[:, 3], -3.0, atol=0.02)  # no weight, so a scale of one
    assert sqnr(run(proto)[0], run(made)[0]) > 25


def test_outputs_and_inputs_of_the_model_keep_their_names() -> None:
    """Also an output that other nodes read, and one that an absorbed Clip would take away."""
    proto = network()
    for name in ("c1", "s"):
        proto.graph.output.append(info(name, TensorProto.FLOAT, None))
    made = written(proto, placed(proto, ALL))
    assert [v.name for v in made.graph.output] == ["y", "c1", "s"]
    for level in (LOWEST, HIGHEST):
        for wanted, got in zip(run(proto), run(made, level=level), strict=True):
            assert sqnr(wanted, got) > 25


def head(kind: str) -> onnx.ModelProto:
    """A layer with an activation that a float node reads."""
    layers = {
        "Gemm": node("Gemm", ["f", "w", "b"], ["g"], name="layer"),
        "Conv": node("Conv", ["x", "k", "b"], ["g"], name="layer"),
    }
    nodes = [
        node("Flatten", ["x"], ["f"], name="flatten"),
        layers[kind],
        node("Relu", ["g"], ["r"], name="relu"),
        node("Exp", ["r"], ["y"], name="exp"),
    ]
    shapes = {"w": (192, 6), "k": (6, 3, 3, 3), "b": (6,)}
    return model(nodes, {n: RNG.normal(size=s) / 8 for n, s in shapes.items()})


@pytest.mark.parametrize("kind", ["Conv", "Gemm"])
@pytest.mark.parametrize(
    "changes", [{}, {"quantize_outputs": False}, {"integer_bias": False}], ids=str
)
def test_no_activation_is_absorbed_that_nothing_else_does(changes: dict, kind: str) -> None:
    """A product gives float out, and without rounded outputs any layer does: its Relu stays."""
    proto = head(kind)
    made = written(proto, placed(proto, {"layer"}, **changes))
    (wanted,), (got,) = run(proto), run(made, level=LOWEST)
    assert got.min() >= 1
    np.testing.assert_allclose(np.log(got), np.log(wanted), atol=0.2)


def test_a_clip_stays_when_the_grid_goes_beyond_it() -> None:
    """A grid that ends at 8 does not do what a bound of 6 does."""
    proto = network()
    placement = placed(proto, ALL)
    wide = activation_grid(0, 8, dtype="uint8", symmetric=False)
    within = activation_grid(0, 6, dtype="uint8", symmetric=False)
    signed = activation_grid(-1, 6, dtype="uint8", symmetric=False)
    for grid, removed in ((wide, 0), (signed, 0), (within, 1)):
        made = onnx.ModelProto()
        made.CopyFrom(proto)
        grids = {**placement.activations, "a1": grid}
        del grids["a2"]
        assert absorb_activations(made, frozenset(ALL), grids) == removed


def test_layers_that_stay_in_float_are_not_rounded_by_the_runtime(tmp_path) -> None:
    """ONNX Runtime takes a float Conv between integers for one that was to be quantised."""
    proto = network()
    made = written(proto, placed(proto, ALL - {"conv3"}))
    assert optimized(made, tmp_path / "o.onnx").count("QLinearConv") == 2


def test_unread_constants_go_and_read_ones_stay() -> None:
    """A float weight that somebody else reads is theirs."""
    proto = network()
    proto.graph.node.append(node("Identity", ["b1"], ["other"], name="other"))
    proto.graph.output.append(info("other", TensorProto.FLOAT, None))
    made = written(proto, placed(proto, ALL))
    names = {t.name for t in made.graph.initializer}
    assert "b1" in names
    assert not {"w1", "w2", "w3", "w4", "b3", "b4"} & names
    np.testing.assert_array_equal(run(made)[1], read_array(proto, "b1"))
