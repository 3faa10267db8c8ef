"""Which nodes may run in integers.

Layers with weights are where integers pay. Between them some operators can stay in integers too, so
that no detour through float is needed; alone they gain nothing and only round once more. Softmax,
normalisations and GELU stay in float: an 8-bit grid bends what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from equipoise import onnxio
from equipoise.quantize.layers import LAYERS, find_layers
from equipoise.quantize.statistics import TensorStatistics
from equipoise.targets.profile import Int8Scheme

MOVES_VALUES: Final = frozenset(
    {"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators whose output holds values of their input, so that one grid serves both."""

_NEEDS_ALL_INPUTS: Final = frozenset({"Add", "Concat", "Mul"})


@dataclass(frozen=True, kw_only=True)
class FloatNode:
    """A node that stays in float, and why."""

    name: str
    operator: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which nodes may run in integers, and why others with weights or products do not."""

    nodes: frozenset[str]
    kept: tuple[FloatNode, ...]


def integer_nodes(
    model: Any, statistics: Mapping[str, TensorStatistics], *, scheme: Int8Scheme
) -> Choice:
    """The nodes of ``model`` that ``scheme`` runs in integers.

    Args:
        model: Float ``onnx.ModelProto`` whose nodes have names.
        statistics: Activation -> what calibration saw.
        scheme: What the target can do.
    """
    constants = set(onnxio.initializers(model))
    layers = {layer.name for layer in find_layers(model)}
    kept = [
        FloatNode(name=node.name, operator=node.op_type, reason=reason)
        for node in model.graph.node
        if node.op_type in LAYERS
        and (reason := _reason(node, statistics, constants=constants, known=node.name in layers))
    ]
    chosen = layers - {node.name for node in kept}
    joined = _joins(model, chosen, statistics=statistics, scheme=scheme, constants=constants)
    return Choice(nodes=frozenset(chosen | joined), kept=tuple(kept))


def _reason(
    node: Any, statistics: Mapping[str, TensorStatistics], *, constants: set[str], known: bool
) -> str:
    if len(node.input) > 1 and node.input[1] not in constants:
        return "a product of two activations rounds both"
    if not known:
        return "its weight is shared, is no matrix, or is scaled"
    for name in (node.input[0], node.output[0]):
        seen = statistics.get(name)
        if seen is not None and seen.masked:
            return f"{name} holds {seen.masked} mask constants, not activations alone"
    seen = statistics.get(node.input[0])
    if seen is None or not seen.count:
        return f"calibration saw no value of {node.input[0]}"
    return "" if math.isfinite(seen.low + seen.high) else f"{node.input[0]} is not finite"


def _joins(
    model: Any,
    layers: set[str],
    *,
    statistics: Mapping[str, TensorStatistics],
    scheme: Int8Scheme,
    constants: set[str],
) -> set[str]:
    """Operators of ``scheme.joins`` that read integers alone and lead to a layer in integers."""
    integer = _through_clips(model, layers)
    joined: set[str] = set()
    for node in model.graph.node:
        if node.name in layers:
            integer.update(node.output)
        elif node.op_type in scheme.joins and _reads_integers(node, integer, constants, statistics):
            joined.add(node.name)
            integer.update(node.output)
        elif node.op_type in {"Clip", "Relu"} and node.input[0] in integer:
            integer.update(node.output)
    return _leading_to_layers(model, layers, joined)


def _through_clips(model: Any, layers: set[str]) -> set[str]:
    """Outputs of the layers to begin with: a product gives float out unless it is a convolution."""
    return {
        name
        for node in model.graph.node
        if node.name in layers and node.op_type != "MatMul"
        for name in node.output
    }


def _reads_integers(
    node: Any,
    integer: set[str],
    constants: set[str],
    statistics: Mapping[str, TensorStatistics],
) -> bool:
    if any(name in statistics and statistics[name].masked for name in node.output):
        return False
    values = node.input if node.op_type in _NEEDS_ALL_INPUTS else node.input[:1]
    return all(name in integer and name not in constants for name in values)


def _leading_to_layers(model: Any, layers: set[str], joined: set[str]) -> set[str]:
    """Those of ``joined`` whose result some layer in integers reads in the end."""
    useful: set[str] = set()
    wanted: set[str] = set()
    for node in reversed(list(model.graph.node)):
        passes = node.op_type in {"Clip", "Relu"} and wanted & set(node.output)
        is_join = node.name in joined and wanted & set(node.output)
        if is_join:
            useful.add(node.name)
        if node.name in layers:
            wanted.add(node.input[0])
        elif is_join or passes:
            wanted.update(node.input)
    return useful
