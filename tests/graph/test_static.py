"""Fixed sizes reach the outputs, and the arithmetic on shapes folds away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from equipoise import onnxio
from equipoise.errors import SourceError, UsageError
from equipoise.graph.static import StaticConfig, fix_dimensions, static_stage

SHAPE_OPERATORS = {"Shape", "Range", "Slice", "Concat", "ConstantOfShape", "Constant", "Identity"}


def model_of(
    nodes: list[onnx.NodeProto], *, x: list[Any], y: list[Any], **weights: np.ndarray
) -> onnx_ir.Model:
    """A graph from ``x`` to ``y``, both float32."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    return onnx_ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=9))


def test_everything_fixed_leaves_no_dynamic_dimension_and_no_shape_arithmetic(
    block: Any, tmp_path: Path
) -> None:
    """Of an encoder as it was exported; the numbers stay."""
    sizes = {"batch": 2, "sequence": 7}
    record = static_stage(StaticConfig(model=block.path, sizes=sizes), output=tmp_path)
    assert [spec.shape for spec in record.inputs] == [(2, 7), (2, 7)]
    assert [spec.shape for spec in record.outputs] == [(2, 7, 5), (2, 16)]
    after = onnx.load(tmp_path / "model.onnx")
    assert onnxio.graph_specs(after) == (record.inputs, record.outputs)
    assert not SHAPE_OPERATORS & {node.op_type for node in after.graph.node}
    block.check_equal(tmp_path / "model.onnx", shapes=((2, 7),))


@pytest.mark.parametrize(
    ("sizes", "specs", "shapes"),
    [
        ({"batch": 1}, [(1, "sequence"), (1, "sequence", 5), (1, 16)], ((1, 4), (1, 9))),
        ({"sequence": 9}, [("batch", 9), ("batch", 9, 5), ("batch", 16)], ((1, 9), (3, 9))),
    ],
)
def test_one_dimension_fixed_leaves_the_other_dynamic(
    sizes: dict[str, int], specs: Any, shapes: Any, block: Any, tmp_path: Path
) -> None:
    """The other keeps its name, at inputs and outputs, and takes any size."""
    record = static_stage(StaticConfig(model=block.path, sizes=sizes), output=tmp_path)
    assert {spec.shape for spec in record.inputs} == {specs[0]}
    assert [spec.shape for spec in record.outputs] == specs[1:]
    block.check_equal(tmp_path / "model.onnx", shapes=shapes)


def test_convolutional_model(cnn: Any, tmp_path: Path) -> None:
    """Flattening by a computed shape becomes flattening by a constant one."""
    record = static_stage(StaticConfig(model=cnn.path, sizes={"batch": 3}), output=tmp_path)
    assert [spec.shape for spec in record.outputs] == [(3, 5)]
    assert "Shape" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    cnn.check_equal(tmp_path / "model.onnx", shapes=((3, 0),))


def test_output_dimension_that_is_an_expression_becomes_its_value() -> None:
    """Exporters write the size of a flattened output as a product of names."""
    shape = np.array([-1, 4])
    nodes = [helper.make_node("Reshape", ["x", "s"], ["y"])]
    model = model_of(nodes, x=["batch", "sequence", 4], y=["batch*sequence", 4], s=shape)
    fix_dimensions(model, {"batch": 3})
    assert onnxio.ir_specs(model)[1][0].shape == ("3*sequence", 4)
    fix_dimensions(model, {"sequence": 5})
    assert onnxio.ir_specs(model)[1][0].shape == (15, 4)


def test_output_dimension_whose_name_says_nothing_is_inferred() -> None:
    """The TorchScript exporter names it after the node; no expression, and no identifier."""
    nodes = [helper.make_node("Concat", ["x", "x"], ["y"], axis=0)]
    model = model_of(nodes, x=["batch", 4], y=["Concaty dim.0", 4])
    fix_dimensions(model, {"batch": 3})
    assert onnxio.ir_specs(model)[1][0].shape == (6, 4)


def test_dimension_that_depends_on_values_stays() -> None:
    """How many values are above zero is known when it runs."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("NonZero", ["r"], ["n"]),
        helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, x=["batch", 4], y=[2, "found"])
    fix_dimensions(model, {"batch": 3})
    assert onnxio.ir_specs(model)[1][0].shape == (2, "found")


def test_dimension_without_a_name_goes_by_its_place() -> None:
    """As equipoise prints it."""
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], x=[None, 4], y=[None, 4])
    fix_dimensions(model, {"x_dim0": 2})
    assert [spec.shape for specs in onnxio.ir_specs(model) for spec in specs] == [(2, 4), (2, 4)]


def test_shapes_in_branches_follow(tmp_path: Path) -> None:
    """A branch of an If reads the outer value of fixed size."""
    info = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 4])
    branches = {
        name: helper.make_graph([helper.make_node(kind, ["x"], ["z"])], name, [], [info])
        for name, kind in (("then_branch", "Relu"), ("else_branch", "Neg"))
    }
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], **branches),
    ]
    model = model_of(nodes, x=["batch", 4], y=["batch", 4])
    fix_dimensions(model, {"batch": 2})
    onnxio.save_ir(model, tmp_path / "model.onnx")
    assert onnxio.ir_specs(onnxio.load_ir(tmp_path / "model.onnx"))[1][0].shape == (2, 4)
    assert b"batch" not in (tmp_path / "model.onnx").read_bytes()


def test_what_cannot_be_fixed_is_refused(block: Any, cnn: Any, tmp_path: Path) -> None:
    """An unknown name, a size of zero, a model without dynamic dimensions, no model."""
    model = onnxio.load_ir(block.path)
    with pytest.raises(UsageError, match="'sequences'; known: batch, sequence") as raised:
        fix_dimensions(model, {"sequences": 2})
    assert "'sequence'" in raised.value.hint
    with pytest.raises(UsageError, match="'batch' cannot be 0"):
        fix_dimensions(model, {"batch": 0})
    fixed = onnxio.load_ir(cnn.path)
    fix_dimensions(fixed, {"batch": 1})
    with pytest.raises(UsageError, match="'batch'; known: none"):
        fix_dimensions(fixed, {"batch": 1})
    config = StaticConfig(model=tmp_path / "none.onnx", sizes={"batch": 1})
    with pytest.raises(SourceError, match=r"none\.onnx"):
        static_stage(config, output=tmp_path)
