"""SmoothQuant: channels of an activation divided by a factor each, which their weights take up.

(Xiao et al., arXiv 2211.10438, section 4.) Where a LayerNormalization alone feeds the layers its
scale and bias take the division; elsewhere one Mul does, whose cost is small beside the product's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from equipoise import extras, onnxio
from equipoise.quantize.layers import Layer, read_array, write_array
from equipoise.spec import Array


def smoothing_factors(activation: Array, weight: Array, *, alpha: float) -> Array:
    """``max|x|^alpha / max|w|^(1 - alpha)`` per channel, scaled to a geometric mean of 1.

    Args:
        activation: float ``[channels]``, largest magnitude of each channel.
        weight: float ``[channels]``, largest magnitude of the weights that read it.
        alpha: Share of the difficulty that goes from activations to weights, 0 to 1.
    """
    tiny = float(np.finfo(np.float32).tiny)
    seen = np.maximum(activation, max(float(activation.max()) * 1e-4, tiny))
    read = np.maximum(weight, max(float(weight.max()) * 1e-4, tiny))
    factors = seen**alpha / read ** (1 - alpha)
    smoothed: Array = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
    return smoothed


def smooth(model: Any, layers: Sequence[Layer], *, factors: Array) -> str:
    """Divide what ``layers`` read by ``factors`` and multiply their weights, in place.

    Args:
        model: Float ``onnx.ModelProto``.
        layers: All MatMul layers that are to read the smoothed activation.
        factors: float32 ``[channels]``.

    Returns:
        Name of the smoothed activation.
    """
    name = layers[0].input
    for layer in layers:
        shape = (-1, 1) if layer.channel_axis == 1 else (1, -1)
        weight = read_array(model, layer.weight) * factors.reshape(shape)
        write_array(model, layer.weight, weight.astype(np.float32))
    norm = _only_feeder(model, layers)
    if norm is not None:
        for parameter in norm.input[1:]:
            write_array(model, parameter, read_array(model, parameter) / factors)
        return name
    return _multiplied(model, layers, name=name, factors=factors)


def _only_feeder(model: Any, layers: Sequence[Layer]) -> Any:
    """The LayerNormalization that feeds ``layers`` and nobody else, with constants of its own."""
    name, readers = layers[0].input, onnxio.consumers(model)
    constants = onnxio.initializers(model)
    norm = next((n for n in model.graph.node if name in n.output), None)
    if norm is None or norm.op_type != "LayerNormalization":
        return None
    if {n.name for n in readers[name]} != {layer.name for layer in layers}:
        return None
    if name in {value.name for value in model.graph.output}:
        return None
    own = all(p in constants and len(readers[p]) == 1 for p in norm.input[1:])
    return norm if own else None


def _multiplied(model: Any, layers: Sequence[Layer], *, name: str, factors: Array) -> str:
    smoothed = f"{name}.smoothed"
    write_array(model, f"{smoothed}.factors", (1 / factors).astype(np.float32))
    node = extras.require("onnx").helper.make_node(
        "Mul", [name, f"{smoothed}.factors"], [smoothed], name=smoothed
    )
    position = list(model.graph.node).index(layers[0].node)
    model.graph.node.insert(position, node)
    for layer in layers:
        layer.node.input[0] = smoothed
    return smoothed
