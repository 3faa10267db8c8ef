"""Writing Q/DQ: integers and their grids into a graph, as runtimes want to read them.

A runtime runs a node in integers when it reads DequantizeLinear and, for most operators, when a
QuantizeLinear reads it. Which nodes and which grids is decided elsewhere; here they are put in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from equipoise import extras, onnxio
from equipoise.quantize.grids import Grid, power_of_two_above
from equipoise.quantize.layers import Layer, find_layers, read_array
from equipoise.quantize.weights import read_in_subgraphs
from equipoise.spec import Array

_INT32_MOST: Final = 2**31 - 1
_BIAS_MOST: Final = 2**30
"""Half of int32: the products are added to the bias in the same register."""

_ABSORBED: Final = frozenset({"Clip", "Relu"})
_PRODUCTS: Final = frozenset({"Gemm", "MatMul"})
_ROUNDED_UNASKED: Final = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Operators whose float weights ONNX Runtime rounds where they stand between integers."""

_RESTORED: Final = ".dequantized"
_FLOOR: Final = "equipoise.least_float"


@dataclass(frozen=True, kw_only=True)
class IntegerWeight:
    """A weight on its grid.

    Attributes:
        values: Integers, of the shape that the graph stores.
        grid: Their grid.
    """

    values: Array
    grid: Grid


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Everything that a quantised graph adds to a float one.

    Attributes:
        nodes: Names of the nodes that run in integers.
        activations: Activation -> its grid.
        weights: Initializer -> what it becomes.
        integer_bias: Store the biases of convolutions and Gemm as int32; else they stay float.
        quantize_outputs: Follow a node by a QuantizeLinear, as ONNX Runtime wants; TensorRT wants
            the inputs alone.
        float_products: Let a MatMul or Gemm in integers give float out where float is read.
        fuses_adds: Leave the input of an Add in float that a convolution just computed, because
            the runtime adds before it rounds.
        absorbs_clips: Take out each Clip and Relu that the grid of its output does anyway; it
            needs ``quantize_outputs``.
    """

    nodes: frozenset[str]
    activations: Mapping[str, Grid]
    weights: Mapping[str, IntegerWeight]
    integer_bias: bool = True
    quantize_outputs: bool = True
    float_products: bool = True
    fuses_adds: bool = False
    absorbs_clips: bool = True


def write_qdq(model: Any, placement: Placement) -> None:
    """Put ``placement`` into ``model``, in place.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes.
        placement: What to put in.
    """
    if placement.absorbs_clips and placement.quantize_outputs:
        absorb_activations(model, placement.nodes, placement.activations)
    _Writer(model, placement).write()


class _Writer:
    def __init__(self, model: Any, placement: Placement) -> None:
        self._model, self._placement = model, placement
        self._helper = extras.require("onnx").helper
        self._layers = {layer.name: layer for layer in find_layers(model)}
        self._constants = set(onnxio.initializers(model))
        self._before: dict[str, list[Any]] = {}
        self._after: dict[str, list[Any]] = {}

    def write(self) -> None:
        nodes = [n for n in self._model.graph.node if n.name in self._placement.nodes]
        readers = {name: list(nodes) for name, nodes in onnxio.consumers(self._model).items()}
        for node in nodes:
            if node.name in self._layers:
                self._weights_of(self._layers[node.name])
        written = self._written(nodes, readers)
        read = dict.fromkeys(name for node in nodes for name in self._reads(node, readers))
        for name in dict.fromkeys([*written, *read]):
            if name in self._placement.activations:
                self._activation(name, readers.get(name, []), everywhere=name in written)
        self._shield_float_layers()
        self._assemble()

    def _shield_float_layers(self) -> None:
        """Keep layers in float that read what comes back from integers.

        ONNX Runtime takes a Conv, ConvTranspose or Gemm between DequantizeLinear and QuantizeLinear
        for one that was to be quantised, and rounds its float weights to one scale for the whole
        tensor. It moves QuantizeLinear up through activation functions and all that only moves
        values, so that any of them may come to stand there.
        """
        for node in self._model.graph.node:
            in_float = node.op_type in _ROUNDED_UNASKED and node.name not in self._placement.nodes
            if in_float and node.input[0].endswith(_RESTORED):
                self._shield(node)

    def _shield(self, layer: Any) -> None:
        shielded = f"{layer.name}.input"
        if _FLOOR not in self._constants:
            self._constants.add(_FLOOR)
            self._initializer(_FLOOR, np.array(np.finfo(np.float32).min))
        node = self._helper.make_node("Max", [layer.input[0], _FLOOR], [shielded], name=shielded)
        self._before.setdefault(layer.name, []).append(node)
        layer.input[0] = shielded

    def _written(self, nodes: list[Any], readers: Mapping[str, list[Any]]) -> dict[str, None]:
        """Outputs that a QuantizeLinear reads."""
        if not self._placement.quantize_outputs:
            return {}
        return dict.fromkeys(
            name
            for node in nodes
            for name in node.output
            if not self._placement.float_products
            or _rounds_for_all(node, readers.get(name, []), self._placement.nodes)
        )

    def _producer(self, name: str) -> Any:
        return next((n for n in self._model.graph.node if name in n.output), None)

    def _reads(self, node: Any, readers: Mapping[str, list[Any]]) -> list[str]:
        """Inputs of a node in integers that a QuantizeLinear reads."""
        names = node.input[:1] if node.name in self._layers else node.input
        fused = self._fused(node, readers) if self._placement.fuses_adds else ""
        return [name for name in names if name not in self._constants and name != fused]

    def _fused(self, node: Any, readers: Mapping[str, list[Any]]) -> str:
        """The input of an Add that the convolution before it adds to in float; empty for none."""
        made = {
            layer.output
            for layer in self._layers.values()
            if layer.operator == "Conv" and layer.name in self._placement.nodes
        }
        inputs = [name for name in node.input if name in made and len(readers[name]) == 1]
        return inputs[0] if inputs and node.op_type == "Add" else ""

    def _activation(self, name: str, readers: list[Any], *, everywhere: bool) -> None:
        """Q and DQ of one activation; its readers take what comes back."""
        grid = self._placement.activations[name]
        raw, restored = name, f"{name}{_RESTORED}"
        if name in {value.name for value in self._model.graph.output} and everywhere:
            raw, restored = f"{name}.float", name
            self._rename_output(name, raw)
        for node in readers:
            if everywhere or node.name in self._placement.nodes:
                _replace_input(node, name, restored)
        pair = self._pair(name, grid, raw=raw, restored=restored)
        producer = self._producer(raw)
        where = self._after.setdefault(producer.name, []) if producer is not None else None
        if where is None:
            where = self._before.setdefault("", [])
        where.extend(pair)

    def _rename_output(self, name: str, raw: str) -> None:
        producer = self._producer(name)
        producer.output[list(producer.output).index(name)] = raw

    def _pair(self, name: str, grid: Grid, *, raw: str, restored: str) -> list[Any]:
        scale, zero_point = self._parameters(name, grid)
        axis = {} if grid.axis is None else {"axis": grid.axis}
        quantized = f"{name}.quantized"
        return [
            self._helper.make_node(
                "QuantizeLinear",
                [raw, scale, zero_point],
                [quantized],
                name=f"{name}.QuantizeLinear",
                **axis,
            ),
            self._helper.make_node(
                "DequantizeLinear",
                [quantized, scale, zero_point],
                [restored],
                name=f"{name}.DequantizeLinear",
                **axis,
            ),
        ]

    def _weights_of(self, layer: Layer) -> None:
        weight = self._placement.weights[layer.weight]
        _replace_input(layer.node, layer.weight, f"{layer.weight}.dequantized")
        if not (self._placement.integer_bias and len(layer.node.input) > 2 and layer.bias):
            self._constant(layer.weight, weight.values, weight.grid)
            return
        stored = read_array(self._model, layer.bias).astype(np.float64)
        values = np.broadcast_to(stored.ravel(), (layer.channels,))
        input_scale = self._placement.activations[layer.input].scale
        weight = _with_room_for(values, weight, input_scale=input_scale)
        self._constant(layer.weight, weight.values, weight.grid)
        scale = input_scale * weight.grid.scale
        bias = np.rint(values / scale)
        grid = Grid(
            scale=np.asarray(scale, dtype=np.float32),
            zero_point=np.zeros(np.shape(scale), dtype=np.int32),
            low=-_INT32_MOST,
            high=_INT32_MOST,
            axis=None if np.ndim(scale) == 0 else 0,
        )
        name = f"{layer.name}.bias"
        layer.node.input[2] = f"{name}.dequantized"
        self._constant(name, np.clip(bias, -_INT32_MOST, _INT32_MOST).astype(np.int32), grid)

    def _constant(self, name: str, values: Array, grid: Grid) -> None:
        """An initializer of integers and its DequantizeLinear."""
        scale, zero_point = self._parameters(name, grid)
        self._initializer(f"{name}.quantized", values)
        axis = {} if grid.axis is None else {"axis": grid.axis}
        self._before.setdefault("", []).append(
            self._helper.make_node(
                "DequantizeLinear",
                [f"{name}.quantized", scale, zero_point],
                [f"{name}.dequantized"],
                name=f"{name}.DequantizeLinear",
                **axis,
            )
        )

    def _parameters(self, name: str, grid: Grid) -> tuple[str, str]:
        self._initializer(f"{name}.scale", grid.scale)
        self._initializer(f"{name}.zero_point", grid.zero_point)
        return f"{name}.scale", f"{name}.zero_point"

    def _initializer(self, name: str, array: Array) -> None:
        tensor = extras.require("onnx").numpy_helper.from_array(np.asarray(array), name)
        self._model.graph.initializer.append(tensor)

    def _assemble(self) -> None:
        """The nodes in an order in which each comes after what it reads."""
        nodes = [*self._before.get("", [])]
        for node in self._model.graph.node:
            before = self._before.get(node.name, []) if node.name else []
            nodes += [*before, node, *self._after.get(node.name, [])]
        del self._model.graph.node[:]
        self._model.graph.node.extend(nodes)
        _drop_unread(self._model)


def _with_room_for(bias: Array, weight: IntegerWeight, *, input_scale: Array) -> IntegerWeight:
    """``weight`` with scales at which ``bias`` fits into int32.

    A channel that training has switched off has weights of 1e-10 and an ordinary bias, which is
    2^31 times as large as the product of the scales, or more.
    """
    grid = weight.grid
    least = np.abs(bias) / (float(input_scale) * _BIAS_MOST)
    least = np.asarray(least.max() if grid.axis is None else least)
    if np.all(least <= grid.scale):
        return weight
    # Such weights lose nothing by up to a bit, and some targets take powers of two alone.
    scale = np.where(least <= grid.scale, grid.scale, power_of_two_above(least))
    wider = replace(grid, scale=scale.astype(np.float32))
    return IntegerWeight(values=wider.quantize(grid.dequantize(weight.values)), grid=wider)


def _replace_input(node: Any, name: str, replacement: str) -> None:
    for index, present in enumerate(node.input):
        if present == name:
            node.input[index] = replacement


def _drop_unread(model: Any) -> None:
    """Remove the float initializers that nobody reads any more."""
    read = {name for node in model.graph.node for name in node.input}
    read |= {value.name for value in model.graph.output}
    kept = [t for t in model.graph.initializer if t.name in read or _in_subgraph(model, t.name)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _in_subgraph(model: Any, name: str) -> bool:
    graphs = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    return any(name in node.input for graph in graphs for node in graph.node)


def absorb_activations(model: Any, nodes: frozenset[str], grids: Mapping[str, Grid]) -> int:
    """Remove each Clip and Relu that the grid of its output does anyway, in place.

    QuantizeLinear saturates at the ends of its grid. A Clip behind a node in integers changes
    nothing when the grid ends within its bounds, and hinders the runtime's fusion.

    Returns:
        How many were removed.
    """
    constants = onnxio.initializers(model)
    readers = onnxio.consumers(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    elsewhere = read_in_subgraphs(model) | {value.name for value in model.graph.output}
    removed = [
        node
        for node in model.graph.node
        if node.op_type in _ABSORBED
        and node.output[0] in grids
        and getattr(producers.get(node.input[0]), "name", "") in nodes
        and len(readers[node.input[0]]) == 1
        and node.input[0] not in elsewhere
        and _rounds_for_all(producers[node.input[0]], readers.get(node.output[0], []), nodes)
        and _within(node, grids[node.output[0]], constants)
    ]
    for node in removed:
        producer = producers[node.input[0]]
        producer.output[list(producer.output).index(node.input[0])] = node.output[0]
        model.graph.node.remove(node)
    return len(removed)


def _rounds_for_all(producer: Any, readers: list[Any], nodes: frozenset[str]) -> bool:
    """Whether all that read ``producer`` get integers: a product gives float out to the others."""
    read = [node.name in nodes for node in readers]
    return producer.op_type not in _PRODUCTS or (bool(read) and all(read))


def _within(node: Any, grid: Grid, constants: Mapping[str, Any]) -> bool:
    """Whether every value of the grid is one that the activation lets through."""
    ends = [float((q - int(grid.zero_point)) * float(grid.scale)) for q in (grid.low, grid.high)]
    slack = float(grid.scale) / 2
    if node.op_type == "Relu":
        return ends[0] >= 0
    low, high = (_bound(node, index, constants) for index in (1, 2))
    if low is None or high is None:
        return False
    return ends[0] >= low - slack and ends[1] <= high + slack


def _bound(clip: Any, index: int, constants: Mapping[str, Any]) -> float | None:
    if len(clip.input) <= index or not clip.input[index]:
        return float("-inf") if index == 1 else float("inf")
    tensor = constants.get(clip.input[index])
    return None if tensor is None else float(extras.require("onnx").numpy_helper.to_array(tensor))
