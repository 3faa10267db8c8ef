"""Equalisation changes weights, never outputs; what lets no factor through stays as it was."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from equipoise.quantize.equalize import EqualizeSettings, equalize
from equipoise.quantize.layers import find_layers, read_array

node, info = helper.make_node, helper.make_tensor_value_info
CHANNELS = 6


def spread(count: int, *, seed: int) -> np.ndarray:
    """Factors that make channels as unlike as folded batch norms do."""
    return np.exp(np.random.default_rng(seed).normal(scale=1.5, size=count)).astype(np.float32)


def arrays(*, seed: int = 0, flat: int = CHANNELS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    first, depthwise, second = (spread(CHANNELS, seed=i).reshape(-1, 1, 1, 1) for i in (1, 2, 3))
    made = {
        "w1": rng.normal(size=(CHANNELS, 3, 3, 3)) * first,
        "b1": rng.normal(size=CHANNELS),
        "dw": rng.normal(size=(CHANNELS, 1, 3, 3)) * depthwise,
        "bd": rng.normal(size=CHANNELS),
        "w2": rng.normal(size=(CHANNELS, CHANNELS, 1, 1)) * second.swapaxes(0, 1),
        "b2": rng.normal(size=CHANNELS),
        "wg": rng.normal(size=(flat, 4)),
        "bg": rng.normal(size=4),
        "slope": rng.uniform(0.1, 0.9, size=(CHANNELS, 1, 1)),
        "zero": np.array(0.0), "six": np.array(6.0), "low": np.array(-8.0),
    }  # fmt: skip
    return {name: array.astype(np.float32) for name, array in made.items()}


def model(nodes: list, constants: dict, *, outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def between(*middle: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """Conv, what is in the middle (from ``a`` to ``b``), Conv."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], name="first", pads=[1, 1, 1, 1]),
        *middle,
        node("Conv", ["b", "w2", "b2"], ["y"], name="second"),
    ]
    return model(nodes, {**arrays(), **constants})


FEEDS = {"x": np.random.default_rng(9).normal(size=(2, 3, 8, 8)).astype(np.float32)}


def run(proto: onnx.ModelProto, feeds: dict | None = None) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, feeds or FEEDS)


def assert_same(before: list[np.ndarray], after: list[np.ndarray]) -> None:
    for wanted, got in zip(before, after, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4 * np.abs(wanted).max())


PASSING = {
    "relu": node("Relu", ["a"], ["b"], name="op"),
    "leaky": node("LeakyRelu", ["a"], ["b"], name="op", alpha=0.2),
    "prelu": node("PRelu", ["a", "slope"], ["b"], name="op"),
    "identity": node("Identity", ["a"], ["b"], name="op"),
    "dropout": node("Dropout", ["a"], ["b"], name="op"),
    "max pool": node("MaxPool", ["a"], ["b"], name="op", kernel_shape=[2, 2], strides=[2, 2]),
    "average pool": node("AveragePool", ["a"], ["b"], name="op", kernel_shape=[3, 3], pads=[1] * 4),
    "global average": node("GlobalAveragePool", ["a"], ["b"], name="op"),
    "global max": node("GlobalMaxPool", ["a"], ["b"], name="op"),
    "mean": node("ReduceMean", ["a", "axes"], ["b"], name="op"),
    "sum from behind": node("ReduceSum", ["a", "behind"], ["b"], name="op"),
}
AXES = {"axes": np.array([2, 3]), "behind": np.array([-1, -2])}


@pytest.mark.parametrize("name", PASSING)
def test_factors_go_through_homogeneous_operators(name: str) -> None:
    """Ranges of the weights on both sides are equal afterwards, and outputs are what they were."""
    proto = between(PASSING[name], **AXES)
    before = run(proto)
    told = equalize(proto)
    assert [(s.writers, s.readers) for s in told.streams] == [(("first",), ("second",))]
    assert told.streams[0].largest_factor > 2
    assert_same(before, run(proto))
    first, second = (np.abs(read_array(proto, n)) for n in ("w1", "w2"))
    np.testing.assert_allclose(first.max(axis=(1, 2, 3)), second.max(axis=(0, 2, 3)), rtol=1e-4)


BLOCKING = {
    "sigmoid": [node("Sigmoid", ["a"], ["b"], name="op")],
    "hard swish": [node("HardSwish", ["a"], ["b"], name="op")],
    "swish": [node("Sigmoid", ["a"], ["s"], name="op"), node("Mul", ["a", "s"], ["b"], name="mul")],
    "a constant": [node("Add", ["a", "six"], ["b"], name="op")],
    "another reader": [
        node("Relu", ["a"], ["b"], name="relu"), node("Tanh", ["b"], ["t"], name="op")
    ],
    "channels mixed": [node("Transpose", ["a"], ["b"], name="op", perm=[0, 1, 3, 2])],
    "channels reduced": [
        node("ReduceMean", ["a", "across"], ["m"], name="op"),
        node("Sub", ["a", "m"], ["b"], name="sub"),
    ],
    "a slope from elsewhere": [
        node("Sigmoid", ["a"], ["s"], name="op"), node("PRelu", ["a", "s"], ["b"], name="prelu")
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKING)
def test_other_operators_hold_everything(name: str) -> None:
    """Not one weight changes."""
    proto = between(*BLOCKING[name], across=np.array([1]))
    before = proto.SerializeToString(deterministic=True)
    told = equalize(proto)
    assert not told.streams
    assert proto.SerializeToString(deterministic=True) == before
    if name == "another reader":
        assert told.skipped[0].reason == "Tanh op lets no factors through"


def test_outputs_of_the_model_are_held() -> None:
    """A tensor that somebody outside reads keeps its scale."""
    proto = between(PASSING["relu"])
    proto.graph.output.append(info("b", TensorProto.FLOAT, None))
    told = equalize(proto)
    assert not told.streams
    assert told.skipped[0].reason == "it is an input or output of the model"


def residual(*, clip: bool = False) -> onnx.ModelProto:
    """A stem, two inverted blocks on one residual sum with depthwise layers, a pooled head."""
    act = ("Clip", ["zero", "six"]) if clip else ("Relu", [])
    nodes = [node("Conv", ["x", "w1", "b1"], ["stem"], name="stem", pads=[1] * 4)]
    constants, total = arrays(), "stem"
    for i in range(2):
        made = arrays(seed=10 + i)
        constants |= {f"{n}.{i}": made[n] for n in ("dw", "bd", "w2", "b2")}
        constants |= {f"up.{i}": made["w2"] / 2, f"bu.{i}": made["b2"]}
        nodes += [
            node("Conv", [total, f"up.{i}", f"bu.{i}"], [f"u{i}"], name=f"up{i}"),
            node(act[0], [f"u{i}", *act[1]], [f"ua{i}"], name=f"up_act{i}"),
            node("Conv", [f"ua{i}", f"dw.{i}", f"bd.{i}"], [f"d{i}"], name=f"depthwise{i}",
                 group=CHANNELS, pads=[1] * 4),
            node(act[0], [f"d{i}", *act[1]], [f"da{i}"], name=f"depthwise_act{i}"),
            node("Conv", [f"da{i}", f"w2.{i}", f"b2.{i}"], [f"p{i}"], name=f"project{i}"),
            node("Add", [f"p{i}", total], [f"sum{i}"], name=f"add{i}"),
        ]  # fmt: skip
        total = f"sum{i}"
    nodes += [
        node("ReduceMean", [total, "axes"], ["mean"], name="pool"),
        node("Reshape", ["mean", "shape"], ["flat"], name="reshape"),
        node("Gemm", ["flat", "wg", "bg"], ["y"], name="head"),
    ]
    constants |= {**AXES, "shape": np.array([-1, CHANNELS])}
    return model(nodes, constants)


def test_a_residual_stream_is_scaled_as_one() -> None:
    """All that writes into the sum and all that reads from it; depthwise layers belong to two."""
    proto = residual()
    before = run(proto)
    told = equalize(proto)
    assert not told.skipped
    assert {s.writers: s.readers for s in told.streams} == {
        ("stem", "project0", "project1"): ("up0", "up1", "head"),
        ("up0",): ("depthwise0",),
        ("depthwise0",): ("project0",),
        ("up1",): ("depthwise1",),
        ("depthwise1",): ("project1",),
    }
    assert 1 < told.sweeps < EqualizeSettings().sweeps
    assert_same(before, run(proto))


def test_a_clip_lets_no_factor_through() -> None:
    """Whether it acts depends on the data to come."""
    proto = residual(clip=True)
    before = run(proto)
    told = equalize(proto)
    assert [s.writers[0] for s in told.streams] == ["stem"]
    assert_same(before, run(proto))


def test_products_are_equalised_and_a_shared_bias_is_split() -> None:
    """Two MatMuls share their bias; the other reader still gets what it had."""
    rng = np.random.default_rng(4)
    constants = {
        "v1": rng.normal(size=(8, CHANNELS)) * spread(CHANNELS, seed=5),
        "v2": rng.normal(size=(CHANNELS, CHANNELS)) * spread(CHANNELS, seed=6)[:, None],
        "v3": rng.normal(size=(CHANNELS, 5)),
        "shared": rng.normal(size=CHANNELS),
    }
    nodes = [
        node("MatMul", ["x", "v1"], ["m1"], name="one"), node("Add", ["shared", "m1"], ["a1"]),
        node("Relu", ["a1"], ["r1"]),
        node("MatMul", ["r1", "v2"], ["m2"], name="two"), node("Add", ["m2", "shared"], ["a2"]),
        node("MatMul", ["a2", "v3"], ["y"], name="three"),
    ]  # fmt: skip
    proto = model(nodes, {n: a.astype(np.float32) for n, a in constants.items()})
    before = run(proto)
    told = equalize(proto)
    assert [s.writers for s in told.streams] == [("one",), ("two",)]
    assert_same(before, run(proto))
    assert len({layer.bias for layer in find_layers(proto)} - {""}) == 2


def test_space_flattened_behind_channels_is_followed() -> None:
    """Each channel is a run of inputs of the Gemm."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], name="first"),
        node("Relu", ["a"], ["r"], name="relu"),
        node("Flatten", ["r"], ["f"], name="flatten"),
        node("Gemm", ["f", "wg", "bg"], ["y"], name="head"),
    ]
    proto = model(nodes, arrays(flat=CHANNELS * 36))
    before = run(proto)
    told = equalize(proto)
    assert told.streams[0].largest_factor > 2
    assert_same(before, run(proto))


def test_a_gate_is_read_and_lets_its_signal_through() -> None:
    """Squeeze and excitation: the gate itself keeps its scale."""
    gate = [
        node("Relu", ["a"], ["r"], name="relu"),
        node("GlobalAveragePool", ["r"], ["g"], name="pool"),
        node("Conv", ["g", "w3", "b2"], ["e"], name="excite"),
        node("Sigmoid", ["e"], ["s"], name="sigmoid"),
        node("Mul", ["s", "r"], ["b"], name="gate"),
    ]
    proto = between(*gate, w3=arrays(seed=7)["w2"])
    before = run(proto)
    told = equalize(proto)
    assert {s.writers: s.readers for s in told.streams} == {("first",): ("excite", "second")}
    assert_same(before, run(proto))


def test_dead_channels_stay_finite() -> None:
    """A channel without weights, and one that lives from its bias."""
    proto = between(PASSING["relu"])
    first = read_array(proto, "w1").copy()
    first[0], first[1] = 0, 1e-12
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(first, "w1"))
    before = run(proto)
    told = equalize(proto)
    assert told.streams[0].largest_factor <= EqualizeSettings().limit
    assert_same(before, run(proto))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), groups=st.sampled_from([1, 2, 3, 6]))
def test_any_grouping_keeps_the_outputs(seed, groups) -> None:
    """Grouped convolutions write and read their own channels."""
    rng = np.random.default_rng(seed)
    grouped = rng.normal(size=(2 * CHANNELS, CHANNELS // groups, 3, 3)).astype(np.float32)
    last = rng.normal(size=(4, 2 * CHANNELS, 1, 1)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], name="first"),
        node("Relu", ["a"], ["r"], name="relu"),
        node("Conv", ["r", "grouped"], ["c"], name="grouped", group=groups),
        node("Conv", ["c", "last"], ["y"], name="last"),
    ]
    proto = model(nodes, {**arrays(seed=seed), "grouped": grouped, "last": last})
    before = run(proto)
    told = equalize(proto)
    assert len(told.streams) == 2
    assert_same(before, run(proto))
