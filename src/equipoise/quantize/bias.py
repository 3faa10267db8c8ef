"""Bias correction: what quantisation adds to the mean of each output channel is taken off again.

Rounding errors of the weights of one channel do not cancel: on inputs whose mean is not zero, as
after a Relu, they shift its output (Nagel et al., arXiv 1906.04721, section 4.2). The shift is one
number per channel, and the bias takes it back for nothing. It follows from the mean input of the
layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise import onnxio
from equipoise.quantize.layers import Layer, find_layers, read_array, write_array
from equipoise.quantize.qdq import IntegerWeight
from equipoise.quantize.weights import read_in_subgraphs
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class UncorrectedLayer:
    """A layer whose shift stays, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """What was done.

    Attributes:
        corrected: Names of the layers whose bias was changed.
        uncorrected: The others.
    """

    corrected: tuple[str, ...]
    uncorrected: tuple[UncorrectedLayer, ...]


def expected_shifts(
    model: Any, means: Mapping[str, Array], *, weights: Mapping[str, IntegerWeight]
) -> dict[str, Array]:
    """The shift of each layer from the rounding of its own weights: error times mean input.

    Args:
        model: Float ``onnx.ModelProto``.
        means: Layer name -> ``[groups, inputs]``, the mean of what it reads.
        weights: Initializer -> what it becomes.

    Returns:
        Layer name -> float64 ``[channels]``: the mean of the quantised output less the float one.
    """
    shifts = {}
    for layer in find_layers(model):
        if layer.name in means and layer.weight in weights:
            integer = weights[layer.weight]
            stored = read_array(model, layer.weight).astype(np.float64)
            error = layer.rows(integer.grid.dequantize(integer.values) - stored)
            shifts[layer.name] = np.einsum("goi,gi->go", error, means[layer.name]).ravel()
    return shifts


def subtract_shifts(model: Any, shifts: Mapping[str, Array]) -> BiasCorrection:
    """Take ``shifts`` off the biases of ``model``, in place; a Conv or Gemm without one gets one.

    A bias that others read too is left to them, and the layer gets one of its own.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes, before Q/DQ.
        shifts: Layer name -> ``[channels]``.
    """
    corrected, uncorrected = [], []
    constants = onnxio.initializers(model)
    for layer in (layer for layer in find_layers(model) if layer.name in shifts):
        reason = _obstacle(layer, constants)
        if reason:
            uncorrected.append(UncorrectedLayer(name=layer.name, reason=reason))
        else:
            _subtract(model, layer, shifts[layer.name])
            corrected.append(layer.name)
    return BiasCorrection(corrected=tuple(corrected), uncorrected=tuple(uncorrected))


def _obstacle(layer: Layer, constants: Mapping[str, Any]) -> str:
    """Why a shift cannot be taken off; empty when it can."""
    if not bias_fits(layer, constants):
        return "its bias is not one constant per channel"
    if layer.operator == "MatMul" and not layer.bias:
        return "no Add of a constant follows it"
    return ""


def bias_fits(layer: Layer, constants: Mapping[str, Any]) -> bool:
    """Whether a layer has a constant bias of one number per channel, or for all, or none."""
    if not layer.bias:
        return len(layer.node.input) < 3 or not layer.node.input[2]
    size = int(np.prod(constants[layer.bias].dims))
    return size == 1 or size == layer.channels == constants[layer.bias].dims[-1]


def own_bias(model: Any, layer: Layer) -> str:
    """Name of a bias ``float32 [channels]`` that ``layer`` alone reads, made if there is none.

    Args:
        model: ``onnx.ModelProto``, changed in place.
        layer: A layer whose bias fits: see :func:`bias_fits`. Not a MatMul without an Add.
    """
    reader = _bias_reader(model, layer)
    if not layer.bias:
        values = np.zeros(layer.channels, dtype=np.float32)
    else:
        stored = read_array(model, layer.bias)
        values = np.broadcast_to(stored.ravel(), (layer.channels,)).copy()
    name = layer.bias if layer.bias and _alone(model, layer.bias) else f"{layer.name}.own_bias"
    write_array(model, name, values)
    index = list(reader.input).index(layer.bias) if layer.bias else 2
    if index == len(reader.input):
        reader.input.append(name)
    else:
        reader.input[index] = name
    return name


def _bias_reader(model: Any, layer: Layer) -> Any:
    """The node that adds the bias, or would."""
    if layer.result == layer.output:
        return layer.node
    return next(node for node in model.graph.node if layer.result in node.output)


def _alone(model: Any, name: str) -> bool:
    """Whether one node of the main graph reads ``name``, and nothing else does."""
    elsewhere = read_in_subgraphs(model) | {value.name for value in model.graph.output}
    return len(onnxio.consumers(model)[name]) == 1 and name not in elsewhere


def _subtract(model: Any, layer: Layer, shift: Array) -> None:
    name = own_bias(model, layer)
    values = read_array(model, name).astype(np.float64) - shift
    write_array(model, name, values.astype(np.float32))
