"""Which PyTorch module a node of an ONNX graph comes from.

The exporter by ``torch.export`` writes the scopes of a node into its metadata, the tracing one into
its name, and our own clean-up keeps the path alone for a file that is released. Passes that put in
nodes of their own leave them without: those belong to the module of their neighbours.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, Final

MODULE_KEY: Final = "equipoise.module"
"""Metadata of a node in a released file: the path of its module and nothing of the machine."""

_SCOPES_KEY: Final = "pkg.torch.onnx.name_scopes"
_WRAPPER: Final = "inner"
"""Attribute under which the exporter's wrapper, which calls by position, holds the model."""


def module_path(node: Any) -> str:
    """Path of the module of ``node``, such as ``encoder.layer.0.output``.

    Args:
        node: ``onnx.NodeProto``.

    Returns:
        The path as ``named_modules`` has it; empty for the model itself, or when nothing tells.
    """
    return module_of(str(node.name), {entry.key: entry.value for entry in node.metadata_props})


def module_of(name: str, metadata: Mapping[str, str]) -> str:
    """As :func:`module_path`, from the name and the metadata of a node."""
    if MODULE_KEY in metadata:
        return metadata[MODULE_KEY]
    if _SCOPES_KEY in metadata:
        return _of_scopes(metadata[_SCOPES_KEY])
    return _of_traced(name)


def _of_scopes(text: str) -> str:
    """From a list like ``['', 'inner', 'inner.fc', 'linear']``: modules, then the operation."""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ""
    if not isinstance(scopes, list) or len(scopes) < 2:
        return ""
    path = str(scopes[-2])
    # What no module does has a scope that is called after the hook that found none.
    return "" if path.startswith("_empty_nn_module_stack") else _without_wrapper(path)


def _of_traced(name: str) -> str:
    """From ``/inner/layers.0/Add``; a Sequential shows twice, in ``/first/first.0/Add``."""
    if not name.startswith("/"):
        return ""
    steps: list[str] = []
    for step in name.split("/")[1:-1]:
        if steps and step.startswith(f"{steps[-1]}."):
            steps.pop()
        steps.append(step)
    return _without_wrapper(".".join(steps))


def _without_wrapper(path: str) -> str:
    return "" if path == _WRAPPER else path.removeprefix(f"{_WRAPPER}.")


def module_paths(model: Any) -> dict[int, str]:
    """Index of each node of the main graph -> path of its module.

    A node that a pass put in, and that has no path of its own, belongs to the module that made what
    it reads; one that reads constants alone belongs to whoever reads it.

    Args:
        model: ``onnx.ModelProto``, nodes in topological order.
    """
    nodes = list(model.graph.node)
    found = {index: module_path(node) for index, node in enumerate(nodes)}
    own = {i for i, node in enumerate(nodes) if found[i] or node.metadata_props}
    made: dict[str, str] = {}
    for index, node in enumerate(nodes):
        if index not in own:
            found[index] = next((made[name] for name in node.input if made.get(name)), "")
        made.update(dict.fromkeys(node.output, found[index]))
    read: dict[str, str] = {}
    for index in reversed(range(len(nodes))):
        if index not in own and not found[index]:
            found[index] = next((read[name] for name in nodes[index].output if read.get(name)), "")
        read.update(dict.fromkeys(nodes[index].input, found[index]))
    return found
