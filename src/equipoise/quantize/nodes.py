"""Which nodes may run in integers.

Layers with weights are where integers pay. Between them some operators can stay in integers too, so
that no detour through float is needed; alone they gain nothing and only round once more. Softmax,
normalisations and GELU stay in float: an 8-bit grid bends what they compute.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from equipoise import onnxio
from equipoise.errors import RecipeError
from equipoise.quantize.layers import LAYERS, find_layers
from equipoise.quantize.statistics import TensorStatistics
from equipoise.targets.profile import Int8Scheme

MOVES_VALUES: Final = frozenset(
    {"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators whose output holds values of their input, so that one grid serves both."""

_NEEDS_ALL_INPUTS: Final = frozenset({"Add", "Concat", "Mul"})
_CLIPS: Final = frozenset({"Clip", "Relu"})


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
    model: Any,
    statistics: Mapping[str, TensorStatistics],
    *,
    scheme: Int8Scheme,
    float_nodes: Collection[str] = (),
) -> Choice:
    """The nodes of ``model`` that ``scheme`` runs in integers.

    Args:
        model: Float ``onnx.ModelProto`` whose nodes have names.
        statistics: Activation -> what calibration saw.
        scheme: What the target can do.
        float_nodes: Names of nodes that stay in float in any case.

    Raises:
        RecipeError: ``model`` has no node of such a name.
    """
    nodes = model.graph.node
    _check_names(float_nodes, {node.name for node in nodes})
    constants = set(onnxio.initializers(model))
    known = {layer.name for layer in find_layers(model)}
    able = {node.name: node for node in nodes if node.op_type in LAYERS.union(scheme.joins)}
    named = {name: "named to stay in float" for name in able if name in float_nodes}
    reasons = named | {
        name: reason
        for name, node in able.items()
        if name not in named
        and node.op_type in LAYERS
        and (reason := _reason(node, statistics, constants=constants, known=name in known))
    }
    free = {name for name, node in able.items() if not _is_masked_join(node, statistics)}
    return Choice(
        nodes=connected(model, free - set(reasons)),
        kept=tuple(
            FloatNode(name=name, operator=node.op_type, reason=reasons[name])
            for name, node in able.items()
            if name in reasons
        ),
    )


def rounded_activations(model: Any, scheme: Int8Scheme) -> frozenset[str]:
    """The activations that ``scheme`` may round, whatever calibration sees of them.

    Args:
        model: Float ``onnx.ModelProto`` whose nodes have names; its weights may lack their values.
        scheme: What the target can do.
    """
    constants, readers = set(onnxio.initializers(model)), onnxio.consumers(model)
    able = {node.name for node in model.graph.node if _is_able(node, scheme, constants)}
    nodes = connected(model, able)
    names: set[str] = set()
    finished: set[str] = set()
    for node in [node for node in model.graph.node if node.name in nodes]:
        clips = [n for name in node.output for n in readers.get(name, []) if n.op_type in _CLIPS]
        names.update(node.input, node.output, *(clip.output for clip in clips))
        if clips and node.op_type == "Conv" and _is_absorbed(node, readers, scheme):
            finished.update(node.output)
    given_out = {value.name for value in model.graph.output}
    return frozenset(names - constants - (finished - given_out))


def _is_able(node: Any, scheme: Int8Scheme, constants: set[str]) -> bool:
    if node.op_type in LAYERS:
        return len(node.input) > 1 and node.input[1] in constants
    return node.op_type in scheme.joins


def _is_absorbed(convolution: Any, readers: Mapping[str, list[Any]], scheme: Int8Scheme) -> bool:
    """Whether the grid of the Clip or Relu behind it, its one reader, does for both."""
    absorbs = scheme.absorbs_clips and scheme.quantize_outputs and not scheme.symmetric
    return absorbs and len(readers[convolution.output[0]]) == 1


def connected(model: Any, nodes: Collection[str]) -> frozenset[str]:
    """Those of ``nodes`` that have weights, or stand between such ones and read integers alone.

    Args:
        model: ``onnx.ModelProto`` whose nodes have names.
        nodes: Names of nodes that may run in integers.
    """
    constants = set(onnxio.initializers(model))
    integer: set[str] = set()
    able: set[str] = set()
    for node in model.graph.node:
        is_able = node.name in nodes and (
            node.op_type in LAYERS or _reads_integers(node, integer, constants)
        )
        if is_able or (node.op_type in _CLIPS and node.input[0] in integer):
            integer.update(node.output)
        if is_able:
            able.add(node.name)
    return _leading_to_layers(model, able)


def _check_names(asked: Collection[str], present: Collection[str]) -> None:
    for name in asked:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            raise RecipeError(
                f"the model has no node {name!r} to leave in float among its {len(present)}",
                hint=f"Did you mean {near[0]!r}?" if near else "`equipoise diagnose` lists names.",
            )


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


def _is_masked_join(node: Any, statistics: Mapping[str, TensorStatistics]) -> bool:
    masked = any(name in statistics and statistics[name].masked for name in node.output)
    return masked and node.op_type not in LAYERS


def _reads_integers(node: Any, integer: set[str], constants: set[str]) -> bool:
    values = node.input if node.op_type in _NEEDS_ALL_INPUTS else node.input[:1]
    return all(name in integer and name not in constants for name in values)


def _leading_to_layers(model: Any, able: set[str]) -> frozenset[str]:
    """The layers among ``able``, and what else of it some layer reads in the end."""
    useful: set[str] = set()
    wanted: set[str] = set()
    for node in reversed(list(model.graph.node)):
        is_layer = node.name in able and node.op_type in LAYERS
        leads = bool(wanted & set(node.output))
        if is_layer or (node.name in able and leads):
            useful.add(node.name)
        if is_layer:
            wanted.add(node.input[0])
        elif leads and (node.name in able or node.op_type in _CLIPS):
            wanted.update(node.input)
    return frozenset(useful)
