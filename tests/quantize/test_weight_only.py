"""Files with weights in blocks: ONNX Runtime restores what NumPy restores, in every form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from equipoise import onnxio, record
from equipoise.errors import DataError, NonFiniteError, RecipeError, SourceError
from equipoise.quantize.blocked_form import pack
from equipoise.quantize.blockwise import BlockGrid, Gptq, HalfQuadratic, Nearest
from equipoise.quantize.layers import find_layers, read_array, write_array
from equipoise.quantize.weight_only import (
    WeightOnly,
    choose_blocks,
    quantize_blocks,
)

node, info = helper.make_node, helper.make_tensor_value_info
RNG = np.random.default_rng(0)
ROWS, WIDTH, HIDDEN, OUT = 60, 100, 96, 41


def weights() -> dict[str, np.ndarray]:
    made = {
        "table": RNG.normal(size=(ROWS, WIDTH)), "first": RNG.standard_t(4, size=(WIDTH, HIDDEN)),
        "shift": RNG.normal(size=HIDDEN), "second": RNG.normal(size=(OUT, HIDDEN)),
        "bias": RNG.normal(size=OUT), "tail": RNG.normal(size=(OUT, 30)),
    }  # fmt: skip
    return {name: (array / 4).astype(np.float32) for name, array in made.items()}


def model(*, opset: int = 20, arrays: dict | None = None) -> onnx.ModelProto:
    """A Gather, a MatMul with an Add, a Gemm with transB and bias, a Gemm without either."""
    nodes = [
        node("Gather", ["table", "ids"], ["embedded"], name="lookup"),
        node("MatMul", ["embedded", "first"], ["product"], name="matmul"),
        node("Add", ["product", "shift"], ["shifted"], name="add"),
        node("Relu", ["shifted"], ["hidden"], name="relu"),
        node("Gemm", ["hidden", "second", "bias"], ["logits"], name="gemm", transB=1),
        node("Gemm", ["logits", "tail"], ["y"], name="tail_gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("ids", TensorProto.INT64, ["n"])],
        [info("y", TensorProto.FLOAT, ["n", 30])],
        [numpy_helper.from_array(a, n) for n, a in (arrays or weights()).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


FEEDS = [{"ids": RNG.integers(-ROWS, ROWS, size=9)} for _ in range(6)]
LEVELS = onnxruntime.GraphOptimizationLevel
LOWEST, HIGHEST = LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL


def run(proto: onnx.ModelProto, feeds: list, *, level=HIGHEST, exact: bool = False) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return np.concatenate([session.run(None, row)[0] for row in feeds])


def sqnr(wanted: np.ndarray, got: np.ndarray) -> float:
    noise = np.square(wanted - got, dtype=np.float64).sum()
    return 10 * np.log10(np.square(wanted, dtype=np.float64).sum() / max(noise, 1e-30))


def restored(scheme: WeightOnly, proto: onnx.ModelProto, rows=()) -> onnx.ModelProto:
    """The float model with the products' weights that NumPy restores from the blocks."""
    layers = find_layers(proto)
    chosen, _ = choose_blocks(proto, layers, scheme=scheme, rows=rows)
    for layer in layers:
        write_array(proto, layer.weight, layer.stored(chosen[layer.weight].weight()[None]))
    return proto


@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block_size", [0, 16, 32, 64, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_form_agrees_with_numpy(bits, block_size, symmetric, form) -> None:
    """At both ends of the runtime's optimisation; inputs of 100, 96 and 41 leave ragged blocks."""
    grid = BlockGrid(bits=bits, block_size=block_size, symmetric=symmetric)
    scheme = WeightOnly(grid=grid, form=form, tables="float")
    made, told = quantize_blocks(model(arrays=(arrays := weights())), scheme)
    assert [weight.name for weight in told.weights] == ["first", "second", "tail"]
    wanted = run(restored(scheme, model(arrays=arrays)), FEEDS)
    if form == "qdq":
        onnx.checker.check_model(made, full_check=True)
    # ONNX Runtime fuses standard blocks into kernels that round activations to int8.
    assert sqnr(wanted, run(made, FEEDS, level=LOWEST)) > 100
    assert sqnr(wanted, run(made, FEEDS)) > (35 if form == "qdq" else 100)
    assert sqnr(wanted, run(made, FEEDS, exact=True)) > (35 if form == "qdq" else 100)
    assert not {"first", "second", "tail"} & {t.name for t in made.graph.initializer}


@pytest.mark.parametrize("block_size", [0, 16, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_tables_in_blocks_agree_with_numpy(bits, symmetric, block_size) -> None:
    """GatherBlockQuantized, negative ids included."""
    grid = BlockGrid(bits=bits, block_size=block_size, symmetric=symmetric)
    scheme = WeightOnly(grid=grid, tables="blocks")
    made, told = quantize_blocks(model(arrays=(arrays := weights())), scheme)
    assert told.weights[-1].name == "table"
    floats = restored(scheme, model(arrays=arrays))
    from equipoise.quantize.blockwise import round_to_nearest

    write_array(floats, "table", round_to_nearest(arrays["table"], grid).weight())
    for level in (LOWEST, HIGHEST):
        assert sqnr(run(floats, FEEDS), run(made, FEEDS, level=level)) > 100
    held = sum(len(t.raw_data) for t in made.graph.initializer)
    assert held < (0.35 if bits == 4 else 0.5) * sum(a.nbytes for a in arrays.values())


def test_tables_as_rows_and_accuracy_levels() -> None:
    """int8 rows by default; level 4 rounds activations and says so in the file."""
    made, told = quantize_blocks(model(), WeightOnly(grid=BlockGrid(bits=8), accuracy_level=4))
    assert told.int8_tables == 1
    wanted = run(made, FEEDS)
    levels = [a.i for n in made.graph.node for a in n.attribute if a.name == "accuracy_level"]
    assert levels == [4, 4, 4]
    for n in made.graph.node:
        for a in n.attribute:
            a.i = 0 if a.name == "accuracy_level" else a.i
    assert 30 < sqnr(run(made, FEEDS), wanted) < 90


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=33))
def test_packing_puts_the_first_code_in_the_low_half(codes: list[int]) -> None:
    """As ONNX defines INT4 and as ONNX Runtime reads its own operators."""
    packed = pack(np.array(codes, dtype=np.uint8), 4)
    unpacked = np.stack([packed & 15, packed >> 4], axis=-1).ravel()[: len(codes)]
    assert unpacked.tolist() == codes
    assert packed.size == -(-len(codes) // 2)


def correlated(count: int) -> list[dict]:
    """Ids of which a few are frequent."""
    return [{"ids": RNG.integers(0, 12, size=20)} for _ in range(count)]


def test_gptq_beats_rounding_on_fresh_rows_and_in_bounded_memory() -> None:
    """One Hessian at a time gives what all at once give."""
    arrays, rows = weights(), correlated(12)
    found = {}
    for name, algorithm in {
        "rtn": Nearest(), "hqq": HalfQuadratic(), "gptq": Gptq(), "tight": Gptq(hessian_bytes=1),
    }.items():  # fmt: skip
        scheme = WeightOnly(algorithm=algorithm, tables="float")
        made, told = quantize_blocks(model(arrays=arrays), scheme, rows=rows)
        found[name] = made, told.passes
    assert [passes for _, passes in found.values()] == [0, 0, 1, 3]
    fresh = correlated(30)
    wanted = run(model(arrays=arrays), fresh)
    quality = {name: sqnr(wanted, run(made, fresh)) for name, (made, _) in found.items()}
    assert quality["gptq"] > quality["rtn"] + 3
    assert quality["gptq"] > quality["hqq"] + 3
    assert quality["tight"] == pytest.approx(quality["gptq"], abs=0.1)


def test_layers_that_share_an_input_share_a_hessian() -> None:
    """Query, key and value read the same activations: one pass, whatever the order of the graph."""
    parts = [RNG.normal(size=(64, 64)).astype(np.float32) for _ in range(4)]
    nodes = [
        node("MatMul", ["x", "w0"], ["a"], name="a"),
        node("MatMul", ["a", "w1"], ["b"], name="b"),
        node("MatMul", ["x", "w2"], ["c"], name="c"),
        node("Add", ["b", "c"], ["s"], name="s"),
        node("MatMul", ["s", "w3"], ["y"], name="y"),
    ]
    tensors = [numpy_helper.from_array(a, f"w{i}") for i, a in enumerate(parts)]
    ends = [info("x", TensorProto.FLOAT, ["n", 64])], [info("y", TensorProto.FLOAT, ["n", 64])]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", *ends, tensors), opset_imports=[helper.make_opsetid("", 20)]
    )
    rows = [{"x": RNG.normal(size=(80, 64)).astype(np.float32)}]
    scheme = WeightOnly(algorithm=Gptq(hessian_bytes=64 * 64 * 8))
    _, told = quantize_blocks(proto, scheme, rows=rows)
    assert told.passes == 3
    assert {weight.name for weight in told.weights} == {"w0", "w1", "w2", "w3"}


def test_weights_that_others_need_stay() -> None:
    """Read by a subgraph, by two nodes, too small, or asked to stay: in float, with the reason."""
    arrays = {
        "inner": RNG.normal(size=(64, 64)), "shared": RNG.normal(size=(64, 64)),
        "asked": RNG.normal(size=(64, 64)), "free": RNG.normal(size=(64, 64)),
        "small": RNG.normal(size=(64, 2)),
    }  # fmt: skip
    branches = [
        helper.make_graph([node(*made)], name, [], [info(made[2][0], TensorProto.FLOAT, None)])
        for name, made in (
            ("yes", ("MatMul", ["b", "inner"], ["p"])), ("no", ("Identity", ["b"], ["q"])),
        )
    ]  # fmt: skip
    nodes = [
        node("MatMul", ["x", "inner"], ["a"], name="inner_product"),
        node("MatMul", ["a", "shared"], ["a2"], name="shared_1"),
        node("MatMul", ["a2", "shared"], ["b"], name="shared_2"),
        node("If", ["c"], ["d"], name="if", then_branch=branches[0], else_branch=branches[1]),
        node("MatMul", ["d", "asked"], ["e"], name="asked_product"),
        node("MatMul", ["e", "free"], ["f"], name="free_product"),
        node("MatMul", ["f", "small"], ["y"], name="small_product"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", 64]), info("c", TensorProto.BOOL, [])],
        [info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(a.astype(np.float32) / 8, n) for n, a in arrays.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    feeds = [{"x": RNG.normal(size=(5, 64)).astype(np.float32), "c": np.ones((), bool)}]
    wanted = run(proto, feeds)
    made, told = quantize_blocks(
        proto, WeightOnly(grid=BlockGrid(bits=8)), float_nodes=frozenset({"asked_product"})
    )
    assert [weight.name for weight in told.weights] == ["free"]
    reasons = {kept.name: kept.reason for kept in told.kept}
    assert "asked" in reasons["asked_product"]
    assert "too small" in reasons["small_product"]
    assert "other readers" in reasons["shared_1"]
    assert "subgraph" in reasons["inner_product"]
    assert sqnr(wanted, run(made, feeds)) > 35


def test_opset_is_raised_for_standard_blocks_and_only_then() -> None:
    """A model of opset 13 becomes one of 21 that computes the same; MatMulNBits needs no raise."""
    arrays = weights()
    made, _ = quantize_blocks(model(opset=13, arrays=arrays), WeightOnly(form="qdq"))
    assert made.opset_import[0].version == 21
    assert made.ir_version >= 10
    assert sqnr(run(model(arrays=arrays), FEEDS), run(made, FEEDS, level=LOWEST)) > 10
    made, _ = quantize_blocks(model(opset=13, arrays=arrays), WeightOnly())
    assert made.opset_import[0].version == 13
    run(made, FEEDS)
    proto = model(opset=13)
    proto.graph.node.append(node("NoSuchOperator", ["y"], ["z"]))
    with pytest.raises(SourceError, match="opset 13; 21 is needed"):
        onnxio.raise_opset(proto, 21)


def test_raising_the_opset_keeps_large_weights_byte_for_byte() -> None:
    """They go around the converter."""
    arrays = weights()
    proto = model(opset=13, arrays=arrays)
    raised = onnxio.raise_opset(proto, 21)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read_array(raised, name), array)
    assert [value.name for value in raised.graph.input] == ["ids"]
    np.testing.assert_array_equal(run(proto, FEEDS), run(raised, FEEDS))


def test_bad_input_is_named() -> None:
    """No rows for GPTQ, NaN in a weight, a model without products, a form without tables."""
    with pytest.raises(DataError, match="GPTQ needs calibration rows"):
        quantize_blocks(model(), WeightOnly(algorithm=Gptq()))
    arrays = weights()
    arrays["second"][3, 4] = np.inf
    with pytest.raises(NonFiniteError, match="1 values"):
        quantize_blocks(model(arrays=arrays), WeightOnly())
    graph = helper.make_graph(
        [node("Relu", ["x"], ["y"], name="r")],
        "g",
        [info("x", TensorProto.FLOAT, ["n"])],
        [info("y", TensorProto.FLOAT, ["n"])],
    )
    with pytest.raises(RecipeError, match="no product or table"):
        quantize_blocks(helper.make_model(graph), WeightOnly())
    with pytest.raises(RecipeError, match="no operator that gathers"):
        WeightOnly(form="qdq", tables="blocks")


def test_scheme_and_record_survive_json(tmp_path: Path) -> None:
    """They go into recipes and results."""
    scheme = WeightOnly(algorithm=Gptq(damping=0.2), grid=BlockGrid(bits=8, symmetric=True))
    assert record.loads(WeightOnly, record.dumps(scheme), where="here") == scheme
    _, told = quantize_blocks(model(), scheme, rows=FEEDS)
    assert record.loads(type(told), record.dumps(told), where="here") == told
    onnx.save(quantize_blocks(model(), WeightOnly())[0], tmp_path / "m.onnx")
