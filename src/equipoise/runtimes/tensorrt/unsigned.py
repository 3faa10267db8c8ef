"""Unsigned activations, which the parser accepts and reads as signed ones.

It takes a QuantizeLinear to uint8 whose zero point is 0 for one to int8, without an error: all that
lies above half the range would be cut off. So these are refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from equipoise import extras, onnxio

WHY: Final = (
    "uint8 with zero point 0 would be read as int8, which cuts off the upper half of its range"
)


def misread(model: Any) -> Iterator[int]:
    """Index of each QuantizeLinear of a ``ModelProto`` whose integers would be misread."""
    constants = _constants(model)
    for index, node in enumerate(model.graph.node):
        if node.op_type == "QuantizeLinear" and _is_unsigned(node, constants):
            yield index


def _constants(model: Any) -> dict[str, Any]:
    """Name -> TensorProto of initializers and of what Constant nodes give."""
    given = {
        node.output[0]: onnxio.attribute(node, "value", None)
        for node in model.graph.node
        if node.op_type == "Constant"
    }
    return {**{name: t for name, t in given.items() if t is not None}, **onnxio.initializers(model)}


def _is_unsigned(node: Any, constants: dict[str, Any]) -> bool:
    onnx: Any = extras.require("onnx")
    zero = constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if zero is None:
        named = onnxio.attribute(node, "output_dtype", onnx.TensorProto.UNDEFINED)
        return named in {onnx.TensorProto.UNDEFINED, onnx.TensorProto.UINT8}
    kept_elsewhere = zero.data_location == onnx.TensorProto.EXTERNAL
    if zero.data_type != onnx.TensorProto.UINT8 or kept_elsewhere:
        return False
    return not np.any(onnx.numpy_helper.to_array(zero))
