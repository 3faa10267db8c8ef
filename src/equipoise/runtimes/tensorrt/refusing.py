"""Every node that the parser would refuse, not only those that it comes to.

The parser names all operators that it does not know, but stops at the first node whose types it
does not take. So that node is cut out, with all that are like it, and the rest is parsed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, onnxio
from equipoise.runtimes.tensorrt.flavor import Flavor
from equipoise.runtimes.tensorrt.parsing import Refusal, attempt

_ROUNDS: Final = 64
_PAIR: Final = ("QuantizeLinear", "DequantizeLinear")


def all_refusals(package: Any, path: Path, *, flavor: Flavor) -> tuple[Refusal, ...]:
    """Parse ``path`` over and over, each time without what was refused.

    Raises:
        SourceError: It is no ONNX model.
    """
    model = onnxio.load_model(path)
    found: dict[str, Refusal] = {}
    for _ in range(_ROUNDS):
        with fs.scratch_directory() as folder:
            onnxio.save_model(onnxio.copied(model), folder / path.name)
            refusals = attempt(package, folder / path.name, flavor=flavor)[1]
        new = {key: refusal for key, refusal in _with_likes(model, refusals) if key not in found}
        found |= new
        if not new or not _cut(model, set(new)):
            break
    return tuple(found.values())


def _with_likes(model: Any, refusals: Iterable[Refusal]) -> Iterator[tuple[str, Refusal]]:
    """First output of a node -> its refusal; nodes that are like a refused one have its reason."""
    types = onnxio.value_types(model)
    constants = onnxio.initializers(model)
    kinds = [_kind(node, types, constants) for node in model.graph.node]
    for refusal in refusals:
        if not 0 <= refusal.index < len(kinds):
            yield "", refusal
            continue
        for node, kind in zip(model.graph.node, kinds, strict=True):
            same = node is model.graph.node[refusal.index]
            if same or (kind is not None and kind == kinds[refusal.index]):
                yield node.output[0], _named(refusal, node)


def _named(refusal: Refusal, node: Any) -> Refusal:
    """What was said of one node, said of ``node``; outputs name what has no name."""
    return replace(refusal, node=node.name or node.output[0])


def _kind(node: Any, types: dict[str, int], constants: dict[str, Any]) -> object:
    """What the parser looks at in a Q or DQ node: its integer type, and whether zero is 0."""
    if node.op_type not in _PAIR:
        return None
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    numpy_helper: Any = extras.require("onnx.numpy_helper")
    shifted = zero is not None and bool(np.any(numpy_helper.to_array(zero)))
    integer = node.output[0] if node.op_type == _PAIR[0] else node.input[0]
    constant = constants.get(integer)
    kind = constant.data_type if constant is not None else types.get(integer, 0)
    return node.op_type, kind, shifted, constant is not None


def _cut(model: Any, outputs: set[str]) -> bool:
    """Take the nodes with these first outputs out of ``model``; whether that was possible."""
    types = _inferred(model)
    refused = [node for node in model.graph.node if node.output and node.output[0] in outputs]
    done = [_cut_node(model, node, types) for node in refused]
    return bool(done) and all(done)


def _inferred(model: Any) -> dict[str, Any]:
    """Name -> ``TypeProto`` of every value that is known."""
    shape_inference: Any = extras.require("onnx.shape_inference")
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value.type for value in values}


def _cut_node(model: Any, node: Any, types: dict[str, Any]) -> bool:
    if node not in model.graph.node:
        return True  # it went with its other half
    if node.op_type in _PAIR and _bypassed(model, node):
        return True
    model.graph.node.remove(node)
    given = [_given(model, name, types.get(name)) for name in node.output if name]
    return all(given)


def _bypassed(model: Any, node: Any) -> bool:
    """Take a Q and every DQ that reads it out; whether ``node`` is of such a pair."""
    makers = {name: other for other in model.graph.node for name in other.output}
    first = node if node.op_type == _PAIR[0] else makers.get(node.input[0])
    if first is None or first.op_type != _PAIR[0]:
        return False
    readers = [n for n in model.graph.node if first.output[0] in n.input]
    if any(reader.op_type != _PAIR[1] for reader in readers):
        return False
    for reader in readers:
        _replace(model, old=reader.output[0], new=first.input[0])
        model.graph.node.remove(reader)
    model.graph.node.remove(first)
    return True


def _replace(model: Any, *, old: str, new: str) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
    if any(value.name == old for value in model.graph.output):
        helper: Any = extras.require("onnx.helper")
        model.graph.node.append(helper.make_node("Identity", [new], [old]))


def _given(model: Any, name: str, kind: Any) -> bool:
    """Give the value ``name`` from outside: zeros where its sizes are fixed, else an input."""
    if kind is None or not kind.tensor_type.elem_type:
        return False
    if any(value.name == name for value in model.graph.output):
        kept = [value for value in model.graph.output if value.name != name]
        del model.graph.output[:]
        model.graph.output.extend(kept)
    dims = kind.tensor_type.shape.dim
    if kind.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
        model.graph.initializer.append(_zeros(name, kind))
    else:
        helper: Any = extras.require("onnx.helper")
        model.graph.input.append(helper.make_value_info(name, kind))
    return True


def _zeros(name: str, kind: Any) -> Any:
    onnx: Any = extras.require("onnx")
    shape = [dim.dim_value for dim in kind.tensor_type.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
    return onnx.numpy_helper.from_array(np.zeros(shape, dtype=dtype), name)
