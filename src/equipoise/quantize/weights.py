"""Weight-only int8: weights stored as int8 per channel, dequantised when the model is loaded."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from equipoise import extras, onnxio
from equipoise.spec import Array

_MINIMUM_VALUES: Final = 256
"""Below this a scale per channel and one more node cost more bytes than they save."""

WEIGHTED: Final = frozenset({"MatMul", "Gemm", "Attention", "Conv", "ConvTranspose", "Gather"})
"""Operators with weights that can be stored as int8."""

_LAST_AXIS: Final = "equipoise.last_axis"

_CHANNEL_AXIS: Final = {"Conv": 0, "ConvTranspose": 1, "Gather": 0}
"""Operator -> axis of its weight with one scale each; products take the last axis."""


def quantize_weights(model: Any, *, operators: frozenset[str] = WEIGHTED) -> int:
    """Replace the float weights of ``model`` by int8 and scales, in place.

    Symmetric, per channel: ``scale = max|w| / 127``, ``q = round(w / scale)``. A weight of a
    product goes through DequantizeLinear, which runtimes fold or fuse. An embedding table is
    gathered in int8 first: dequantising the whole table for every inference would cost more than
    the model.

    Args:
        model: ``onnx.ModelProto``.
        operators: Operator types whose weights are replaced.

    Returns:
        The number of weights replaced.
    """
    constants = onnxio.initializers(model)
    read_elsewhere = read_in_subgraphs(model) | {value.name for value in model.graph.output}
    replaced = 0
    for name, readers in onnxio.consumers(model).items():
        axis = _axis(readers, name, constants.get(name))
        if axis is None or readers[0].op_type not in operators:
            continue
        if readers[0].op_type == "Gather" and name in read_elsewhere:
            continue  # the float table has to stay
        _store_int8(model, constants[name], axis=axis)
        if readers[0].op_type == "Gather":
            for reader in readers:
                _dequantize_rows(model, reader)
        else:
            # Optional by the standard, but ONNX Runtime's exact mode fails without it.
            zero = np.zeros(constants[name].dims[axis], dtype=np.int8)
            model.graph.initializer.append(
                extras.require("onnx").numpy_helper.from_array(zero, f"{name}.zero")
            )
            model.graph.node.insert(0, _dequantize(name, axis=axis))
        replaced += 1
    return replaced


def read_in_subgraphs(model: Any) -> set[str]:
    """Names that subgraphs read or give out; they see the tensors of the main graph."""
    names: set[str] = set()
    graphs = [sub for node in model.graph.node for sub in _subgraphs(node)]
    while graphs:
        graph = graphs.pop()
        names.update(value.name for value in graph.output)
        for node in graph.node:
            names.update(node.input)
            graphs.extend(_subgraphs(node))
    return names


def _subgraphs(node: Any) -> list[Any]:
    return [sub for a in node.attribute for sub in ([a.g] if a.HasField("g") else []) + [*a.graphs]]


def _axis(readers: list[Any], name: str, tensor: Any) -> int | None:
    """The channel axis of the weight ``name``; None when it is no weight or its readers differ."""
    if tensor is None or not _worthwhile(tensor):
        return None
    roles = {(node.op_type, _channel_axis(node, name, rank=len(tensor.dims))) for node in readers}
    return roles.pop()[1] if len(roles) == 1 else None


def _worthwhile(tensor: Any) -> bool:
    is_float = tensor.data_type == extras.require("onnx").TensorProto.FLOAT
    return is_float and len(tensor.dims) >= 2 and int(np.prod(tensor.dims)) >= _MINIMUM_VALUES


def _channel_axis(node: Any, name: str, *, rank: int) -> int | None:
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "Gather" and node.input[0] == name and attributes.get("axis", 0) == 0:
        return _CHANNEL_AXIS["Gather"] if rank == 2 else None
    if len(node.input) < 2 or node.input[1] != name:
        return None
    if node.op_type == "Gemm":
        return 0 if attributes.get("transB") else 1
    if node.op_type in {"MatMul", "Attention"}:
        return rank - 1
    return _CHANNEL_AXIS.get(node.op_type)


def _store_int8(model: Any, tensor: Any, *, axis: int) -> None:
    """Swap the initializer ``tensor`` for ``<name>.int8`` and ``<name>.scale``."""
    onnx = extras.require("onnx")
    values, scale = symmetric_int8(onnx.numpy_helper.to_array(tensor), axis=axis)
    model.graph.initializer.remove(tensor)
    # Up to IR version 3 every initializer was an input too.
    for value in [v for v in model.graph.input if v.name == tensor.name]:
        model.graph.input.remove(value)
    for suffix, array in ((".int8", values), (".scale", scale)):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(array, f"{tensor.name}{suffix}")
        )


def _dequantize(name: str, *, axis: int) -> Any:
    """The node that restores the weight ``name`` from int8."""
    return extras.require("onnx").helper.make_node(
        "DequantizeLinear",
        [f"{name}.int8", f"{name}.scale", f"{name}.zero"],
        [name],
        name=f"{name}.dequantize",
        axis=axis,
    )


def _dequantize_rows(model: Any, gather: Any) -> None:
    """Replace ``Gather(table, ids)`` by ``float(Gather(int8, ids)) * Gather(scale, ids)``."""
    helper = extras.require("onnx").helper
    table, ids, output = gather.input[0], gather.input[1], gather.output[0]
    names = [f"{output}.rows.{part}" for part in ("int8", "float", "scale", "column")]
    values, floats, scales, column = names
    nodes = [
        helper.make_node("Gather", [f"{table}.int8", ids], [values], name=f"{values}.gather"),
        helper.make_node("Cast", [values], [floats], name=f"{floats}.cast", to=1),
        helper.make_node("Gather", [f"{table}.scale", ids], [scales], name=f"{scales}.gather"),
        helper.make_node("Unsqueeze", [scales, _LAST_AXIS], [column], name=f"{column}.unsqueeze"),
        helper.make_node("Mul", [floats, column], [output], name=f"{output}.restore"),
    ]
    _add_last_axis(model)
    position = list(model.graph.node).index(gather)
    model.graph.node.remove(gather)
    for offset, node in enumerate(nodes):
        model.graph.node.insert(position + offset, node)


def _add_last_axis(model: Any) -> None:
    if _LAST_AXIS not in onnxio.initializers(model):
        last = np.array([-1], dtype=np.int64)
        model.graph.initializer.append(
            extras.require("onnx").numpy_helper.from_array(last, _LAST_AXIS)
        )


def symmetric_int8(weight: Array, *, axis: int) -> tuple[Array, Array]:
    """``(int8 values of the same shape, float32 scale per channel)`` of a float weight."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others).astype(np.float32) / np.float32(127)
    scale[scale == 0] = 1
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    values = np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8)
    return values, scale
