"""The clean-up: what exporters leave behind goes, and what the graph computes stays.

Every pass works in place on an ``onnx_ir.Model``, so that external weights stay on disk. Nodes and
values that survive keep their names, which lead back to the modules of PyTorch; the names, order,
types and named dimensions of the graph's inputs and outputs never change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from equipoise import extras, onnxio, provenance
from equipoise.errors import SourceError

_FOLD_INPUT_ELEMENTS: Final = 8192
_FOLD_OUTPUT_ELEMENTS: Final = 65_536
"""A folded constant larger than this, and than what it replaces, costs more bytes than it saves."""

Pass = Callable[[Any], None]


def _common(name: str, **settings: Any) -> Pass:
    """The pass ``name`` of onnx_ir."""

    def run(model: Any) -> None:
        passes: Any = extras.require("onnx_ir.passes.common")
        getattr(passes, name)(**settings)(model)

    return run


def _fold(model: Any) -> None:
    """Compute what depends on constants alone; shapes are inferred on the way."""
    optimizer: Any = extras.require("onnxscript.optimizer")
    optimizer.fold_constants_ir(
        model,
        onnx_shape_inference=True,
        input_size_limit=_FOLD_INPUT_ELEMENTS,
        output_size_limit=_FOLD_OUTPUT_ELEMENTS,
        should_fold=_too_large,
    )


def _too_large(node: Any) -> bool | None:
    """False for a result too large to keep, before it is computed; None leaves the choice open."""
    shapes = [value.shape for value in node.outputs]
    if any(shape is None or not shape.is_static() for shape in shapes):
        return None
    result = sum(math.prod(shape.numpy()) for shape in shapes)
    replaced = sum(value.const_value.size for value in node.inputs if value is not None)
    return False if result > max(_FOLD_OUTPUT_ELEMENTS, replaced) else None


def _merge_duplicates(model: Any) -> None:
    """Keep the first of equal initializers of a graph; only those with a twin in form are read."""
    for graph in model.graphs():
        alike: dict[object, list[Any]] = {}
        for value in graph.initializers.values():
            fixed = value.is_graph_input() or value.is_graph_output() or value.const_value is None
            if not fixed:
                form = value.const_value.dtype, tuple(value.const_value.shape)
                alike.setdefault(form, []).append(value)
        for values in alike.values():
            _merge_equal(graph, values)


def _merge_equal(graph: Any, values: list[Any]) -> None:
    """Let the readers of equal ``values``, all of one dtype and shape, read the first of them."""
    kept: dict[str, Any] = {}
    for value in values if len(values) > 1 else ():
        first = kept.setdefault(_digest(value.const_value), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[value.name]


def _digest(tensor: Any) -> str:
    strings = tensor.dtype.is_string()
    content = repr(tensor.string_data()).encode() if strings else tensor.tobytes()
    return hashlib.sha256(content).hexdigest()


PASSES: Final[Mapping[str, Pass]] = {
    "inline": _common("InlinePass"),
    "fold": _fold,
    "lift": _common("LiftConstantsToInitializersPass", lift_all_constants=True, size_limit=0),
    "identities": _common("IdentityEliminationPass"),
    "duplicates": _merge_duplicates,
    "subexpressions": _common("CommonSubexpressionEliminationPass"),
    "dead": _common("RemoveUnusedNodesPass"),
    "functions": _common("RemoveUnusedFunctionsPass"),
    "opsets": _common("RemoveUnusedOpsetsPass"),
    "sort": _common("TopologicalSortPass"),
    "names": _common("NameFixPass"),
}
"""Name -> pass over an ``onnx_ir.Model``, in the order in which they run.

Equal constants become one before equal nodes do: nodes are equal when they read the same values.
``dead`` takes nodes, optional outputs and initializers that nothing reads.
"""


@dataclass(frozen=True, kw_only=True)
class PassCount:
    """What one pass did: nodes, those of subgraphs and functions included, and constant bytes."""

    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True)
class CleanRecord:
    """Attributes: passes: Pass -> what it did, in the order of ``PASSES``."""

    passes: dict[str, PassCount]


def clean(model: Any, *, release: bool) -> CleanRecord:
    """Run all passes over ``model``, an ``onnx_ir.Model``, in place.

    Args:
        model: The model.
        release: Also drop doc strings and the exporter's metadata, but for the paths of modules.

    Raises:
        SourceError: A pass cannot take the model.
    """
    record = CleanRecord(passes={name: run_pass(name, model) for name in PASSES})
    if release:
        _strip(model)
    return record


def run_pass(name: str, model: Any) -> PassCount:
    """Run one of ``PASSES`` over ``model`` in place; its inputs and outputs stay as they are.

    Raises:
        SourceError: The pass cannot take the model.
    """
    nodes, size = _counts(model)
    ports = _ports(model)
    try:
        PASSES[name](model)
        _restore(model, ports)
    except Exception as error:  # a pass may raise anything on a graph it does not know
        raise SourceError(f"the clean-up pass {name!r} failed: {error}") from error
    nodes_after, size_after = _counts(model)
    return PassCount(
        nodes_before=nodes, nodes_after=nodes_after, bytes_before=size, bytes_after=size_after
    )


_Port = tuple[str, Any, Any]


def _ports(model: Any) -> list[_Port]:
    """Name, type and shape of every input and output."""
    values = [*model.graph.inputs, *model.graph.outputs]
    return [(v.name, v.type, None if v.shape is None else v.shape.copy()) for v in values]


def _restore(model: Any, ports: list[_Port]) -> None:
    """Undo what a pass did to the signature: one merges the names of dimensions, for example."""
    values = [*model.graph.inputs, *model.graph.outputs]
    for value, (name, dtype, shape) in zip(values, ports, strict=True):
        value.name, value.type, value.shape = name, dtype, shape


def _counts(model: Any) -> tuple[int, int]:
    """Nodes and constant bytes of ``model``; no weight is read."""
    nodes = _all_nodes(model)
    attributes = (attribute for node in nodes for attribute in node.attributes.values())
    ir: Any = extras.require("onnx_ir")
    constants = (
        int(attribute.as_tensor().nbytes)
        for attribute in attributes
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref()
    )
    return len(nodes), onnxio.ir_weight_bytes(model) + sum(constants)


def _all_nodes(model: Any) -> list[Any]:
    graphs = (model.graph, *model.functions.values())
    return [node for graph in graphs for node in graph.all_nodes()]


def _strip(model: Any) -> None:
    """Drop doc strings and metadata of graphs, nodes and values.

    Stack traces have the paths of files on the exporting machine. Nodes keep the path of their
    module, by which a fault is traced back.
    """
    nodes = [(n, provenance.module_of(n.name or "", n.metadata_props)) for n in _all_nodes(model)]
    _common("ClearMetadataAndDocStringPass")(model)
    for node, path in nodes:
        if path and path != provenance.module_of(node.name or "", {}):
            node.metadata_props[provenance.MODULE_KEY] = path
    values = [value for node in _all_nodes(model) for value in node.outputs]
    for graph in model.graphs():
        values += [*graph.inputs, *graph.initializers.values()]
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
