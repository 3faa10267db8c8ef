"""Every clean-up pass keeps what the graph computes, and does what its name says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from equipoise import onnxio
from equipoise.errors import SourceError
from equipoise.graph.clean import PASSES, CleanRecord, clean, run_pass


def model_of(
    nodes: list[onnx.NodeProto], *, weights: dict[str, np.ndarray] | None = None, **parts: Any
) -> onnx_ir.Model:
    """A graph from ``x`` float32[batch, 4] to ``y``."""
    shape = ["batch", 4]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, parts.get("output", shape))],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    opsets = parts.get("opsets", {"": 20})
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(n, v) for n, v in opsets.items()],
        functions=parts.get("functions", []),
        ir_version=10,
    )
    return onnx_ir.from_proto(proto)


def operators(model: onnx_ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("which", ["block", "cnn"])
@pytest.mark.parametrize("name", PASSES)
def test_each_pass_alone_keeps_numbers_and_signature(
    name: str, which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On the graph as it was exported, at two batch sizes and lengths."""
    exported = request.getfixturevalue(which)
    model = onnxio.load_ir(exported.path)
    before = onnxio.ir_specs(model)
    count = run_pass(name, model)
    assert onnxio.ir_specs(model) == before
    assert count.nodes_after == len(list(model.graph.all_nodes()))
    onnxio.save_ir(model, tmp_path / "model.onnx")
    exported.check_equal(tmp_path / "model.onnx", shapes=((1, 5), (3, 9)))


def write_clean(source: Path, folder: Path, *, release: bool) -> CleanRecord:
    model = onnxio.load_ir(source)
    record = clean(model, release=release)
    onnxio.save_ir(model, folder / "model.onnx")
    return record


@pytest.mark.parametrize("which", ["block", "cnn"])
def test_all_passes_together_make_an_export_smaller(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Fewer nodes, no more bytes, the same numbers; a second cleaning finds nothing."""
    exported = request.getfixturevalue(which)
    record = write_clean(exported.path, tmp_path, release=True)
    assert list(record.passes) == list(PASSES)
    first, last = record.passes["inline"], record.passes["names"]
    assert last.nodes_after < 0.6 * first.nodes_before
    assert last.bytes_after <= first.bytes_before
    exported.check_equal(tmp_path / "model.onnx", shapes=((1, 5), (3, 9)))
    again = clean(onnxio.load_ir(tmp_path / "model.onnx"), release=True).passes.values()
    assert {count.nodes_before for count in again} == {last.nodes_after}


def test_names_that_survive_are_the_exporters(block: Any, tmp_path: Path) -> None:
    """Weights keep their paths in the module, nodes and values their names."""
    before = onnxio.load_ir(block.path).graph
    write_clean(block.path, tmp_path, release=False)
    after = onnxio.load_ir(tmp_path / "model.onnx").graph
    assert {"words.weight", "layer.norm1.weight"} <= {*after.initializers}
    assert {node.name for node in after} <= {node.name for node in before}
    made = {value.name for node in before for value in node.outputs}
    assert {value.name for node in after for value in node.outputs} <= made


def test_release_drops_stack_traces_but_keeps_the_models_own_metadata(
    block: Any, tmp_path: Path
) -> None:
    """Paths of Python files are nobody's business; what the user wrote on the model is."""
    proto = onnx.load(block.path)
    helper.set_model_props(proto, {"owner": "somebody"})
    source = tmp_path / "source.onnx"
    onnx.save(proto, source)
    assert b"stack_trace" in source.read_bytes()
    for release in (False, True):
        write_clean(source, tmp_path, release=release)
        written = (tmp_path / "model.onnx").read_bytes()
        assert (b"stack_trace" in written) is not release
        assert (b"pkg." in written) is not release
        kept = onnx.load(tmp_path / "model.onnx").metadata_props
        assert {p.key: p.value for p in kept}["owner"] == "somebody"


def test_inline_puts_functions_into_the_graph() -> None:
    """A call becomes the nodes of its function."""
    double = helper.make_function(
        "local", "Double", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
    node = helper.make_node("Double", ["x"], ["y"], domain="local")
    model = model_of([node], functions=[double], opsets={"": 20, "local": 1})
    run_pass("inline", model)
    assert operators(model) == ["Add"]
    assert not model.functions


def test_fold_computes_constants() -> None:
    """Two constants that are added become one."""
    nodes = [helper.make_node("Add", ["a", "b"], ["c"]), helper.make_node("Mul", ["x", "c"], ["y"])]
    model = model_of(nodes, weights={n: np.ones(4, dtype=np.float32) for n in "ab"})
    run_pass("fold", model)
    assert operators(model) == ["Mul"]
    np.testing.assert_array_equal(model.graph.initializers["c"].const_value.numpy(), [2] * 4)


def test_fold_never_makes_weights_grow() -> None:
    """A constant of 40 GB is not made out of one number, nor even tried."""
    nodes = [
        helper.make_node("Expand", ["one", "shape"], ["large"]),
        helper.make_node("ReduceMax", ["large", "axes"], ["top"], keepdims=0),
        helper.make_node("Mul", ["x", "top"], ["y"]),
    ]
    shape = np.array([100_000, 100_000])
    weights = {"one": np.ones(1, dtype=np.float32), "shape": shape, "axes": np.array([0, 1])}
    model = model_of(nodes, weights=weights)
    begin = time.perf_counter()
    count = run_pass("fold", model)
    assert count.bytes_after <= count.bytes_before
    assert "Expand" in operators(model)
    assert time.perf_counter() - begin < 5


def test_lift_makes_initializers_of_constants() -> None:
    """Also of those that are no tensors."""
    nodes = [
        helper.make_node("Constant", [], ["c"], value_float=2.0),
        helper.make_node("Mul", ["x", "c"], ["y"]),
    ]
    model = model_of(nodes)
    run_pass("lift", model)
    assert operators(model) == ["Mul"]
    assert list(model.graph.initializers) == ["c"]


def test_identities_go_and_outputs_keep_names_and_dimensions() -> None:
    """The value before an Identity calls its dimension otherwise; the output's name stays."""
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Identity", ["r"], ["y"])]
    model = model_of(nodes, output=["rows", 4])
    relu = model.graph[0].outputs[0]
    relu.shape, relu.type = onnx_ir.Shape(["s77", 4]), onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    run_pass("identities", model)
    assert operators(model) == ["Relu"]
    assert str(onnxio.ir_specs(model)[1][0]) == "y: float32[rows, 4]"


def test_identity_between_input_and_output_stays() -> None:
    """ONNX takes no graph whose output is its input."""
    model = model_of([helper.make_node("Identity", ["x"], ["y"])])
    clean(model, release=True)
    assert operators(model) == ["Identity"]
    onnx.checker.check_model(onnx_ir.to_proto(model))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(4, dtype=np.float32),
        np.arange(4, dtype=np.float16),
        np.asfortranarray(np.ones((2, 3), dtype=np.float32)),
    ],
    ids=["float32", "float16", "transposed"],
)
def test_duplicates_become_one_initializer(array: np.ndarray) -> None:
    """Equal in dtype, shape and bytes; a different last value is another constant."""
    other = array.copy()
    other[-1] = 7
    model = model_of([helper.make_node("Max", ["x", "x"], ["y"])])
    values = [
        onnx_ir.Value(name=n, const_value=onnx_ir.Tensor(a))
        for n, a in {"a": array, "b": array.copy(order="K"), "c": other}.items()
    ]
    for value in values:
        model.graph.register_initializer(value)
    model.graph[0].resize_inputs(3)
    for index, value in enumerate(values):
        model.graph[0].replace_input_with(index, value)
    count = run_pass("duplicates", model)
    assert [value.name for value in model.graph[0].inputs] == ["a", "a", "c"]
    assert count.bytes_before - count.bytes_after == array.nbytes


def test_equal_nodes_become_one_but_random_ones_do_not() -> None:
    """Two Relu of x are one value; two draws are two."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["x"], ["b"]),
        helper.make_node("RandomNormalLike", ["x"], ["c"]),
        helper.make_node("RandomNormalLike", ["x"], ["d"]),
        helper.make_node("Sum", ["a", "b", "c", "d"], ["y"]),
    ]
    model = model_of(nodes)
    run_pass("subexpressions", model)
    assert sorted(operators(model)) == ["RandomNormalLike", "RandomNormalLike", "Relu", "Sum"]


def test_dead_nodes_outputs_weights_functions_and_opsets_go() -> None:
    """Whatever nothing reads: a node, an optional output, a weight, a function, a domain."""
    nodes = [
        helper.make_node("Relu", ["x"], ["unused"]),
        helper.make_node("MaxPool", ["x4"], ["p", "indices"], kernel_shape=[1, 1]),
        helper.make_node("Unsqueeze", ["x", "axes"], ["x4"]),
        helper.make_node("Squeeze", ["p", "axes"], ["y"]),
    ]
    double = helper.make_function(
        "local", "Double", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
    model = model_of(
        nodes, weights={"axes": np.array([0, 1]), "spare": np.ones(9, dtype=np.float32)},
        functions=[double], opsets={"": 20, "local": 1, "ai.onnx.ml": 3, "com.microsoft": 1},
    )  # fmt: skip
    for name in ("dead", "functions", "opsets", "sort"):
        run_pass(name, model)
    assert operators(model) == ["Unsqueeze", "MaxPool", "Squeeze"]
    assert [len(node.outputs) for node in model.graph] == [1, 1, 1]
    assert list(model.graph.initializers) == ["axes"]
    assert not model.functions
    assert model.graph.opset_imports == {"": 20}


def test_names_become_unique() -> None:
    """Two nodes of one name, and one without any."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    model = model_of(nodes)
    run_pass("names", model)
    names = [node.name for node in model.graph]
    assert names[0] == "relu"
    assert len(set(names)) == 3
    assert all(names)


def test_external_weights_are_not_read(tmp_path: Path) -> None:
    """A weight without a twin stays on disk, and in its file."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Identity", ["m"], ["y"]),
    ]
    weights = {"w": np.ones((4, 9000), dtype=np.float32)}
    proto = onnx_ir.to_proto(model_of(nodes, weights=weights, output=["batch", 9000]))
    path = tmp_path / "model.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="w", size_threshold=0)
    model = onnxio.load_ir(path)
    clean(model, release=True)
    assert operators(model) == ["MatMul"]
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, onnx_ir.ExternalTensor)
    assert tensor.raw is None


def test_pass_that_cannot_take_a_graph_is_named() -> None:
    """A function that calls itself cannot be inlined; the error says which pass failed."""
    call = helper.make_node("Loop_", ["a"], ["b"], domain="local")
    function = helper.make_function(
        "local", "Loop_", ["a"], ["b"], [call], [helper.make_opsetid("local", 1)]
    )
    node = helper.make_node("Loop_", ["x"], ["y"], domain="local")
    model = model_of([node], functions=[function], opsets={"": 20, "local": 1})
    with pytest.raises(SourceError, match="clean-up pass 'inline' failed"):
        clean(model, release=False)
