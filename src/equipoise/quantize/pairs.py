"""The Q/DQ pairs of a quantised graph, and the same graph with some of them taken out.

A QDQ graph is a float graph in which tensors pass through QuantizeLinear and DequantizeLinear and
weights are stored as integers. Whatever quantised it, one node can be put back into float, or all
but one; that is how damage is told apart node by node.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise import extras, onnxio
from equipoise.spec import Array

QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
PAIR: Final = frozenset({QUANTIZE, DEQUANTIZE})
ACTIVATIONS: Final = frozenset({"Relu", "Clip"})
"""What a QuantizeLinear does anyway when its grid ends within their bounds."""

_FLOAT_SUFFIX: Final = ".in_float"


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """Where the tensors of a graph come from and go to.

    Attributes:
        constants: Name -> ``TensorProto``.
        producers: Tensor -> node that writes it.
        readers: Tensor -> nodes that read it.
    """

    constants: dict[str, Any]
    producers: dict[str, Any]
    readers: dict[str, list[Any]]

    def dequantizer(self, name: str) -> Any:
        """The DequantizeLinear node that writes ``name``, or None."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == DEQUANTIZE else None

    def before(self, name: str) -> str:
        """The float tensor that the pairs before ``name`` round; ``name`` itself without any."""
        dequantizer = self.dequantizer(name)
        quantizer = self.producers.get(dequantizer.input[0]) if dequantizer is not None else None
        if quantizer is None or quantizer.op_type != QUANTIZE:
            return name
        return self.before(quantizer.input[0])

    def makers(self, name: str) -> frozenset[str]:
        """Names of the nodes that give ``name``: a Relu or Clip and the node before it are one."""
        node = self.producers.get(name)
        if node is None:
            return frozenset()
        if not self.follows(node):
            return frozenset({str(node.name)})
        return self.makers(node.input[0]) | {str(node.name)}

    def follows(self, node: Any) -> bool:
        """Whether ``node`` is a Relu or Clip that only finishes what the node before it began."""
        if node.op_type not in ACTIVATIONS or len(self.readers.get(node.input[0], [])) != 1:
            return False
        before = self.producers.get(node.input[0])
        return before is not None and before.op_type not in PAIR

    def weight(self, name: str) -> Any:
        """The DequantizeLinear node that restores ``name`` from a constant, or None."""
        dequantizer = self.dequantizer(name)
        stored = dequantizer is not None and dequantizer.input[0] in self.constants
        return dequantizer if stored else None


def wiring(model: Any) -> Wiring:
    """The wiring of the main graph of an ``onnx.ModelProto``."""
    return Wiring(
        constants=onnxio.initializers(model),
        producers={name: node for node in model.graph.node for name in node.output if name},
        readers=onnxio.consumers(model),
    )


def quantized_nodes(model: Any) -> tuple[Any, ...]:
    """The nodes that read or give quantised tensors, in graph order.

    Q and DQ are none, nor is a Relu or Clip that belongs to the node before it.
    """
    wires = wiring(model)

    def touches(node: Any) -> bool:
        reads = any(wires.dequantizer(name) is not None for name in node.input)
        return reads or any(name in rounded for name in (node.name, *node.output))

    rounded = {
        name
        for node in model.graph.node
        if node.op_type == QUANTIZE
        for name in (node.input[0], *wires.makers(node.input[0]))
    }
    nodes = (n for n in model.graph.node if n.op_type not in PAIR and not wires.follows(n))
    return tuple(node for node in nodes if touches(node))


def without(quantized: Any, nodes: Collection[str]) -> Any:
    """``quantized`` with ``nodes`` in float: no rounding of what they read, hold or give.

    Args:
        quantized: ``onnx.ModelProto`` with Q/DQ pairs and named nodes; it is not changed. With
            :func:`with_originals`, weights come back as they were before rounding.
        nodes: Names of nodes.

    Returns:
        A new model with the inputs and outputs of ``quantized``.
    """
    chosen = frozenset(nodes)
    return _rewritten(
        quantized,
        rounds=chosen.isdisjoint,
        holds=lambda node: node not in chosen,
    )


def only(quantized: Any, nodes: Collection[str]) -> Any:
    """``quantized`` with everything but ``nodes`` in float.

    A tensor is rounded when one of ``nodes`` gives or reads it. So ``only`` with all quantised
    nodes but some is what a quantiser makes when it is told to exclude those some.

    Args:
        quantized: As in :func:`without`.
        nodes: Names of nodes that stay quantised.
    """
    chosen = frozenset(nodes)
    return _rewritten(
        quantized,
        rounds=lambda ends: not chosen.isdisjoint(ends),
        holds=lambda node: node in chosen,
    )


def _rewritten(
    quantized: Any,
    *,
    rounds: Callable[[frozenset[str]], bool],
    holds: Callable[[str], bool],
) -> Any:
    """Bypass the pairs between makers and readers that do not round, and restore weights."""
    model = onnxio.copied(quantized)
    wires = wiring(model)
    for node in [n for n in model.graph.node if n.op_type not in PAIR]:
        for index, name in enumerate(node.input):
            source = wires.before(name)
            if source != name and not rounds(wires.makers(source) | {str(node.name)}):
                node.input[index] = source
            elif not holds(node.name) and wires.weight(name) is not None:
                node.input[index] = restore_weight(model, wires.weight(name))
    _bypass_outputs(model, wires, rounds=rounds)
    _drop_unused(model)
    return model


def _bypass_outputs(model: Any, wires: Wiring, *, rounds: Callable[[frozenset[str]], bool]) -> None:
    """An output of the graph keeps its name: its DequantizeLinear becomes an Identity."""
    for value in model.graph.output:
        source = wires.before(value.name)
        if source != value.name and not rounds(wires.makers(source)):
            dequantizer = wires.producers[value.name]
            dequantizer.CopyFrom(
                extras.require("onnx").helper.make_node(
                    "Identity", [source], [value.name], name=dequantizer.name
                )
            )


def with_originals(quantized: Any, original: Any) -> Any:
    """``quantized`` with what quantisation took away: it gives the same numbers as before.

    Beside each stored weight stands its float form, from ``original`` where that has the same
    weight under the same node. Each Relu and Clip that a QuantizeLinear made superfluous is back.

    Args:
        quantized: ``onnx.ModelProto`` with Q/DQ pairs and named nodes; it is not changed.
        original: The float model.
    """
    model, wires = onnxio.copied(quantized), wiring(original)
    _restore_activations(model, original)
    inputs = {node.name: node.input for node in original.graph.node}
    found = wiring(model)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            dequantizer = found.weight(name) if node.op_type not in PAIR else None
            if dequantizer is not None:
                before = inputs.get(node.name, ())
                tensor = wires.constants.get(before[index]) if index < len(before) else None
                restore_weight(model, dequantizer, original=tensor)
    return model


def _restore_activations(model: Any, original: Any) -> None:
    """Put back each Relu and Clip whose output another node gives in ``model``."""
    before, wires = wiring(original), wiring(model)
    for activation in original.graph.node:
        maker = wires.producers.get(activation.output[0])
        if activation.op_type in ACTIVATIONS and maker is not None:
            constants = [before.constants.get(name) for name in activation.input[1:] if name]
            if maker.op_type != activation.op_type and None not in constants:
                _insert_activation(model, activation, maker=maker, constants=constants)


def _insert_activation(
    model: Any, activation: Any, *, maker: Any, constants: Iterable[Any]
) -> None:
    present = onnxio.initializers(model)
    model.graph.initializer.extend(t for t in constants if t.name not in present)
    index = list(maker.output).index(activation.output[0])
    position = list(model.graph.node).index(maker) + 1
    maker.output[index] = activation.input[0]
    model.graph.node.insert(position, activation)


def restore_weight(model: Any, dequantizer: Any, *, original: Any = None) -> str:
    """Add a stored weight to ``model`` as a float constant and return its name.

    Args:
        model: ``onnx.ModelProto``, changed in place.
        dequantizer: The DequantizeLinear node that restores the weight.
        original: ``TensorProto`` of the float model; taken when it is this weight before rounding.
    """
    name = f"{dequantizer.output[0]}{_FLOAT_SUFFIX}"
    constants = onnxio.initializers(model)
    if name not in constants:
        numpy_helper = extras.require("onnx").numpy_helper
        values = _original_values(dequantizer, constants, original=original)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _original_values(dequantizer: Any, constants: dict[str, Any], *, original: Any) -> Array:
    """The weight before rounding if ``original`` is that, else after.

    A weight that a pass has scaled or a rounding algorithm has moved further than one step no
    longer fits its neighbours in its first form.
    """
    stored, step, zero = dequantize_parts(dequantizer, constants)
    rounded: Array = (stored.astype(np.float32) - zero) * step
    if original is None or tuple(original.dims) != rounded.shape:
        return rounded
    values: Array = extras.require("onnx").numpy_helper.to_array(original)
    inside = (stored > stored.min()) & (stored < stored.max())
    near = np.abs(values - rounded) <= step * np.float32(1.001)
    return values if bool((near | ~inside).all()) else rounded


def dequantize_parts(dequantizer: Any, constants: dict[str, Any]) -> tuple[Array, Array, Array]:
    """Stored integers, scale and zero point of a weight; the last two broadcast to its shape."""
    to_array = extras.require("onnx").numpy_helper.to_array
    stored: Array = to_array(constants[dequantizer.input[0]])
    parts = [to_array(constants[name]).astype(np.float32) for name in dequantizer.input[1:] if name]
    scale, zero = parts if len(parts) == 2 else (parts[0], np.zeros_like(parts[0]))
    spread = [_spread(part, stored.shape, dequantizer=dequantizer) for part in (scale, zero)]
    return stored, spread[0], spread[1]


def _spread(part: Array, shape: tuple[int, ...], *, dequantizer: Any) -> Array:
    """A parameter per tensor, per channel or per block, in a form that broadcasts to ``shape``."""
    attributes = {a.name: a.i for a in dequantizer.attribute}
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    if part.size == 1:
        return part.reshape(())
    if block:
        repeated: Array = np.repeat(part, block, axis=axis)
        return np.take(repeated, np.arange(shape[axis]), axis=axis)
    along = [1] * len(shape)
    along[axis] = -1
    return part.reshape(along)


def _drop_unused(model: Any) -> None:
    """Remove Q, DQ and constants that nobody reads any more."""
    used = {value.name for value in model.graph.output}
    for node in reversed(list(model.graph.node)):
        if node.op_type in PAIR and not used.intersection(node.output):
            model.graph.node.remove(node)
        else:
            used.update(_reads(node))
    for tensor in [t for t in model.graph.initializer if t.name not in used]:
        model.graph.initializer.remove(tensor)
    for value in [v for v in model.graph.value_info if v.name not in used]:
        model.graph.value_info.remove(value)


def _reads(node: Any) -> Iterator[str]:
    """Tensors that ``node`` and the graphs inside it read or give out."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from _reads(inner)
