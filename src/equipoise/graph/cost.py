"""What an ONNX model costs: parameters, multiply-accumulates, weight and activation memory.

Shapes come from a real run with every intermediate value as an output, not from symbolic
inference, which fails on half of the graphs that people have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, onnxio
from equipoise.errors import UsageError
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import TensorSpec, ones

_PARAMETER_TYPES: Final = frozenset({"float32", "float16", "float64", "bfloat16", "int8", "uint8"})


@dataclass(frozen=True, kw_only=True)
class TensorCost:
    """Size of one tensor in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class NodeCost:
    """What one node costs.

    Attributes:
        name: Its name, or its first output's where it has none.
        operator: Its type.
        dtype: Type of what it reads first; of the integers where that comes from a
            DequantizeLinear.
        multiply_accumulates: Of one inference.
        read_bytes: Bytes of its inputs, weights included.
        written_bytes: Bytes of its outputs.
    """

    name: str
    operator: str
    dtype: str
    multiply_accumulates: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What a model costs for one inference.

    Attributes:
        inputs: Input specs.
        outputs: Output specs.
        opset: Standard operator set.
        ir_version: ONNX IR version.
        operators: Operator type -> count, subgraphs included.
        parameters: Number of values in weights.
        multiply_accumulates: Multiply-accumulates of one inference at ``sizes``.
        uncounted: Operators whose multiply-accumulates are not known here: vendors' operators,
            and everything in subgraphs.
        weight_bytes: Bytes of all initializers.
        file_bytes: Bytes on disk, external data included.
        peak_activation_bytes: Most bytes of activations alive at once, in graph order, each freed
            after its last use, nothing computed in place.
        sizes: Sizes of the dynamic dimensions that were used.
        largest_weights: The largest initializers.
        largest_activations: The largest activations.
        nodes: Nodes of the main graph, in its order.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    ir_version: int
    operators: dict[str, int]
    parameters: int
    multiply_accumulates: int
    uncounted: tuple[str, ...]
    weight_bytes: int
    file_bytes: int
    peak_activation_bytes: int
    sizes: dict[str, int]
    largest_weights: tuple[TensorCost, ...]
    largest_activations: tuple[TensorCost, ...]
    nodes: tuple[NodeCost, ...]


def analyze(model: Path, *, sizes: Mapping[str, int] | None = None, top: int = 10) -> ModelCost:
    """Count what ``model`` costs.

    Args:
        model: ONNX file.
        sizes: Dynamic dimension -> size; 16 for a sequence and 1 for any other when not given.
        top: How many of the largest tensors to name.

    Raises:
        SourceError: It is no ONNX model, or the runtime cannot run it.
        UsageError: ``sizes`` names no dimension of its inputs.
    """
    proto = onnxio.load_model(model)
    inputs, outputs = onnxio.graph_specs(proto)
    used = _sizes(inputs, sizes or {})
    activations = _activations(proto, inputs, used)
    weights = [_weight_cost(tensor) for tensor in proto.graph.initializer]
    shapes = {t.name: t.shape for t in [*weights, *activations]}
    nodes = list(proto.graph.node)
    return ModelCost(
        inputs=inputs,
        outputs=outputs,
        opset=onnxio.opset_of(proto),
        ir_version=proto.ir_version,
        operators=dict(_all_operators(nodes).most_common()),
        parameters=sum(math.prod(t.shape) for t in weights if _is_parameter(t)),
        multiply_accumulates=sum(multiply_accumulates(node, shapes) for node in nodes),
        uncounted=_uncounted(nodes),
        weight_bytes=sum(t.size_bytes for t in weights),
        file_bytes=onnxio.file_bytes(model),
        peak_activation_bytes=peak_bytes(proto, {t.name: t.size_bytes for t in activations}),
        sizes=used,
        largest_weights=_largest(weights, top),
        largest_activations=_largest(activations, top),
        nodes=_node_costs(nodes, {t.name: t for t in [*weights, *activations]}),
    )


def _node_costs(nodes: list[Any], tensors: Mapping[str, TensorCost]) -> tuple[NodeCost, ...]:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    stored = {n.output[0]: n.input[0] for n in nodes if n.op_type == "DequantizeLinear"}

    def read(name: str) -> TensorCost | None:
        """A tensor as it lies in memory: integers where they are dequantised on the way."""
        return tensors.get(stored.get(name, name))

    def cost(node: Any) -> NodeCost:
        inputs = [tensor for name in node.input if (tensor := read(name))]
        outputs = [tensors[name] for name in node.output if name in tensors]
        return NodeCost(
            name=str(node.name or node.output[0]),
            operator=str(node.op_type),
            dtype=inputs[0].dtype if inputs else "",
            multiply_accumulates=multiply_accumulates(node, shapes),
            read_bytes=sum(tensor.size_bytes for tensor in inputs),
            written_bytes=sum(tensor.size_bytes for tensor in outputs),
        )

    return tuple(map(cost, nodes))


def _sizes(inputs: tuple[TensorSpec, ...], given: Mapping[str, int]) -> dict[str, int]:
    arrays = ones(inputs, sizes=given)
    used = {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, arrays[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
    unknown = sorted(set(given) - set(used))
    if unknown:
        raise UsageError(
            f"no input has a dimension {unknown[0]!r}; there are {', '.join(used) or 'none'}"
        )
    return used


def _is_parameter(tensor: TensorCost) -> bool:
    return tensor.dtype in _PARAMETER_TYPES


def _largest(tensors: list[TensorCost], top: int) -> tuple[TensorCost, ...]:
    return tuple(sorted(tensors, key=lambda t: -t.size_bytes)[:top])


def _weight_cost(tensor: Any) -> TensorCost:
    array = extras.require("onnx").numpy_helper.to_array(tensor)
    return TensorCost(
        name=tensor.name, dtype=str(array.dtype), shape=array.shape, size_bytes=array.nbytes
    )


def _activations(
    proto: Any, inputs: tuple[TensorSpec, ...], sizes: Mapping[str, int]
) -> list[TensorCost]:
    """Inputs and all values that nodes of the main graph produce, as a run shows them."""
    feeds = ones(inputs, sizes=sizes)
    with fs.scratch_directory() as folder:
        path = folder / "augmented.onnx"
        onnxio.save_model(_with_all_outputs(proto), path)
        plain = SessionSettings(optimize="none")
        with session_opener("onnxruntime")(path, settings=plain) as session:
            values = {**feeds, **session.run(feeds)}
    return [
        TensorCost(name=name, dtype=str(a.dtype), shape=a.shape, size_bytes=a.nbytes)
        for name, a in values.items()
        if isinstance(a, np.ndarray) and a.dtype != object
    ]


def _with_all_outputs(proto: Any) -> Any:
    onnx = extras.require("onnx")
    augmented = onnx.ModelProto()
    augmented.CopyFrom(proto)
    present = {value.name for value in proto.graph.output}
    produced = [name for node in proto.graph.node for name in node.output if name]
    augmented.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in produced if name not in present
    )
    return augmented


def _all_operators(nodes: list[Any]) -> Counter[str]:
    """Operator counts, those of subgraphs included."""
    counts: Counter[str] = Counter()
    for node in nodes:
        counts[node.op_type] += 1
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                counts += _all_operators(list(graph.node))
    return counts


def _uncounted(nodes: list[Any]) -> tuple[str, ...]:
    names = set()
    for node in nodes:
        if any(attribute.g.node for attribute in node.attribute):
            names.add(f"{node.op_type} (its subgraphs)")
        elif node.domain not in {"", "ai.onnx"} and node.op_type not in _FORMULAS:
            names.add(f"{node.domain}.{node.op_type}")
    return tuple(sorted(names))


def peak_bytes(proto: Any, size_of: Mapping[str, int]) -> int:
    """Most bytes of activations alive at once.

    A value lives from the node that makes it to the last node that reads it; graph inputs from the
    start, graph outputs to the end.
    """
    nodes = list(proto.graph.node)
    last_use = {name: index for index, node in enumerate(nodes) for name in _reads(node)}
    kept = {value.name for value in proto.graph.output}
    produced = {name for node in nodes for name in node.output}
    alive = {name: size for name, size in size_of.items() if name not in produced}
    peak = sum(alive.values())
    for index, node in enumerate(nodes):
        alive |= {name: size_of[name] for name in node.output if name in size_of}
        peak = max(peak, sum(alive.values()))
        for name in [name for name in alive if last_use.get(name, -1) <= index]:
            if name not in kept:
                del alive[name]
    return peak


def _reads(node: Any) -> list[str]:
    """Names that a node reads, those of its subgraphs included."""
    inner = [
        name
        for attribute in node.attribute
        for graph in [attribute.g, *attribute.graphs]
        for child in graph.node
        for name in _reads(child)
    ]
    return [*node.input, *inner]


Shapes = Mapping[str, tuple[int, ...]]


def multiply_accumulates(node: Any, shapes: Shapes) -> int:
    """Multiply-accumulates of one node; 0 for operators that make no products of tensors."""
    formula = _FORMULAS.get(node.op_type)
    output = shapes.get(node.output[0], ())
    return formula(node, shapes, output) if formula and output else 0


def _convolution(weight: int) -> Callable[[Any, Shapes, tuple[int, ...]], int]:
    """Each output value takes one product per input channel of its group and kernel position."""

    def count(node: Any, shapes: Shapes, output: tuple[int, ...]) -> int:
        return math.prod(output) * math.prod(shapes[node.input[weight]][1:])

    return count


def _transposed_convolution(node: Any, shapes: Shapes, output: tuple[int, ...]) -> int:  # noqa: ARG001
    """Each input value meets each kernel position of each output channel of its group."""
    return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _product(node: Any, shapes: Shapes, output: tuple[int, ...]) -> int:
    """``[..., m, k] x [..., k, n]``: k products for each output value."""
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    left = shapes[node.input[0]]
    return math.prod(output) * (left[-2] if transposed and len(left) > 1 else left[-1])


def _attention(node: Any, shapes: Shapes, output: tuple[int, ...]) -> int:
    """Projections of com.microsoft.Attention, its scores, and their product with the values."""
    batch, sequence, hidden = output
    projected = shapes[node.input[1]]
    return batch * sequence * projected[0] * projected[1] + 2 * batch * sequence**2 * hidden


def _multi_head_attention(node: Any, shapes: Shapes, output: tuple[int, ...]) -> int:
    """Scores of com.microsoft.MultiHeadAttention, and their product with the values."""
    batch, sequence, hidden = output
    keys = shapes[node.input[1]]
    return 2 * batch * sequence * hidden * (keys[1] if len(keys) == 3 else keys[2])


_FORMULAS: Final[dict[str, Callable[[Any, Shapes, tuple[int, ...]], int]]] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "FusedConv": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed_convolution,
    "Gemm": _product,
    "QGemm": _product,
    "FusedGemm": _product,
    "MatMul": _product,
    "FusedMatMul": _product,
    "MatMulInteger": _product,
    "MatMulIntegerToFloat": _product,
    "DynamicQuantizeMatMul": _product,
    "QLinearMatMul": _product,
    "MatMulNBits": _product,
    "Attention": _attention,
    "QAttention": _attention,
    "MultiHeadAttention": _multi_head_attention,
}
