"""Weight-only int8: weights stored as int8 per channel, dequantised when the model is loaded."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from equipoise import extras, onnxio
from equipoise.spec import Array

_MINIMUM_VALUES: Final = 256
"""Below this a scale per channel and one more node cost more bytes than they save."""

_CHANNEL_AXIS: Final = {"Conv": 0, "ConvTranspose": 1, "Gather": 0}
"""Operator -> axis of its weight with one scale each; products take the last axis."""


def quantize_weights(model: Any) -> int:
    """Replace the float weights of ``model`` by int8 and a DequantizeLinear each, in place.

    Symmetric, per channel: ``scale = max|w| / 127``, ``q = round(w / scale)``.

    Returns:
        The number of weights replaced.
    """
    replaced = 0
    constants = onnxio.initializers(model)
    new_nodes = []
    for name, readers in onnxio.consumers(model).items():
        axis = _axis(readers, name, constants.get(name))
        if axis is not None:
            new_nodes.append(_replace(model, constants[name], axis=axis))
            replaced += 1
    for node in reversed(new_nodes):
        model.graph.node.insert(0, node)
    return replaced


def _axis(readers: list[Any], name: str, tensor: Any) -> int | None:
    """The channel axis of the weight ``name``; None when it is no weight or its readers differ."""
    if tensor is None or not _worthwhile(tensor):
        return None
    axes = {_channel_axis(node, name, rank=len(tensor.dims)) for node in readers}
    return axes.pop() if len(axes) == 1 else None


def _worthwhile(tensor: Any) -> bool:
    is_float = tensor.data_type == extras.require("onnx").TensorProto.FLOAT
    return is_float and len(tensor.dims) >= 2 and int(np.prod(tensor.dims)) >= _MINIMUM_VALUES


def _channel_axis(node: Any, name: str, *, rank: int) -> int | None:
    if node.op_type == "Gather" and node.input[0] == name:
        return _CHANNEL_AXIS["Gather"]
    if node.op_type in _CHANNEL_AXIS and node.input[1] == name:
        return _CHANNEL_AXIS[node.op_type]
    if node.op_type == "Gemm" and node.input[1] == name:
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    if node.op_type in {"MatMul", "Attention"} and node.input[1] == name:
        return rank - 1
    return None


def _replace(model: Any, tensor: Any, *, axis: int) -> Any:
    """Swap ``tensor`` for int8 values and scales; return the node that restores its name."""
    onnx = extras.require("onnx")
    values, scale = symmetric_int8(onnx.numpy_helper.to_array(tensor), axis=axis)
    name = tensor.name
    model.graph.initializer.remove(tensor)
    for suffix, array in ((".int8", values), (".scale", scale)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name + suffix))
    return onnx.helper.make_node(
        "DequantizeLinear",
        [f"{name}.int8", f"{name}.scale"],
        [name],
        name=f"{name}.dequantize",
        axis=axis,
    )


def symmetric_int8(weight: Array, *, axis: int) -> tuple[Array, Array]:
    """``(int8 values of the same shape, float32 scale per channel)`` of a float weight."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others).astype(np.float32) / np.float32(127)
    scale[scale == 0] = 1
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    values = np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8)
    return values, scale
