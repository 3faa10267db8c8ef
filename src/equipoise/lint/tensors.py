"""Every constant of an ONNX model, wherever it lies, and how it is called in messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A ``TensorProto`` in a model.

    Attributes:
        tensor: The ``TensorProto``.
        name: What other nodes call its value; empty where it has no name.
        what: What it is in words: ``weight 'w'``, ``value of Constant 'c'``.
        node: Whether it is in an attribute of a node.
        loads: Whether it can have its data outside: no library reads that of sparse tensors and of
            graphs for training.
    """

    tensor: Any
    name: str
    what: str
    node: bool = False
    loads: bool = True


def scopes(model: Any) -> Iterator[list[Any]]:
    """Graphs that see each other's names: the main graph with those inside, then each function."""
    yield list(_nested(model.graph))
    for function in model.functions:
        yield list(_nested(function))


def training_graphs(model: Any) -> Iterator[Any]:
    """Graphs for training, with those inside."""
    for part in model.training_info:
        yield from _nested(part.initialization)
        yield from _nested(part.algorithm)


def _nested(graph: Any) -> Iterator[Any]:
    """``graph``, a GraphProto or FunctionProto, and the graphs in the attributes of its nodes."""
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield current
        for node in current.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting.extend(attribute.graphs)


def constants_of(graphs: Iterable[Any], *, loads: bool = True) -> Iterator[Constant]:
    """Constants of ``graphs``, without those of graphs inside them."""
    for graph in graphs:
        if graph.DESCRIPTOR.name == "GraphProto":
            yield from _initializers(graph, loads=loads)
        for node in graph.node:
            if node.attribute:
                yield from _of_node(node, loads=loads)


def _initializers(graph: Any, *, loads: bool) -> Iterator[Constant]:
    for tensor in graph.initializer:
        yield Constant(tensor=tensor, name=tensor.name, what=f"weight {tensor.name!r}", loads=loads)
    for sparse in graph.sparse_initializer:
        what = f"sparse weight {sparse.values.name!r}"
        yield from _sparse(sparse, name=sparse.values.name, what=what)


def _sparse(sparse: Any, *, name: str, what: str) -> Iterator[Constant]:
    yield Constant(tensor=sparse.values, name=name, what=what, loads=False)
    yield Constant(tensor=sparse.indices, name="", what=f"the indices of {what}", loads=False)


def _of_node(node: Any, *, loads: bool) -> Iterator[Constant]:
    """Tensors in attributes of ``node``; that of a Constant is called by its output."""
    made = node.output[0] if node.op_type == "Constant" and node.output else ""
    for attribute in node.attribute:
        what = f"{attribute.name} of {called(node)}"
        if attribute.HasField("t"):
            yield Constant(tensor=attribute.t, name=made, what=what, node=True, loads=loads)
        for tensor in attribute.tensors:
            yield Constant(tensor=tensor, name="", what=what, node=True, loads=loads)
        sparse = [*attribute.sparse_tensors]
        sparse += [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for each in sparse:
            yield from _sparse(each, name=made, what=what)


def called(node: Any) -> str:
    """``MatMul 'first'``; by its first output where it has no name."""
    return f"{node.op_type} {node.name or next(iter(node.output), '')!r:.200}"


def is_external(tensor: Any) -> bool:
    """Whether the data of ``tensor`` lie in another file."""
    return bool(tensor.data_location == 1)  # TensorProto.EXTERNAL
