"""What an engine file computes in, from its operators and the types of its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal

from equipoise import extras, fs, onnxio
from equipoise.errors import SourceError

Precision = Literal["float32", "float16", "bfloat16", "int8", "int4"]

_BLOCKS: Final = "MatMulNBits"
_ROUNDING: Final = re.compile(r"[Qq]uantize|Integer|^QLinear|^QGemm|^QAttention")
_FOUR_BITS: Final = ("INT4", "UINT4", "FLOAT4E2M1")
_IR_TYPES: Final[tuple[tuple[Precision, tuple[str, ...]], ...]] = (
    ("int4", ('element_type="i4"', 'element_type="u4"')),
    ("int8", ('type="FakeQuantize"', 'element_type="i8"', 'element_type="u8"')),
    ("float16", ('element_type="f16"',)),
)
"""Marks in an OpenVINO IR; float weights that it stores as halves count as halves."""


def precision_of(engine: Path) -> Precision | None:
    """The lowest precision that an engine file computes in.

    Args:
        engine: An ``.onnx`` file or the ``.xml`` of an OpenVINO IR.

    Returns:
        None where the file does not say, as a compiled plan.

    Raises:
        SourceError: It is no such file.
    """
    if engine.suffix == ".xml":
        text = fs.read_text(engine, error=SourceError)
        return next((p for p, marks in _IR_TYPES if any(m in text for m in marks)), "float32")
    if engine.suffix != ".onnx":
        return None
    onnx = extras.require("onnx")
    try:
        model = onnx.load(engine, load_external_data=False)
    except Exception as error:  # protobuf raises several unrelated types
        raise SourceError(f"{engine} is no ONNX model: {error}") from error
    return precision_of_graph(model.graph)


def precision_of_graph(graph: Any) -> Precision:
    """The lowest precision in an ``onnx.GraphProto``; subgraphs do not count."""
    names: Any = extras.require("onnx").TensorProto.DataType.Name
    types = {names(tensor.data_type) for tensor in graph.initializer}
    types |= {names(v.type.tensor_type.elem_type) for v in (*graph.input, *graph.value_info)}
    operators = {_operator(node) for node in graph.node}
    casts = {
        names(a.i)
        for node in graph.node
        for a in node.attribute
        if a.name in {"to", "output_dtype"}
    }
    return _lowest(types | casts, operators)


def _operator(node: Any) -> str:
    """Its type; products with blocks of 8-bit weights count as rounding, not as blocks."""
    if node.op_type != _BLOCKS:
        return str(node.op_type)
    return _BLOCKS if onnxio.attribute(node, "bits", 4) <= 4 else "DequantizeLinear"


def _lowest(types: set[str], operators: Iterable[str]) -> Precision:
    if types & set(_FOUR_BITS) or _BLOCKS in set(operators):
        return "int4"
    if any(_ROUNDING.search(operator) for operator in operators):
        return "int8"
    if "BFLOAT16" in types:
        return "bfloat16"
    return "float16" if "FLOAT16" in types else "float32"
