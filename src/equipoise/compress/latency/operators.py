"""ONNX models of one layer, as a table measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.compress.latency.shapes import Precision, output_size
from equipoise.compress.structure import LayerShape
from equipoise.spec import Array
from equipoise.targets.profile import Int8Scheme

_ACTIVATION_SCALE: Final = 2.0**-5
_WEIGHT_SCALE: Final = 2.0**-7
"""Powers of two, which every scheme takes. What the numbers are does not change the time."""

_FLOAT_OPSET: Final = 17

Axes = Mapping[int, str]
"""Axis -> name of a dimension that is dynamic."""

_BATCH: Final[Axes] = {0: "batch"}
_SEQUENCE: Final[Axes] = {0: "batch", 1: "positions"}
_HEADS: Final[Axes] = {0: "batch", 2: "positions"}
_FIXED: Final[Axes] = {}


@dataclass(frozen=True, kw_only=True)
class OneLayer:
    """A model of one layer.

    Attributes:
        model: ``onnx.ModelProto``.
        feeds: Inputs at the sizes of the layer, drawn alike each time.
    """

    model: Any
    feeds: dict[str, Array]


def one_layer(
    shape: LayerShape, *, precision: Precision, scheme: Int8Scheme, static: bool = False
) -> OneLayer:
    """The model of one layer at batch 1.

    A convolution has a bias and a Relu, which runtimes put into it. A linear layer is MatMul and
    Add on [1, positions, features]; at one position it is Gemm on [1, features], as it stands
    behind a pooling. Attention is two MatMuls with a Softmax between over [1, heads, positions,
    size of a head]; it has no weights, and stays in float. In integers a convolution takes and
    gives them; a linear layer takes float, as it stands behind a normalisation, and gives float
    where the scheme lets it.

    Args:
        shape: The layer.
        precision: Of its weights.
        scheme: How the target wants its integers.
        static: Fix the batch and the positions. Runtimes fuse other operators where they are fixed.
    """
    integers = scheme if precision == "int8" and shape.kind != "attention" else None
    writer = _Writer(integers, static=static)
    build = {"conv": _conv, "linear": _linear, "attention": _attention}[shape.kind]
    if shape.kind == "linear" and shape.size == (1,):
        build = _flat
    build(writer, shape)
    return writer.made()


def nothing(*, nodes: int) -> OneLayer:
    """A model of ``nodes`` that do next to nothing: what a call costs, and what each node does."""
    writer = _Writer(None, static=True)
    name = writer.input("x", [1])
    for index in range(nodes):
        name = writer.node("Sin", [name], f"y{index}")
    writer.output(name, [1])
    return writer.made()


def nodes_of(shape: LayerShape, *, precision: Precision) -> int:
    """Nodes of a layer as runtimes run it: what goes into another node is not counted."""
    if shape.kind == "attention":
        return 3
    quantizes = precision == "int8" and shape.kind == "linear" and shape.size != (1,)
    return 2 if quantizes else 1


class _Writer:
    """Collects the parts of a graph. ``scheme`` is None for float."""

    def __init__(self, scheme: Int8Scheme | None, *, static: bool) -> None:
        onnx: Any = extras.require("onnx")
        self._helper, self._numpy = onnx.helper, onnx.numpy_helper
        self.scheme = scheme
        self._static = static
        self._feeds: dict[str, Array] = {}
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._random = np.random.default_rng(0)

    def made(self) -> OneLayer:
        graph = self._helper.make_graph(
            self._nodes, "layer", self._inputs, self._outputs, self._constants
        )
        opset = max(_FLOAT_OPSET, self.scheme.least_opset if self.scheme else 0)
        imports = [self._helper.make_opsetid("", opset)]
        version = self._helper.find_min_ir_version_for(imports)
        model = self._helper.make_model(graph, opset_imports=imports, ir_version=version)
        return OneLayer(model=model, feeds=self._feeds)

    def input(
        self, name: str, shape: Sequence[int], dtype: str = "float32", *, dynamic: Axes = _FIXED
    ) -> str:
        """An input of ``shape``, in which the axes ``dynamic`` have names where they may."""
        self._inputs.append(self._value(name, shape, dtype, dynamic))
        self._feeds[name] = self._drawn(shape, dtype)
        return name

    def output(
        self, name: str, shape: Sequence[int], dtype: str = "float32", *, dynamic: Axes = _FIXED
    ) -> None:
        self._outputs.append(self._value(name, shape, dtype, dynamic))

    def _value(self, name: str, shape: Sequence[int], dtype: str, dynamic: Axes) -> Any:
        kind = self._helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        named = {} if self._static else dynamic
        sizes = [named.get(axis, size) for axis, size in enumerate(shape)]
        return self._helper.make_tensor_value_info(name, kind, sizes)

    def _drawn(self, shape: Sequence[int], dtype: str) -> Array:
        if dtype == "float32":
            return self._random.standard_normal(tuple(shape), dtype=np.float32)
        return self._random.integers(0, 64, size=tuple(shape)).astype(dtype)

    def constant(self, name: str, values: Array) -> str:
        self._constants.append(self._numpy.from_array(np.asarray(values), name))
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        made = self._helper.make_node(operator, inputs, [output], name=output, **attributes)
        self._nodes.append(made)
        return output

    def weight(self, shape: Sequence[int], *, operator: str, axis: int) -> str:
        """A weight in the precision asked for; ``axis`` is that of its outputs."""
        if self.scheme is None:
            values = self._random.standard_normal(tuple(shape), dtype=np.float32) / 16
            return self.constant("weight", values)
        integers = self._random.integers(-63, 64, size=tuple(shape), dtype=np.int8)
        per_channel = self.scheme.per_channel and operator not in self.scheme.per_tensor
        count = shape[axis] if per_channel else 1
        return self._restored("weight", integers, _WEIGHT_SCALE, count=count, axis=axis)

    def bias(self, channels: int) -> str:
        """The bias of a convolution."""
        if self.scheme is None or self.scheme.bias == "float":
            return self.constant("bias", np.full(channels, 0.1, dtype=np.float32))
        scale = _ACTIVATION_SCALE * _WEIGHT_SCALE
        count = channels if self.scheme.per_channel else 1
        integers = np.full(channels, 99, dtype=np.int32)
        return self._restored("bias", integers, scale, count=count, axis=0)

    def _restored(self, name: str, integers: Array, scale: float, *, count: int, axis: int) -> str:
        """A constant of integers behind its DequantizeLinear; ``count`` 1 is one scale for all."""
        size = () if count == 1 else (count,)
        inputs = [
            self.constant(f"{name}.quantized", integers),
            self.constant(f"{name}.scale", np.full(size, scale, dtype=np.float32)),
            self.constant(f"{name}.zero_point", np.zeros(size, dtype=integers.dtype)),
        ]
        along = {} if count == 1 else {"axis": axis}
        return self.node("DequantizeLinear", inputs, name, **along)

    def grid(self, *, signed: bool) -> list[str]:
        """Names of the scale and zero point of activations; ``signed`` ones have zero inside."""
        kind = np.dtype(self.activation)
        inside = signed and kind.kind == "u"
        zero = (int(np.iinfo(kind).max) + 1) // 2 if inside else 0
        name = "signed" if signed else "positive"
        if not any(tensor.name == f"{name}.scale" for tensor in self._constants):
            self.constant(f"{name}.scale", np.array(_ACTIVATION_SCALE, dtype=np.float32))
            self.constant(f"{name}.zero_point", np.array(zero, dtype=kind))
        return [f"{name}.scale", f"{name}.zero_point"]

    @property
    def activation(self) -> str:
        """Type of activations."""
        return self.scheme.activation if self.scheme else "float32"


def _conv(writer: _Writer, shape: LayerShape) -> None:
    """Input [1, inputs, *size] -> y [1, outputs, *size], both integers where the layer is."""
    kernel = [shape.outputs, shape.inputs // shape.groups, *shape.kernel]
    x = writer.input("x", [1, shape.inputs, *shape.size], writer.activation, dynamic=_BATCH)
    if writer.scheme:
        x = writer.node("DequantizeLinear", [x, *writer.grid(signed=False)], "x.restored")
    weight = writer.weight(kernel, operator="Conv", axis=0)
    sums = writer.node(
        "Conv",
        [x, weight, writer.bias(shape.outputs)],
        "sums",
        kernel_shape=shape.kernel,
        strides=shape.stride,
        pads=[*shape.padding, *shape.padding],
        group=shape.groups,
    )
    if writer.scheme and writer.scheme.absorbs_clips and writer.scheme.quantize_outputs:
        rectified = sums  # the grid does it
    else:
        rectified = writer.node("Relu", [sums], "rectified" if writer.scheme else "y")
    if writer.scheme:
        writer.node("QuantizeLinear", [rectified, *writer.grid(signed=False)], "y")
    result = [1, shape.outputs, *output_size(shape)]
    writer.output("y", result, writer.activation, dynamic=_BATCH)


def _linear(writer: _Writer, shape: LayerShape) -> None:
    """Input float32 [1, positions, inputs] -> y [1, positions, outputs]."""
    x = writer.input("x", [1, *shape.size, shape.inputs], dynamic=_SEQUENCE)
    grid = writer.grid(signed=True) if writer.scheme else []
    if writer.scheme:
        quantized = writer.node("QuantizeLinear", [x, *grid], "x.quantized")
        x = writer.node("DequantizeLinear", [quantized, *grid], "x.restored")
    weight = writer.weight([shape.inputs, shape.outputs], operator="MatMul", axis=1)
    product = writer.node("MatMul", [x, weight], "product")
    rounds = writer.scheme is not None and not writer.scheme.float_products
    if rounds:
        quantized = writer.node("QuantizeLinear", [product, *grid], "product.quantized")
        product = writer.node("DequantizeLinear", [quantized, *grid], "product.restored")
    bias = writer.constant("bias", np.full(shape.outputs, 0.1, dtype=np.float32))
    total = writer.node("Add", [product, bias], "total" if rounds else "y")
    if rounds:
        writer.node("QuantizeLinear", [total, *grid], "y")
    kind = writer.activation if rounds else "float32"
    writer.output("y", [1, *shape.size, shape.outputs], kind, dynamic=_SEQUENCE)


def _flat(writer: _Writer, shape: LayerShape) -> None:
    """Input [1, inputs], integers where the layer is -> y [1, outputs], float where it may be."""
    x = writer.input("x", [1, shape.inputs], writer.activation, dynamic=_BATCH)
    if writer.scheme:
        x = writer.node("DequantizeLinear", [x, *writer.grid(signed=False)], "x.restored")
    weight = writer.weight([shape.outputs, shape.inputs], operator="Gemm", axis=0)
    inputs = [x, weight, writer.bias(shape.outputs)]
    if writer.scheme is None or writer.scheme.float_products:
        writer.node("Gemm", inputs, "y", transB=1)
        writer.output("y", [1, shape.outputs], dynamic=_BATCH)
        return
    sums = writer.node("Gemm", inputs, "sums", transB=1)
    writer.node("QuantizeLinear", [sums, *writer.grid(signed=False)], "y")
    writer.output("y", [1, shape.outputs], writer.activation, dynamic=_BATCH)


def _attention(writer: _Writer, shape: LayerShape) -> None:
    """Queries, keys [1, heads, size, positions] and values -> [1, heads, positions, size]."""
    heads, positions = shape.groups, shape.size[0]
    key, value = shape.inputs // heads, shape.outputs // heads
    queries = writer.input("queries", [1, heads, positions, key], dynamic=_HEADS)
    keys = writer.input("keys", [1, heads, key, positions], dynamic={0: "batch", 3: "positions"})
    values = writer.input("values", [1, heads, positions, value], dynamic=_HEADS)
    scores = writer.node("MatMul", [queries, keys], "scores")
    shares = writer.node("Softmax", [scores], "shares", axis=-1)
    writer.node("MatMul", [shares, values], "y")
    writer.output("y", [1, heads, positions, value], dynamic=_HEADS)
