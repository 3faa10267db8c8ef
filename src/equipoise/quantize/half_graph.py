"""Rewriting a float graph so that chosen nodes compute in half precision.

Every float tensor has up to two versions, float32 and half. The one its producer writes is real;
the other, if anybody reads it, is one Cast, shared by all who do. Constants are converted in the
file. Integers, shapes and subgraphs stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise import extras, onnxio
from equipoise.errors import IncompatibleError
from equipoise.quantize.half_evidence import HalfType
from equipoise.quantize.layers import read_array
from equipoise.quantize.weights import read_in_subgraphs

_INDIFFERENT: Final = frozenset({"Shape", "Size", "IsNaN", "IsInf", "Cast"})
"""Operators that read whichever version there is."""

_TYPED: Final = frozenset(
    {
        "Bernoulli", "BlackmanWindow", "CastLike", "EyeLike", "HammingWindow", "HannWindow",
        "MelWeightMatrix", "RandomNormal", "RandomNormalLike", "RandomUniform",
        "RandomUniformLike",
    }
)  # fmt: skip
"""Operators that take the type of their output from an attribute or from another tensor."""

_SKIP_NORMS: Final = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
"""Of their outputs, 1 and 2 are statistics in float32 always."""

MICROSOFT: Final = frozenset(
    {
        "Attention", "BiasGelu", "FastGelu", "FusedMatMul", "GatherBlockQuantized", "Gelu",
        "MatMulNBits", "MultiHeadAttention", "QuickGelu", *_SKIP_NORMS,
    }
)  # fmt: skip
"""ONNX Runtime's operators whose float inputs and outputs are all of one type."""

_SMALL_VALUES: Final = 4096
"""A node with a larger constant is worth its casts: they halve the constant's bytes."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Names of the tensors of a node that are half when the node is half."""

    inputs: frozenset[str]
    outputs: frozenset[str]


class FloatGraph:
    """The float32 tensors of a model, who makes and reads them, and which nodes can be half.

    Args:
        model: ``onnx.ModelProto`` with named nodes and without Constant nodes of floats.
        half: The half-precision type.
        keep_io: Inputs and outputs of the model stay float32.
    """

    def __init__(self, model: Any, half: HalfType, *, keep_io: bool) -> None:
        float32 = extras.require("onnx").TensorProto.FLOAT
        self.model, self.half = model, half
        tensors = onnxio.initializers(model)
        types = onnxio.value_types(model)
        self.constants = {name for name, t in tensors.items() if t.data_type == float32}
        self.floats = {n for n, kind in types.items() if kind == float32} | self.constants
        self._known = {name for name, kind in types.items() if kind}
        self._captured = read_in_subgraphs(model) & self.floats
        ends = {value.name for value in [*model.graph.input, *model.graph.output]}
        self._half_ends = set() if keep_io else ends & self.floats - self.constants
        self._outputs = {value.name for value in model.graph.output} & self.floats
        self._readers = onnxio.consumers(model)
        self._makers = {name: node for node in model.graph.node for name in node.output if name}
        self._inputs = [v.name for v in model.graph.input if v.name in self.floats]
        self.slots = {node.name: self._slots(node) for node in model.graph.node}

    def activations(self) -> tuple[str, ...]:
        """Float tensors that are no constants."""
        made = [*self._inputs, *self._makers]
        return tuple(name for name in made if name in self.floats - self.constants)

    def floats_of(self, node: Any) -> list[str]:
        """Float tensors that ``node`` reads or writes."""
        return [name for name in (*node.input, *node.output) if name in self.floats]

    def judged(self, node: Any) -> bool:
        """Whether it matters in which type ``node`` computes."""
        if node.op_type in _INDIFFERENT:
            return bool(self.floats.intersection(node.output))
        return bool(self.floats_of(node))

    def maker(self, name: str) -> Any:
        """The node that writes ``name``; None for inputs and constants."""
        return self._makers.get(name)

    def _slots(self, node: Any) -> Slots | None:
        """What of ``node`` can be half; None when nothing can."""
        if any(a.HasField("g") or a.graphs for a in node.attribute) or node.op_type in _TYPED:
            return None
        if any(name and name not in self._known for name in node.output):
            return None
        if node.domain == "com.microsoft":
            takes, gives = self._vendor(node)
        else:
            takes, gives = self._schema(node)
        slots = Slots(
            inputs=self._some(node.input, takes) if node.op_type not in _INDIFFERENT else _NONE,
            outputs=self._some(node.output, gives),
        )
        return slots if slots.inputs or slots.outputs else None

    def _some(self, names: Iterable[str], allowed: Any) -> frozenset[str]:
        return frozenset(n for i, n in enumerate(names) if n in self.floats and allowed(i))

    def _vendor(self, node: Any) -> tuple[Any, Any]:
        known = node.op_type in MICROSOFT
        return (lambda _: known), (
            lambda i: known and not (node.op_type in _SKIP_NORMS and i in {1, 2})
        )

    def _schema(self, node: Any) -> tuple[Any, Any]:
        """Whether the operator's standard lets input, and output, number ``i`` be half."""
        onnx = extras.require("onnx")
        try:
            schema = onnx.defs.get_schema(node.op_type, onnxio.opset_of(self.model), node.domain)
        except onnx.defs.SchemaError:
            return (lambda _: False,) * 2
        wanted = f"tensor({self.half.name})"
        open_types = {
            c.type_param_str for c in schema.type_constraints if wanted in c.allowed_type_strs
        }

        def side(parameters: Any) -> Any:
            # The last parameter may be variadic, as that of Concat is.
            return lambda i: parameters[min(i, len(parameters) - 1)].type_str in open_types

        return side(schema.inputs), side(schema.outputs)

    def settled(self, half_nodes: frozenset[str]) -> frozenset[str]:
        """``half_nodes`` without those whose casts would cost more than they are worth.

        Light nodes alone, one by one and by islands: where leaving them in float needs fewer casts.
        """
        light = {node.name for node in self.model.graph.node if not self._heavy(node)}
        groups = [*self._islands(half_nodes), *({name} for name in sorted(half_nodes))]
        changed = True
        while changed:
            changed = False
            for group in groups:
                if not group <= half_nodes & light:
                    continue
                near = self._near(group)
                fewer = self._casts(near, half_nodes - group)
                if fewer < self._casts(near, half_nodes):
                    half_nodes, changed = half_nodes - group, True
        return half_nodes

    def _heavy(self, node: Any) -> bool:
        tensors = onnxio.initializers(self.model)
        mine = self.constants.intersection(node.input)
        big = any(math.prod(tensors[name].dims) > _SMALL_VALUES for name in mine)
        return big or node.op_type in {"MatMul", "Gemm", "Conv", "ConvTranspose", *MICROSOFT}

    def _near(self, group: Iterable[str]) -> set[str]:
        members = set(group)
        nodes = [node for node in self.model.graph.node if node.name in members]
        return {name for node in nodes for name in self.floats_of(node)}

    def _islands(self, half_nodes: frozenset[str]) -> list[frozenset[str]]:
        """Half nodes that are joined by the tensors they pass on."""
        island = {name: {name} for name in half_nodes}
        for tensor, readers in self._readers.items():
            maker = self._makers.get(tensor)
            names = [n.name for n in [*readers, *([maker] if maker else [])]]
            joined = [name for name in names if name in half_nodes]
            if tensor not in self.floats - self.constants or not joined:
                continue
            merged = set().union(*(island[name] for name in joined))
            island.update(dict.fromkeys(merged, merged))
        return list({id(group): frozenset(group) for group in island.values()}.values())

    def _casts(self, tensors: Iterable[str], half_nodes: frozenset[str]) -> int:
        return sum(len(self._missing(name, half_nodes)) for name in tensors)

    def _missing(self, tensor: str, half_nodes: frozenset[str]) -> set[bool]:
        """Versions (half or not) of ``tensor`` that are read but not made."""
        if tensor in self.constants:
            return set()
        return self._needed(tensor, half_nodes) - {self._real(tensor, half_nodes)}

    def _needed(self, tensor: str, half_nodes: frozenset[str]) -> set[bool]:
        needed = {self._read_as(node, tensor, half_nodes) for node in self._readers.get(tensor, [])}
        needed |= {False} if tensor in self._captured else set()
        return needed | ({tensor in self._half_ends} if tensor in self._outputs else set())

    def _read_as(self, node: Any, tensor: str, half_nodes: frozenset[str]) -> bool:
        if node.op_type in _INDIFFERENT:
            return self._real(tensor, half_nodes)
        slots = self.slots[node.name]
        return node.name in half_nodes and slots is not None and tensor in slots.inputs

    def _real(self, tensor: str, half_nodes: frozenset[str]) -> bool:
        """Whether the version that is written, not cast, is half."""
        maker = self._makers.get(tensor)
        if maker is None:
            return tensor in self._half_ends
        slots = self.slots[maker.name]
        return maker.name in half_nodes and slots is not None and tensor in slots.outputs

    def _name(self, tensor: str, *, half: bool) -> str:
        if half == (tensor in self._half_ends):
            return tensor
        return f"{tensor}.{self.half.name if half else 'float32'}"

    def rewrite(self, half_nodes: frozenset[str]) -> int:
        """Make ``half_nodes`` half, in place.

        Returns:
            The number of casts added.

        Raises:
            IncompatibleError: A subgraph reads an input or output that was to become half.
        """
        if self._captured & self._half_ends:
            names = ", ".join(sorted(self._captured & self._half_ends))
            raise IncompatibleError(
                f"a subgraph reads {names}, which cannot become {self.half.name} for it",
                hint="Keep the inputs and outputs of the model in float32.",
            )
        graph = self.model.graph
        nodes = [cast for name in self._inputs for cast in self._casts_of(name, half_nodes)]
        for node in list(graph.node):
            casts = [c for name in node.output for c in self._casts_of(name, half_nodes)]
            nodes += [self._renamed(node, half_nodes), *casts]
        self._convert_constants(half_nodes)
        added = len(nodes) - len(graph.node)
        del graph.node[:]
        graph.node.extend(nodes)
        self._declare()
        return added

    def _casts_of(self, tensor: str, half_nodes: frozenset[str]) -> Iterator[Any]:
        onnx = extras.require("onnx")
        if tensor not in self.floats:
            return
        real = self._real(tensor, half_nodes)
        for half in sorted(self._missing(tensor, half_nodes)):
            name = self._name(tensor, half=half)
            element = self.half.element if half else onnx.TensorProto.FLOAT
            source = [self._name(tensor, half=real)]
            yield onnx.helper.make_node("Cast", source, [name], name=f"{name}.cast", to=element)

    def _renamed(self, node: Any, half_nodes: frozenset[str]) -> Any:
        """A copy of ``node`` that reads and writes the right versions."""
        new = type(node)()
        new.CopyFrom(node)
        for i, name in enumerate(node.input):
            if name in self.floats:
                new.input[i] = self._name(name, half=self._read_as(node, name, half_nodes))
        for i, name in enumerate(node.output):
            if name in self.floats:
                new.output[i] = self._name(name, half=self._real(name, half_nodes))
        if node.name in half_nodes:
            _retype(new, self.half)
        return new

    def _convert_constants(self, half_nodes: frozenset[str]) -> None:
        onnx = extras.require("onnx")
        tensors = onnxio.initializers(self.model)
        for name in sorted(self.constants):
            needed = self._needed(name, half_nodes)
            if True in needed:
                array = read_array(self.model, name).astype(self.half.dtype)
                half = onnx.numpy_helper.from_array(array, self._name(name, half=True))
                self.model.graph.initializer.append(half)
            if needed == {True}:
                self.model.graph.initializer.remove(tensors[name])

    def _declare(self) -> None:
        """Types of the model's ends; what was known of intermediate floats holds no more."""
        float32 = extras.require("onnx").TensorProto.FLOAT
        graph = self.model.graph
        for value in [*graph.input, *graph.output]:
            if value.name in self._half_ends:
                value.type.tensor_type.elem_type = self.half.element
        kept = [v for v in graph.value_info if v.type.tensor_type.elem_type != float32]
        del graph.value_info[:]
        graph.value_info.extend(kept)


_NONE: Final[frozenset[str]] = frozenset()


def _retype(node: Any, half: HalfType) -> None:
    """Let a node that takes its type from an attribute write ``half``."""
    onnx = extras.require("onnx")
    if node.op_type == "Cast":
        next(a for a in node.attribute if a.name == "to").i = half.element
    if node.op_type == "ConstantOfShape":
        given = [onnx.numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"]
        value = (given[0] if given else np.zeros(1, dtype=np.float32)).astype(half.dtype)
        del node.attribute[:]
        tensor = onnx.numpy_helper.from_array(value)
        node.attribute.append(onnx.helper.make_attribute("value", tensor))


def emulated(model: Any, half: HalfType) -> Any:
    """A float32 model that rounds wherever ``model`` computes in half precision.

    For runtimes without kernels for the type: ONNX Runtime has none for bfloat16 on CPUs. Sums are
    rounded once, at their end, as hardware with float32 accumulators does. Run it without
    optimisation, which may take a pair of casts for nothing.

    Args:
        model: What :meth:`FloatGraph.rewrite` made.
        half: Its half-precision type.
    """
    onnx = extras.require("onnx")
    copy = onnxio.copied(model)
    float32 = onnx.TensorProto.FLOAT
    for tensor in [t for t in copy.graph.initializer if t.data_type == half.element]:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in [*copy.graph.input, *copy.graph.output]:
        if value.type.tensor_type.elem_type == half.element:
            value.type.tensor_type.elem_type = float32
    nodes = [new for node in model.graph.node for new in _emulated(node, half)]
    del copy.graph.node[:], copy.graph.value_info[:]
    copy.graph.node.extend(nodes)
    return copy


def _emulated(node: Any, half: HalfType) -> Iterator[Any]:
    onnx = extras.require("onnx")
    make, float32 = onnx.helper.make_node, onnx.TensorProto.FLOAT
    rounded = [name for name in node.output if name.endswith(f".{half.name}")]
    new = type(node)()
    new.CopyFrom(node)
    for i, name in enumerate(node.output):
        if name in rounded:
            new.output[i] = f"{name}.exact"
    for attribute in new.attribute:
        if attribute.name == "to" and attribute.i == half.element:
            attribute.i = float32
        if attribute.name == "value" and attribute.t.data_type == half.element:
            values = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(values))
    yield new
    for name in rounded:
        yield make("Cast", [f"{name}.exact"], [f"{name}.bits"], to=half.element)
        yield make("Cast", [f"{name}.bits"], [name], to=float32)
