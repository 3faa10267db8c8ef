"""Outlier channels: a few inputs of a product kept in float beside the integers.

One channel that is ten times as large as all others costs the others three of their eight bits. Its
share of the product is a thin float product of its own (Dettmers et al., LLM.int8(), arXiv
2208.07339, section 3.2; there the channels are found in every run, here in calibration).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from equipoise import extras
from equipoise.quantize.layers import Layer, read_array, write_array
from equipoise.spec import Array


def split_outliers(model: Any, layers: Sequence[Layer], *, channels: Array) -> None:
    """Compute ``channels`` of what ``layers`` read in float, in place.

    Args:
        model: Float ``onnx.ModelProto``.
        layers: MatMul layers that read the same activation.
        channels: int64, the channels to take out; their weights in the layers become zero.
    """
    helper = extras.require("onnx").helper
    few = f"{layers[0].input}.outliers"
    write_array(model, f"{few}.channels", np.asarray(channels, dtype=np.int64))
    gather = helper.make_node(
        "Gather", [layers[0].input, f"{few}.channels"], [few], name=few, axis=-1
    )
    _insert(model, [gather], before=layers[0])
    for layer in layers:
        _split(model, layer, few=few, channels=channels)


def _split(model: Any, layer: Layer, *, few: str, channels: Array) -> None:
    helper = extras.require("onnx").helper
    weight, output = read_array(model, layer.weight).copy(), layer.output
    taken, rest, part = (f"{output}.{end}" for end in ("outlier_weight", "integers", "outliers"))
    write_array(model, taken, np.ascontiguousarray(weight[channels]))
    weight[channels] = 0
    write_array(model, layer.weight, weight)
    product = helper.make_node("MatMul", [few, taken], [part], name=part)
    _insert(model, [product], before=layer)
    layer.node.output[0] = rest
    both = helper.make_node("Add", [rest, part], [output], name=f"{output}.both")
    position = list(model.graph.node).index(layer.node)
    model.graph.node.insert(position + 1, both)


def _insert(model: Any, nodes: Sequence[Any], *, before: Layer) -> None:
    position = list(model.graph.node).index(before.node)
    for offset, node in enumerate(nodes):
        model.graph.node.insert(position + offset, node)
