"""Bias correction takes off the mean error that quantisation adds, and says where it cannot."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from equipoise.quantize.bias import expected_shifts, subtract_shifts
from equipoise.quantize.grids import activation_grid, weight_grid
from equipoise.quantize.layers import find_layers, read_array
from equipoise.quantize.observe import observing
from equipoise.quantize.qdq import IntegerWeight, Placement, write_qdq

node, info = helper.make_node, helper.make_tensor_value_info


def model() -> onnx.ModelProto:
    """Convs, a Gemm, MatMuls; the grouped Conv, the Gemm and the last MatMul have no bias."""
    rng = np.random.default_rng(0)
    constants = {
        "w1": rng.normal(size=(8, 3, 3, 3)), "b1": rng.normal(size=8),
        "w2": rng.normal(size=(8, 2, 3, 3)),
        "w3": rng.normal(size=(8, 12)),
        "w4": rng.normal(size=(12, 10)), "b4": rng.normal(size=10), "w5": rng.normal(size=(10, 4)),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], name="conv", pads=[1] * 4),
        node("Relu", ["c1"], ["r1"], name="relu1"),
        node("Conv", ["r1", "w2"], ["c2"], name="grouped", group=4, strides=[2, 2]),
        node("Relu", ["c2"], ["r2"], name="relu2"),
        node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flatten"),
        node("Gemm", ["f", "w3"], ["g"], name="gemm"),
        node("Relu", ["g"], ["r3"], name="relu3"),
        node("MatMul", ["r3", "w4"], ["m4"], name="matmul"),
        node("Add", ["b4", "m4"], ["a4"], name="add"),
        node("MatMul", ["a4", "w5"], ["y"], name="last"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", 3, 9, 9])],
        [info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def rows(count: int = 24, *, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Inputs whose mean is not zero, as those behind a Relu."""
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(1, 1, size=(1, 3, 9, 9)).astype(np.float32)} for _ in range(count)]


def coarse(proto: onnx.ModelProto) -> dict[str, IntegerWeight]:
    """All weights at 3 bits, which shifts every channel."""
    weights = {}
    for layer in find_layers(proto):
        stored = read_array(proto, layer.weight)
        others = tuple(i for i in range(stored.ndim) if i != layer.channel_axis)
        grid = weight_grid(np.abs(stored).max(axis=others), axis=layer.channel_axis, bits=3)
        weights[layer.weight] = IntegerWeight(values=grid.quantize(stored), grid=grid)
    return weights


def quantized(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Its coarse form with 16-bit activations, which add next to nothing of their own."""
    layers = find_layers(proto)
    with observing(proto, [layer.input for layer in layers]) as observe:
        seen = [observe(row) for row in rows()]
    grids = {
        name: activation_grid(
            min(float(s[name].min()) for s in seen), 2 * max(float(s[name].max()) for s in seen),
            dtype="uint16", symmetric=False,
        )
        for name in seen[0]
    }  # fmt: skip
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    nodes = frozenset(layer.name for layer in layers)
    write_qdq(
        made,
        Placement(nodes=nodes, activations=grids, weights=coarse(proto), quantize_outputs=False),
    )
    next(o for o in made.opset_import if o.domain == "").version = 21  # 16 bits
    made.ir_version = 10
    return made


def means(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    layers = find_layers(proto)
    with observing(proto, [layer.input for layer in layers]) as observe:
        seen = [observe(row) for row in rows()]
    return {
        layer.name: np.concatenate([layer.patches(s[layer.input]) for s in seen], 1).mean(axis=1)
        for layer in layers
    }


def ends(proto: onnx.ModelProto) -> dict[str, str]:
    """Name of a layer -> name of the node that gives its output, bias included."""
    producers = {name: n.name for n in proto.graph.node for name in n.output}
    return {layer.name: producers[layer.result] for layer in find_layers(proto)}


def mean_outputs(proto: onnx.ModelProto, of: dict[str, str]) -> dict[str, np.ndarray]:
    """Mean of each output channel; tensors have other names in a quantised form, nodes have not."""
    outputs = {n.name: n.output[0] for n in proto.graph.node}
    names = {layer: outputs[name] for layer, name in of.items()}
    with observing(proto, names.values()) as observe:
        seen = [observe(row) for row in rows()]
    joined = {layer: np.concatenate([s[name] for s in seen]) for layer, name in names.items()}
    return {
        layer: array.mean(axis=tuple(axis for axis in range(array.ndim) if axis != 1))
        for layer, array in joined.items()
    }


def shifts(float_model: onnx.ModelProto, other: onnx.ModelProto) -> dict[str, np.ndarray]:
    of = ends(float_model)
    wanted, found = mean_outputs(float_model, of), mean_outputs(other, of)
    return {name: found[name] - wanted[name] for name in wanted}


def test_the_expected_shift_is_the_one_that_is_seen() -> None:
    """Of a model with rounded weights in one layer alone: convolutions, groups, products."""
    proto, weights = model(), coarse(model())
    expected = expected_shifts(proto, means(proto), weights=weights)
    assert set(expected) == {layer.name for layer in find_layers(proto)}
    for layer in find_layers(proto):
        rounded = onnx.ModelProto()
        rounded.CopyFrom(proto)
        integer = weights[layer.weight]
        values = integer.grid.dequantize(integer.values)
        tensor = next(t for t in rounded.graph.initializer if t.name == layer.weight)
        tensor.CopyFrom(numpy_helper.from_array(values, layer.weight))
        seen = shifts(proto, rounded)[layer.name]
        assert np.abs(seen).max() > 0.01
        np.testing.assert_allclose(expected[layer.name], seen, rtol=1e-3, atol=1e-3)


def test_subtracting_makes_biases_where_there_were_none() -> None:
    """A Conv and a Gemm get one; a MatMul without an Add is named with the reason."""
    proto = model()
    layers = find_layers(proto)
    of = ends(proto)
    before = mean_outputs(proto, of)
    wanted = {layer.name: np.arange(layer.channels) / 10 for layer in layers[:3]}
    told = subtract_shifts(proto, {**wanted, "last": np.ones(4)})
    assert told.corrected == ("conv", "grouped", "gemm")
    assert [(u.name, u.reason) for u in told.uncorrected] == [
        ("last", "no Add of a constant follows it")
    ]
    after = mean_outputs(proto, of)
    np.testing.assert_allclose(after["conv"], before["conv"] - wanted["conv"], atol=1e-4)
    assert len(proto.graph.node[2].input) == 3
    onnx.checker.check_model(proto)


def test_a_bias_that_others_read_stays_theirs() -> None:
    """The corrected layer gets its own; a bias of one number becomes one per channel."""
    proto = model()
    proto.graph.node.append(node("Identity", ["b4"], ["other"], name="other"))
    proto.graph.node[0].input[2] = "one"
    proto.graph.initializer.append(numpy_helper.from_array(np.full(1, 2, np.float32), "one"))
    kept = read_array(proto, "b4").copy()
    subtract_shifts(proto, {"matmul": np.ones(10), "conv": np.arange(8.0)})
    conv, *_, matmul, _ = find_layers(proto)
    assert matmul.bias == "matmul.own_bias"
    np.testing.assert_array_equal(read_array(proto, "b4"), kept)
    np.testing.assert_allclose(read_array(proto, matmul.bias), kept - 1, rtol=1e-6)
    np.testing.assert_array_equal(read_array(proto, conv.bias), 2 - np.arange(8.0))


def test_a_bias_that_is_computed_is_left_and_named() -> None:
    """Nobody can subtract from it ahead of time."""
    proto = model()
    proto.graph.node.insert(0, node("Abs", ["b1"], ["computed"], name="abs"))
    proto.graph.node[1].input[2] = "computed"
    told = subtract_shifts(proto, {"conv": np.ones(8)})
    assert told.uncorrected[0].reason == "its bias is not one constant per channel"


def test_what_is_expected_takes_most_of_the_shift_off() -> None:
    """Also from layers behind others, and at the output, on unseen rows as well."""
    proto = model()
    plain = shifts(proto, quantized(proto))
    corrected = onnx.ModelProto()
    corrected.CopyFrom(proto)
    subtract_shifts(corrected, expected_shifts(proto, means(proto), weights=coarse(proto)))
    left = shifts(proto, quantized(corrected))
    for name in ("conv", "grouped", "gemm"):
        assert np.abs(left[name]).mean() < 0.5 * np.abs(plain[name]).mean()
