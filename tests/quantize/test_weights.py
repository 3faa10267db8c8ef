"""int8 weights, wherever a graph keeps and shares them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper, numpy_helper

from equipoise.data.store import write_rows
from equipoise.errors import RecipeError
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.schemes import WeightOnlyInt8
from equipoise.quantize.weights import symmetric_int8
from equipoise.targets.profile import Int8Scheme

node, info = helper.make_node, helper.make_tensor_value_info
TABLE = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
SQUARE = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
SCHEME = Int8Scheme(
    activation="uint8", weight="int8", per_channel=True, saturates=False, reason="a test"
)
IDS = ("ids", TensorProto.INT64, ["n"])
X = ("x", TensorProto.FLOAT, ["n", 64])
Y = ("y", ["n", 64])


def save(path: Path, nodes, inputs, outputs, weights, *, opset: int = 20, ir: int = 10) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [info(*value) for value in inputs],
        [info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir), path)
    return path


def run(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def stored(model: Path, feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The weight-only model, after its outputs were found within 30 dB of the float ones."""
    quantized = quantize_file(model, feeds)
    before, after = run(model, feeds), run(quantized, feeds)
    assert np.square(before - after).sum() < 1e-3 * np.square(before).sum()
    return onnx.load(quantized)


def quantize_file(model: Path, feeds: dict[str, np.ndarray]) -> Path:
    output, samples = model.parent / "int8", model.parent / "samples"
    write_rows(samples, [feeds])
    settings = {"quantization": WeightOnlyInt8(), "scheme": SCHEME, "samples": samples}
    return output / quantize(QuantizeConfig(model=model, **settings), output=output).file


def float_weights(model: onnx.ModelProto) -> set[str]:
    return {
        t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and t.dims[1:]
    }


X_FEED = {"x": np.random.default_rng(2).normal(size=(3, 64)).astype(np.float32)}
IDS_FEED = {"ids": np.array([0, 7, 99, 7])}


@settings(deadline=None, max_examples=100)
@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=4, max_side=5),
        elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
    ),
    st.data(),
)
def test_rounding_is_within_half_a_step_of_its_channel(weight: np.ndarray, data) -> None:
    """For any weight and any channel axis, zero channels included."""
    axis = data.draw(st.integers(0, weight.ndim - 1))
    values, scale = symmetric_int8(weight, axis=axis)
    assert values.dtype == np.int8
    assert scale.shape == (weight.shape[axis],)
    assert np.abs(values.astype(int)).max() <= 127
    wide = scale.astype(np.float64).reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    assert (np.abs(values * wide - weight) <= wide * 0.5001).all()


def test_weight_that_two_products_share_is_stored_once(tmp_path: Path) -> None:
    """Both read what one DequantizeLinear gives."""
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    model = stored(save(tmp_path / "m.onnx", nodes, [X], [Y], {"w": SQUARE}), X_FEED)
    assert [n.op_type for n in model.graph.node].count("DequantizeLinear") == 1
    assert not float_weights(model)


def test_table_gathered_twice_is_stored_once(tmp_path: Path) -> None:
    """Both gathers read int8 rows."""
    nodes = [
        node("Gather", ["t", "ids"], ["a"]),
        node("Gather", ["t", "ids"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
    ]
    model = stored(save(tmp_path / "m.onnx", nodes, [IDS], [Y], {"t": TABLE}), IDS_FEED)
    assert not float_weights(model)


def test_old_models_list_their_weights_among_the_inputs(tmp_path: Path) -> None:
    """IR version 3, as in the ONNX model zoo: the weight is no input of the int8 model."""
    nodes = [node("Gather", ["t", "ids"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    inputs = [IDS, ("t", TensorProto.FLOAT, [100, 64]), ("w", TensorProto.FLOAT, [64, 64])]
    path = save(tmp_path / "m.onnx", nodes, inputs, [Y], {"t": TABLE, "w": SQUARE}, opset=8, ir=3)
    model = stored(path, IDS_FEED)
    assert [value.name for value in model.graph.input] == ["ids"]


def test_table_that_is_read_elsewhere_stays_in_float(tmp_path: Path) -> None:
    """In the branch of an If, and as an output; the product beside it is stored all the same."""
    branches = [
        helper.make_graph([node(*made)], name, [], [info(made[2][0], TensorProto.FLOAT, None)])
        for name, made in (
            ("yes", ("Gather", ["t", "ids"], ["p"])),
            ("no", ("Identity", ["a"], ["q"])),
        )
    ]
    nodes = [
        node("Gather", ["t", "ids"], ["a"]),
        node("If", ["c"], ["b"], then_branch=branches[0], else_branch=branches[1]),
        node("MatMul", ["b", "w"], ["m"]),
        node("Add", ["a", "m"], ["y"]),
    ]
    weights = {"t": TABLE, "w": SQUARE}
    condition = ("c", TensorProto.BOOL, [])
    path = save(tmp_path / "m.onnx", nodes, [IDS, condition], [Y], weights)
    assert float_weights(stored(path, {**IDS_FEED, "c": np.ones((), bool)})) == {"t"}
    (tmp_path / "out").mkdir()
    nodes = [node("Gather", ["t", "ids"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    path = save(tmp_path / "out/m.onnx", nodes, [IDS], [Y, ("t", [100, 64])], weights)
    assert float_weights(stored(path, IDS_FEED)) == {"t"}


def test_table_that_is_also_a_product_is_left_alone(tmp_path: Path) -> None:
    """Tied embeddings want one scale per row for one reader and per column for the other."""
    nodes = [node("Gather", ["t", "ids"], ["a"]), node("MatMul", ["a", "t"], ["y"])]
    table = TABLE[:64]
    path = save(tmp_path / "m.onnx", nodes, [IDS], [Y], {"t": table})
    with pytest.raises(RecipeError, match="'weight-only'"):
        quantize_file(path, {"ids": np.array([0, 7, 63])})


def test_opset_without_scales_per_channel_is_raised(tmp_path: Path) -> None:
    """Opset 11 has no axis in DequantizeLinear."""
    kernel = np.random.default_rng(3).normal(size=(32, 16, 3, 3)).astype(np.float32)
    image = ("x", TensorProto.FLOAT, ["n", 16, 8, 8])
    nodes = [node("Conv", ["x", "k"], ["y"])]
    path = save(
        tmp_path / "m.onnx", nodes, [image], [("y", ["n", 32, 6, 6])], {"k": kernel}, opset=11, ir=6
    )
    feeds = {"x": np.random.default_rng(4).normal(size=(1, 16, 8, 8)).astype(np.float32)}
    model = stored(path, feeds)
    assert model.opset_import[0].version == 13
    assert not float_weights(model)
