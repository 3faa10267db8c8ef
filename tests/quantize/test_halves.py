"""Half precision: what must stay in float stays, for the measured reason, and the rest is right."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from equipoise import record
from equipoise.errors import DataError, IncompatibleError, ParityError
from equipoise.quantize import halves
from equipoise.quantize.blockwise import BlockGrid
from equipoise.quantize.half_evidence import Fidelity, half_type
from equipoise.quantize.halves import Halves, convert_to_half
from equipoise.quantize.weight_only import WeightOnly, quantize_blocks

node, info = helper.make_node, helper.make_tensor_value_info
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
MASK = float(np.finfo(np.float32).min)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def build(nodes, inputs, outputs, arrays, *, opset: int = 20) -> onnx.ModelProto:
    for index, made in enumerate(nodes):
        made.name = made.name or f"{made.op_type}{index}"
    graph = helper.make_graph(
        nodes,
        "g",
        [info(*value) for value in inputs],
        [info(*value) for value in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(proto: onnx.ModelProto, feeds: dict) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, feeds)


def sqnr(wanted: np.ndarray, got: np.ndarray) -> float:
    noise = np.square(wanted - got.astype(wanted.dtype), dtype=np.float64).sum()
    return 10 * np.log10(np.square(wanted, dtype=np.float64).sum() / max(noise, 1e-30))


def reasons(told) -> dict[str, str]:
    return {kept.name: kept.reason for kept in told.float_nodes}


def measured(told) -> dict[str, str]:
    """Reasons without those that only save casts."""
    return {name: why for name, why in reasons(told).items() if "casts" not in why}


def f32(array) -> np.ndarray:
    return np.asarray(array, dtype=np.float32)


def attention(*, mask: float = MASK, loud: float = 1.0) -> onnx.ModelProto:
    """Masked attention, and a LayerNormalization of values ``loud`` times as large as usual."""
    nodes = [
        node("Gather", ["table", "ids"], ["rows"], name="gather"),
        node("Mul", ["rows", "loud"], ["x"], name="loudness"),
        node("LayerNormalization", ["x", "gain", "shift"], ["h"], name="norm", axis=-1),
        node("MatMul", ["h", "wq"], ["q"], name="query"),
        node("Transpose", ["h"], ["k"], name="turn", perm=[0, 2, 1]),
        node("MatMul", ["q", "k"], ["scores"], name="scores"),
        node("Cast", ["mask"], ["here"], name="here", to=FLOAT),
        node("Sub", ["one", "here"], ["gone"], name="gone"),
        node("Mul", ["gone", "least"], ["bias"], name="bias"),
        node("Unsqueeze", ["bias", "middle"], ["wide"], name="wide"),
        node("Add", ["scores", "wide"], ["masked"], name="add_mask"),
        node("Softmax", ["masked"], ["shares"], name="softmax", axis=-1),
        node("MatMul", ["shares", "h"], ["mixed"], name="mix"),
        node("MatMul", ["mixed", "wo"], ["y"], name="out"),
    ]
    r = rng(1)
    arrays = {
        "table": f32(r.normal(size=(50, 64))), "loud": f32(loud), "gain": f32(np.ones(64)),
        "shift": f32(np.zeros(64)), "wq": f32(r.normal(size=(64, 64)) / 16), "one": f32(1.0),
        "least": f32(mask), "middle": np.array([1]), "wo": f32(r.normal(size=(64, 64)) / 8),
    }  # fmt: skip
    inputs = [("ids", INT64, ["b", "n"]), ("mask", INT64, ["b", "n"])]
    return build(nodes, inputs, [("y", FLOAT, ["b", "n", 64])], arrays)


def padded(count: int, seed: int = 2) -> list[dict]:
    r, rows = rng(seed), []
    for _ in range(count):
        mask = (np.arange(12) < r.integers(3, 13, size=(2, 1))).astype(np.int64)
        rows.append({"ids": r.integers(0, 50, size=(2, 12)), "mask": mask})
    return rows


@pytest.mark.parametrize("mask", [MASK, -1e9])
def test_overflowing_norm_and_mask_come_out_right(mask: float) -> None:
    """Squares of 900 do not fit; a mask of the least float is made smaller and stays a mask."""
    proto = attention(mask=mask, loud=300.0)
    converted, told = convert_to_half(proto, rows=padded(8))
    assert told.masks == ("least",)
    assert "overflows in float16" in reasons(told)["norm"]
    assert set(measured(told)) == {"norm"}
    for feeds in padded(6, seed=3):
        (wanted,), (got,) = run(proto, feeds), run(converted, feeds)
        assert np.isfinite(got).all()
        assert sqnr(wanted, got) > 55
    assert told.outputs[0].sqnr_db > 55
    onnx.checker.check_model(converted, full_check=True)


def test_numpy_in_half_shows_what_was_avoided() -> None:
    """The planted faults are faults: the same steps in float16 give infinity and NaN."""
    values = f32(rng().normal(size=(4, 64))).astype(np.float16) * np.float16(300)
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isinf(np.square(values - values.mean(-1, keepdims=True))).any()
        scores = (np.zeros((1, 4)) + np.float32(MASK)).astype(np.float16)
        assert np.isnan(scores - scores.max()).all()


def test_quiet_norm_becomes_half() -> None:
    """The decision is the data's, not the operator's name."""
    _, told = convert_to_half(attention(), rows=padded(8))
    assert not told.float_nodes
    assert told.half_nodes == 14
    assert told.casts == 1  # the output alone


def test_minus_infinity_is_left_alone() -> None:
    """It is a float16; only 0 * inf would be trouble, so the mask is picked by Where."""
    nodes = [
        node("Where", ["c", "x", "least"], ["m"], name="where"),
        node("Softmax", ["m"], ["y"], name="softmax", axis=-1),
    ]
    inputs = [("c", TensorProto.BOOL, ["n", 8]), ("x", FLOAT, ["n", 8])]
    proto = build(nodes, inputs, [("y", FLOAT, ["n", 8])], {"least": f32(-np.inf)})
    feeds = {"c": rng().random((5, 8)) < 0.6, "x": f32(rng().normal(size=(5, 8)))}
    feeds["c"][:, 0] = True
    converted, told = convert_to_half(proto, Halves(keep_io=False), rows=[feeds])
    assert not told.masks
    assert not told.float_nodes
    halved = {"c": feeds["c"], "x": feeds["x"].astype(np.float16)}
    assert sqnr(run(proto, feeds)[0], run(converted, halved)[0]) > 55


def test_large_constant_that_outputs_show_is_kept() -> None:
    """A factor of a million is no mask: made smaller it would be seen, so its node stays."""
    nodes = [
        node("Mul", ["x", "huge"], ["a"], name="grow"),
        node("Mul", ["a", "tiny"], ["b"], name="shrink"),
        node("MatMul", ["b", "w"], ["y"], name="product"),
    ]
    arrays = {"huge": f32(1e6), "tiny": f32(1e-6), "w": f32(rng().normal(size=(32, 32)))}
    proto = build(nodes, [("x", FLOAT, ["n", 32])], [("y", FLOAT, ["n", 32])], arrays)
    feeds = {"x": f32(rng().normal(size=(6, 32)))}
    converted, told = convert_to_half(proto, rows=[feeds])
    assert not told.masks
    assert "reaches" in reasons(told)["grow"]
    assert set(reasons(told)) == {"grow", "shrink"}
    assert told.casts == 2
    assert sqnr(run(proto, feeds)[0], run(converted, feeds)[0]) > 60


def test_one_mask_of_two_is_shrunk() -> None:
    """Each is tried alone when they do not pass together."""
    nodes = [
        node("Where", ["c", "x", "least"], ["m"], name="where"),
        node("Softmax", ["m"], ["s"], name="softmax", axis=-1),
        node("Mul", ["s", "huge"], ["y"], name="grow"),
    ]
    inputs = [("c", TensorProto.BOOL, ["n", 8]), ("x", FLOAT, ["n", 8])]
    arrays = {"huge": f32(1e6), "least": f32(MASK)}
    proto = build(nodes, inputs, [("y", FLOAT, ["n", 8])], arrays)
    feeds = {"c": rng().random((5, 8)) < 0.6, "x": f32(rng().normal(size=(5, 8)))}
    feeds["c"][:, 0] = True
    _, told = convert_to_half(proto, rows=[feeds])
    assert told.masks == ("least",)
    assert "grow" in reasons(told)


def test_epsilon_below_the_smallest_half_stays_in_float() -> None:
    """A root of a variance near zero needs its 1e-12."""
    nodes = [
        node("Add", ["x", "eps"], ["a"], name="add"),
        node("Sqrt", ["a"], ["b"], name="root"),
        node("MatMul", ["b", "w"], ["y"], name="product"),
    ]
    arrays = {"eps": f32(1e-12), "w": f32(rng().normal(size=(32, 32)))}
    proto = build(nodes, [("x", FLOAT, ["n", 32])], [("y", FLOAT, ["n", 32])], arrays)
    _, told = convert_to_half(proto, rows=[{"x": f32(rng().random((6, 32)))}])
    assert "0 dB" in reasons(told)["add"]
    assert "product" not in reasons(told)


def test_long_sums_stay_short_ones_do_not() -> None:
    """A mean over 100,000 values stands still at 2048 in float16; one over 100 does not."""
    nodes = [
        node("ReduceMean", ["long", "axis"], ["a"], name="long_mean", keepdims=0),
        node("ReduceMean", ["short", "axis"], ["b"], name="short_mean", keepdims=0),
    ]
    proto = build(
        nodes,
        [("long", FLOAT, ["n", 100_000]), ("short", FLOAT, ["n", 100])],
        [("a", FLOAT, ["n"]), ("b", FLOAT, ["n"])],
        {"axis": np.array([1])},
    )
    rows = [{"long": f32(rng().random((2, 100_000))), "short": f32(rng().random((2, 100)))}]
    _, told = convert_to_half(proto, rows=rows)
    assert "sum of 100000 terms" in reasons(told)["long_mean"]
    assert "short_mean" not in measured(told)


def test_products_are_judged_by_their_sums_when_asked() -> None:
    """With half accumulators a product over 20,000 positive terms is lost; with float ones not."""
    proto = build(
        [node("MatMul", ["x", "w"], ["y"], name="product")],
        [("x", FLOAT, ["n", 20_000])],
        [("y", FLOAT, ["n", 4])],
        {"w": f32(rng().random((20_000, 4)) * 0.1)},
    )
    rows = [{"x": f32(rng().random((3, 20_000)))}]
    assert not convert_to_half(proto, rows=rows)[1].float_nodes
    _, told = convert_to_half(proto, Halves(accumulator="half"), rows=rows)
    assert "sum of 20000 terms" in reasons(told)["product"]


def test_numbers_that_become_integers_stay_exact() -> None:
    """4099 is no float16; as a length or an index it has to be."""
    nodes = [
        node("Cast", ["n"], ["f"], name="to_float", to=FLOAT),
        node("Mul", ["f", "one"], ["g"], name="scale"),
        node("Cast", ["g"], ["m"], name="to_int", to=INT64),
        node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    arrays = {"one": f32(1.0), "w": f32(rng().normal(size=(16, 16)))}
    inputs = [("n", INT64, [2]), ("x", FLOAT, ["b", 16])]
    proto = build(nodes, inputs, [("m", INT64, [2]), ("y", FLOAT, ["b", 16])], arrays)
    feeds = {"n": np.array([4099, 12_345]), "x": f32(rng().normal(size=(2, 16)))}
    converted, told = convert_to_half(proto, rows=[feeds])
    assert "integers" in reasons(told)["scale"]
    assert "product" not in reasons(told)
    assert run(converted, feeds)[0].tolist() == [4099, 12_345]


def test_casts_are_shared_and_islands_are_not_worth_theirs() -> None:
    """Two float readers share one cast; a Relu alone between float nodes stays in float."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="product"),
        node("Mul", ["a", "huge"], ["b"], name="grow_1"),
        node("Mul", ["a", "huge"], ["c"], name="grow_2"),
        node("Add", ["b", "c"], ["d"], name="sum"),
        node("Mul", ["d", "tiny"], ["e"], name="shrink"),
        node("Relu", ["e"], ["f"], name="relu"),
        node("Mul", ["f", "huge"], ["y"], name="grow_3"),
    ]
    arrays = {"huge": f32(1e6), "tiny": f32(1e-6), "w": f32(rng().normal(size=(32, 32)))}
    proto = build(nodes, [("x", FLOAT, ["n", 32])], [("y", FLOAT, ["n", 32])], arrays)
    feeds = {"x": f32(rng().normal(size=(6, 32)))}
    converted, told = convert_to_half(proto, rows=[feeds])
    assert "casts" in reasons(told)["relu"]
    assert told.half_nodes == 1
    assert told.casts == 2
    assert [n.op_type for n in converted.graph.node].count("Cast") == 2
    assert sqnr(run(proto, feeds)[0], run(converted, feeds)[0]) > 55


def test_subgraphs_read_floats_from_outside() -> None:
    """The If stays; what its branch captures is there in float32 under its own name."""
    branches = [
        helper.make_graph([node(op, ["a"], [out])], out, [], [info(out, FLOAT, None)])
        for op, out in (("Relu", "p"), ("Neg", "q"))
    ]
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="product"),
        node("If", ["c"], ["b"], name="if", then_branch=branches[0], else_branch=branches[1]),
        node("MatMul", ["b", "w2"], ["y"], name="after"),
    ]
    arrays = {"w": f32(rng().normal(size=(16, 16))), "w2": f32(rng().normal(size=(16, 16)))}
    inputs = [("x", FLOAT, ["n", 16]), ("c", TensorProto.BOOL, [])]
    proto = build(nodes, inputs, [("y", FLOAT, ["n", 16])], arrays)
    for flag in (np.ones((), bool), np.zeros((), bool)):
        feeds = {"x": f32(rng().normal(size=(3, 16))), "c": flag}
        converted, told = convert_to_half(proto, rows=[feeds])
        assert reasons(told)["if"] == "it has a subgraph"
        assert told.half_nodes == 2
        assert sqnr(run(proto, feeds)[0], run(converted, feeds)[0]) > 55
    nodes[1].attribute[0].g.node[0].input[0] = "x"
    proto = build(nodes, inputs, [("y", FLOAT, ["n", 16])], arrays)
    with pytest.raises(IncompatibleError, match="subgraph reads x"):
        convert_to_half(proto, Halves(keep_io=False), rows=[feeds])


def mixed() -> onnx.ModelProto:
    """Unnamed nodes, a Constant node, a ConstantOfShape, a Resize, a Conv with a Clip."""
    half_up = numpy_helper.from_array(f32([1, 1, 2, 2]))
    nodes = [
        node("Conv", ["x", "kernel"], ["a"], pads=[1, 1, 1, 1]),
        node("Clip", ["a", "low", "high"], ["b"]),
        node("Constant", [], ["scales"], value=half_up),
        node("Resize", ["b", "", "scales"], ["c"], mode="nearest"),
        node("Shape", ["c"], ["size"]),
        node("ConstantOfShape", ["size"], ["fill"], value=numpy_helper.from_array(f32([0.5]))),
        node("Add", ["c", "fill"], ["d"]),
        node("GlobalAveragePool", ["d"], ["e"]),
        node("Flatten", ["e"], ["f"]),
        node("Gemm", ["f", "dense"], ["y"], transB=1),
    ]
    arrays = {
        "kernel": f32(rng().normal(size=(8, 3, 3, 3)) / 5), "low": f32(0), "high": f32(6),
        "dense": f32(rng().normal(size=(10, 8))),
    }  # fmt: skip
    proto = build(
        nodes, [("x", FLOAT, ["n", 3, 8, 8])], [("y", FLOAT, ["n", 10])], arrays, opset=19
    )
    for made in proto.graph.node:
        made.name = ""
    return proto


def pictures(count: int = 4) -> list[dict]:
    return [{"x": f32(rng(i).normal(size=(1, 3, 8, 8)))} for i in range(count)]


def test_all_of_a_small_cnn_is_half_with_half_ends() -> None:
    """Types of inputs and outputs follow by option; names never change."""
    proto = mixed()
    converted, told = convert_to_half(proto, Halves(keep_io=False), rows=pictures())
    assert not told.float_nodes
    assert told.casts == 0
    ends = [*converted.graph.input, *converted.graph.output]
    assert [(v.name, v.type.tensor_type.elem_type) for v in ends] == [
        ("x", TensorProto.FLOAT16), ("y", TensorProto.FLOAT16),
    ]  # fmt: skip
    (feeds,) = pictures(1)
    got = run(converted, {"x": feeds["x"].astype(np.float16)})[0]
    assert sqnr(run(proto, feeds)[0], got) > 50
    onnx.checker.check_model(converted, full_check=True)
    kept, told = convert_to_half(proto, rows=pictures())
    assert told.casts == 2
    assert kept.graph.input[0].type.tensor_type.elem_type == FLOAT


def test_bfloat16_raises_the_opset_and_is_compared_by_rounding() -> None:
    """ONNX Runtime has no such kernels on CPUs; a float model that rounds stands in."""
    converted, told = convert_to_half(mixed(), Halves(dtype="bfloat16"), rows=pictures())
    assert told.emulated
    assert converted.opset_import[0].version == 22
    types = {t.data_type for t in converted.graph.initializer if t.dims[1:]}
    assert types == {TensorProto.BFLOAT16}
    assert 25 < told.outputs[0].sqnr_db < 60
    loud, told = convert_to_half(
        attention(loud=300.0), Halves(dtype="bfloat16", minimum_sqnr_db=20), rows=padded(4)
    )
    assert told.masks == ("least",)  # the least float32 rounds to minus infinity
    assert "overflow" not in " ".join(reasons(told).values())
    assert told.outputs[0].sqnr_db > 25
    onnx.checker.check_model(loud)


def test_operators_of_onnxruntime_become_half() -> None:
    """Fused layers too, whose types inference does not know, and weights in blocks."""
    nodes = [
        node("Gather", ["table", "ids"], ["x"], name="gather"),
        node("MatMul", ["x", "w"], ["a"], name="product"),
        node("BiasGelu", ["a", "bias"], ["b"], name="gelu", domain="com.microsoft"),
        node(
            "SkipLayerNormalization", ["b", "x", "gain", "bias"], ["c", "", "", "d"], name="skip",
            domain="com.microsoft", epsilon=1e-5,
        ),
        node("Add", ["c", "d"], ["e"], name="sum"),
        node("MatMul", ["e", "w2"], ["y"], name="after"),
    ]  # fmt: skip
    arrays = {
        "table": f32(rng(4).normal(size=(40, 64))), "w": f32(rng().normal(size=(64, 64)) / 8),
        "bias": f32(rng().normal(size=64)), "gain": f32(np.ones(64)),
        "w2": f32(rng(5).normal(size=(64, 64)) / 8),
    }  # fmt: skip
    proto = build(nodes, [("ids", INT64, ["b", "n"])], [("y", FLOAT, ["b", "n", 64])], arrays)
    feeds = {"ids": rng().integers(0, 40, size=(2, 9))}
    converted, told = convert_to_half(proto, rows=[feeds])
    assert told.half_nodes == 6
    assert sqnr(run(proto, feeds)[0], run(converted, feeds)[0]) > 55
    scheme = WeightOnly(grid=BlockGrid(bits=8), tables="blocks")
    blocks, _ = quantize_blocks(proto, scheme)
    converted, told = convert_to_half(blocks, rows=[feeds])
    assert told.half_nodes == 6
    assert told.casts == 1
    assert sqnr(run(blocks, feeds)[0], run(converted, feeds)[0]) > 55


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=40))
def test_measured_rounding_is_that_of_the_type(values: list[float]) -> None:
    """Within range nothing overflows, and the relative error of normal numbers is at most 2^-11."""
    half = half_type("float16")
    array = f32(values)
    rounded = half.rounded(array)
    normal = np.abs(array) >= 2.0**-14
    assert (np.abs(rounded - array)[normal] <= np.abs(array)[normal] * 2.0**-11).all()
    found = Fidelity()
    found.store(array, half)
    assert not found.overflowed
    assert found.largest == np.abs(array).max()
    found.store(f32([7e4]), half)
    assert found.overflowed


def test_failures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No samples; and a result that is not finite is never given out."""
    with pytest.raises(DataError, match="none"):
        convert_to_half(attention(), rows=[])
    monkeypatch.setattr(halves, "_reasons", lambda *_: {})
    proto = build(
        [node("Mul", ["x", "huge"], ["y"], name="grow")],
        [("x", FLOAT, ["n"])],
        [("y", FLOAT, ["n"])],
        {"huge": f32(3e4)},
    )
    with pytest.raises(ParityError, match="not finite in float16"):
        convert_to_half(proto, Halves(keep_io=False), rows=[{"x": f32([1, 30])}])


def test_record_survives_json_and_the_model_is_not_touched() -> None:
    """The caller's model is the reference of everything after."""
    proto = attention()
    before = proto.SerializeToString(deterministic=True)
    _, told = convert_to_half(proto, rows=padded(3))
    assert proto.SerializeToString(deterministic=True) == before
    assert record.loads(type(told), record.dumps(told), where="here") == told
    chosen = Halves(dtype="bfloat16", headroom=4.0)
    assert record.loads(Halves, record.dumps(chosen), where="here") == chosen
