"""Costs of models, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from equipoise.errors import SourceError, UsageError
from equipoise.graph.cost import analyze


def save(path: Path, nodes, inputs, outputs, weights) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


@pytest.fixture
def cnn(tmp_path: Path) -> Path:
    """Grouped convolution, transposed convolution, Gemm with transA, and a batched product."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "k"], ["a"], group=2, pads=[1, 1, 1, 1], strides=[2, 2]),
        node("ConvTranspose", ["a", "t"], ["b"], strides=[2, 2]),
        node("GlobalAveragePool", ["b"], ["c"]),
        node("Flatten", ["c"], ["d"]),
        node("MatMul", ["d", "w"], ["y"]),
    ]
    weights = {"k": np.ones((8, 2, 3, 3)), "t": np.ones((8, 5, 2, 2)), "w": np.ones((5, 7))}
    shape = ["batch", 4, 6, 6]
    return save(tmp_path / "cnn.onnx", nodes, [("x", shape)], [("y", ["batch", 7])], weights)


def test_multiply_accumulates_are_those_by_hand(cnn: Path) -> None:
    """Conv: outputs x inputs of the group x kernel; transposed: inputs x outputs x kernel."""
    convolution = 8 * 3 * 3 * (2 * 3 * 3)
    transposed = 8 * 3 * 3 * (5 * 2 * 2)
    found = analyze(cnn)
    assert found.multiply_accumulates == convolution + transposed + 5 * 7
    assert analyze(cnn, sizes={"batch": 3}).multiply_accumulates == 3 * found.multiply_accumulates


def test_parameters_and_bytes(cnn: Path) -> None:
    """Every weight counts; four bytes each."""
    found = analyze(cnn, top=2)
    assert found.parameters == 8 * 2 * 9 + 8 * 5 * 4 + 5 * 7
    assert found.weight_bytes == 4 * found.parameters
    assert [t.name for t in found.largest_weights] == ["t", "k"]
    assert found.file_bytes == cnn.stat().st_size


def test_peak_memory_follows_liveness(cnn: Path) -> None:
    """The largest pair of values alive at once: input and a, a and b, b and c."""
    x, a, b = 4 * 36 * 4, 8 * 9 * 4, 5 * 36 * 4
    assert analyze(cnn).peak_activation_bytes == max(x + a, a + b)


def test_residual_keeps_its_value_alive(tmp_path: Path) -> None:
    """x is read again at the end, so three values are alive in the middle."""
    node = helper.make_node
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Add", ["x", "b"], ["y"]),
    ]
    path = save(tmp_path / "r.onnx", nodes, [("x", [10])], [("y", [10])], {})
    assert analyze(path).peak_activation_bytes == 3 * 40


def test_quantised_convolution_counts_as_the_float_one(tmp_path: Path) -> None:
    """Weight-only int8 changes bytes, not multiply-accumulates."""
    from equipoise.data.store import write_rows
    from equipoise.quantize.quantize import QuantizeConfig, quantize
    from equipoise.quantize.schemes import WeightOnlyInt8
    from equipoise.targets.machine import detect_machine
    from equipoise.targets.profiles import get_target

    node = helper.make_node
    weights = {"k": np.random.default_rng(0).normal(size=(32, 16, 3, 3))}
    model = save(
        tmp_path / "c.onnx", [node("Conv", ["x", "k"], ["y"])], [("x", [1, 16, 8, 8])],
        [("y", [1, 32, 6, 6])], weights,
    )  # fmt: skip
    write_rows(tmp_path / "rows", [{"x": np.ones((1, 16, 8, 8), dtype=np.float32)}])
    config = QuantizeConfig(
        model=model,
        quantization=WeightOnlyInt8(),
        scheme=get_target("cpu", machine=detect_machine()).int8,
        samples=tmp_path / "rows",
    )
    quantize(config, output=tmp_path)
    before, after = analyze(model), analyze(tmp_path / "model.onnx")
    assert after.multiply_accumulates == before.multiply_accumulates == 32 * 36 * 16 * 9
    assert after.weight_bytes < before.weight_bytes / 3


def test_subgraphs_are_counted_as_operators_and_said_to_be_uncounted(tmp_path: Path) -> None:
    """An If has two branches; their products are not guessed."""
    node, info = helper.make_node, helper.make_tensor_value_info
    branch = helper.make_graph(
        [node("MatMul", ["x", "w"], ["z"])], "b", [], [info("z", TensorProto.FLOAT, [2, 2])]
    )
    nodes = [
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
    ]
    path = save(tmp_path / "i.onnx", nodes, [("x", [2, 2])], [("y", [2, 2])], {"w": np.eye(2)})
    found = analyze(path)
    assert found.operators["MatMul"] == 2
    assert found.uncounted == ("If (its subgraphs)",)


def test_bad_questions_are_refused(cnn: Path, tmp_path: Path) -> None:
    """An unknown dimension, a missing file, a file that is no model."""
    with pytest.raises(UsageError, match="'height'; there are batch"):
        analyze(cnn, sizes={"height": 2})
    with pytest.raises(SourceError, match=r"none\.onnx"):
        analyze(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(SourceError, match=r"text\.onnx is not a valid ONNX model"):
        analyze(tmp_path / "text.onnx")
