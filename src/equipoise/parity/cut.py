"""The pieces of a candidate between the values that it shares with its reference.

A shared value has the name of a value of the reference, or stands for one: the half-precision form
of it, or what comes back from its grid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from equipoise import extras, onnxio
from equipoise.errors import InputError
from equipoise.spec import Array

Arithmetic = Literal["float32", "float16", "bfloat16", "int8", "integers"]

FLOATS: Final = {1: "float32", 10: "float16", 11: "float32", 16: "bfloat16"}
"""Element types of ``TensorProto`` that round; float64 is taken for float32."""

SMALL_INTEGERS: Final = frozenset({2, 3, 21, 22})
"""uint8, int8, uint4, int4."""

NOISE: Final[Mapping[str, float]] = {
    "float32": 2.0**-23,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""What an operation rounds away of 1: half of the distance to the next number, and in float32,
which sums long rows in itself, all of it."""

_SUFFIXES: Final = (".float16", ".bfloat16")
_INTEGER_MARKS: Final = ("DynamicQuantize", "Integer", "NBits", "QLinear", "QGemm", "QAttention")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The nodes that make a shared value from other shared values.

    Attributes:
        value: The value in the candidate.
        reference: What it is called in the reference.
        nodes: Indices of its nodes in the candidate, in order; the last one makes ``value``.
        reads: Shared values that it reads, as the candidate calls them.
        constants: Constants that it reads.
        arithmetic: In which numbers it computes; the coarsest, if there are several.
    """

    value: str
    reference: str
    nodes: tuple[int, ...]
    reads: tuple[str, ...]
    constants: tuple[str, ...]
    arithmetic: Arithmetic


class CutGraph:
    """A candidate and the values that it shares with its reference.

    Args:
        candidate: ``onnx.ModelProto``; it is not changed.
        reference: ``onnx.ModelProto``; it is not changed.

    Raises:
        InputError: The candidate has an input that the reference has not.
    """

    def __init__(self, candidate: Any, reference: Any) -> None:
        self.candidate = candidate
        self.constants = onnxio.initializers(candidate)
        self.types = onnxio.value_types(candidate)
        self.reference_types = _computed(reference)
        self._nodes = list(candidate.graph.node)
        self.makers = {n: i for i, node in enumerate(self._nodes) for n in node.output if n}
        self._reads = [tuple(dict.fromkeys(_reads(node))) for node in self._nodes]
        self.readers: dict[str, list[int]] = {}
        for index, names in enumerate(self._reads):
            for name in names:
                self.readers.setdefault(name, []).append(index)
        self.outputs = {value.name for value in candidate.graph.output}
        self.shared = self._shared()
        self._check_inputs()

    def _check_inputs(self) -> None:
        inputs = [v.name for v in self.candidate.graph.input if v.name not in self.constants]
        unknown = [name for name in inputs if name not in self.reference_types]
        if unknown:
            raise InputError(
                f"the candidate takes {unknown[0]!r}, which the reference does not have",
                hint="Give the float file that the candidate was made from.",
            )

    def _shared(self) -> dict[str, str]:
        """Value of the candidate -> the value of the reference that it stands for."""
        known = self.reference_types
        found = {v.name: v.name for v in self.candidate.graph.input if v.name in known}
        for node in self._nodes:
            for name in filter(None, node.output):
                plain = next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s)), name)
                meant = name if name in known else plain if plain in known else None
                meant = meant or self._passed_on(node, found)
                if meant is not None and (name in self.readers or name in self.outputs):
                    found[name] = meant
        return found

    def _passed_on(self, node: Any, found: Mapping[str, str]) -> str | None:
        """What a node stands for that hands on what it reads, rounded at most."""
        if node.op_type == "DequantizeLinear":
            quantizer = self.quantizer(node)
            whole = quantizer is not None and self._rounded_for_all(quantizer.input[0])
            return found.get(quantizer.input[0]) if whole else None
        if node.op_type == "Identity":
            return found.get(node.input[0])
        if node.op_type == "Cast" and onnxio.attribute(node, "to", 0) in FLOATS:
            meant = found.get(node.input[0])
            return meant if self.reference_types.get(meant or "") in FLOATS else None
        return None

    def _rounded_for_all(self, name: str) -> bool:
        """Whether all readers of ``name`` quantise it; else a part may go another way in float."""
        readers = [self._nodes[index] for index in self.readers.get(name, [])]
        return all(node.op_type == "QuantizeLinear" for node in readers)

    def quantizer(self, node: Any) -> Any:
        """The QuantizeLinear before a DequantizeLinear, or None."""
        index = self.makers.get(node.input[0])
        before = self._nodes[index] if index is not None else None
        return before if before is not None and before.op_type == "QuantizeLinear" else None

    def node(self, index: int) -> Any:
        """A node of the candidate."""
        return self._nodes[index]

    def pieces(self) -> tuple[Piece, ...]:
        """One per shared value that a node makes, in the order of the candidate."""
        made = sorted((self.makers[n], n) for n in self.shared if n in self.makers)
        return tuple(self._piece(name) for _, name in made)

    def _piece(self, value: str) -> Piece:
        nodes, reads, constants = self.behind([value])
        return Piece(
            value=value,
            reference=self.shared[value],
            nodes=nodes,
            reads=reads,
            constants=constants,
            arithmetic=self._arithmetic(value, nodes=nodes, constants=constants),
        )

    def behind(
        self, values: Iterable[str], *, through: Collection[str] = ()
    ) -> tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]:
        """Nodes, shared values and constants from which ``values`` are made.

        Args:
            values: Values of the candidate that nodes make.
            through: Shared values at which not to stop.
        """
        nodes: set[int] = set()
        reads: dict[str, None] = {}
        constants: dict[str, None] = {}
        waiting = [self.makers[value] for value in values]
        while waiting:
            index = waiting.pop()
            if index in nodes:
                continue
            nodes.add(index)
            for name in self._reads[index]:
                if name in self.shared and not (name in through and name in self.makers):
                    reads[name] = None
                elif name in self.makers:
                    waiting.append(self.makers[name])
                elif name in self.constants:
                    constants[name] = None
        return tuple(sorted(nodes)), tuple(reads), tuple(constants)

    def _arithmetic(
        self, value: str, *, nodes: Sequence[int], constants: Sequence[str]
    ) -> Arithmetic:
        operators = [self._nodes[index].op_type for index in nodes]
        if any(mark in operator for operator in operators for mark in _INTEGER_MARKS):
            return "integers"
        stored = {self.constants[name].data_type for name in constants} & SMALL_INTEGERS
        if "DequantizeLinear" in operators or stored:
            return "int8"
        types = [self.types.get(value, 0)]
        types += [self.constants[name].data_type for name in constants]
        types += [
            self.types.get(n, 0) for i in nodes for n in (*self._reads[i], *self._nodes[i].output)
        ]
        names = {FLOATS.get(kind) for kind in types}
        if "bfloat16" in names:
            return "bfloat16"
        return "float16" if "float16" in names else "float32"

    def pairs(self, nodes: Iterable[int]) -> tuple[int, ...]:
        """Those of ``nodes`` that bring back an activation from its grid."""
        return tuple(
            index
            for index in nodes
            if self._nodes[index].op_type == "DequantizeLinear"
            and self.quantizer(self._nodes[index]) is not None
        )

    def bounds(self, value: str) -> tuple[Array, Array] | None:
        """Ends of the grid onto which all readers of ``value`` put it; None when not all do."""
        readers = [self._nodes[index] for index in self.readers.get(value, [])]
        rounding = [n for n in readers if n.op_type == "QuantizeLinear" and n.input[0] == value]
        if value in self.outputs or not rounding or len(rounding) != len(readers):
            return None
        ends = [self.ends(node) for node in rounding]
        if any(end is None for end in ends) or any(np.ndim(e[0]) for e in ends if e):
            return None
        lows, highs = zip(*(end for end in ends if end), strict=True)
        return np.min(lows), np.max(highs)

    def ends(self, node: Any) -> tuple[Array, Array] | None:
        """The least and the largest value of the grid of a QuantizeLinear."""
        parts = self.grid(node)
        if parts is None:
            return None
        scale, zero, kind = parts
        low, high = _INTEGER_ENDS.get(kind, (0, 255))
        return (low - zero) * scale, (high - zero) * scale

    def grid(self, node: Any) -> tuple[Array, Array, int] | None:
        """Scale, zero point and integer type of a Q or DQ node; None when they are computed."""
        to_array = extras.require("onnx").numpy_helper.to_array
        names = [name for name in node.input[1:] if name]
        tensors = [self.constants[name] for name in names if name in self.constants]
        if not tensors or len(tensors) < len(names):
            return None
        scale = to_array(tensors[0]).astype(np.float64)
        if len(tensors) < 2:
            return scale, np.zeros_like(scale), onnxio.attribute(node, "output_dtype", 2) or 2
        return scale, to_array(tensors[1]).astype(np.float64), int(tensors[1].data_type)


_INTEGER_ENDS: Final[Mapping[int, tuple[int, int]]] = {
    2: (0, 255), 3: (-128, 127), 4: (0, 65_535), 5: (-32_768, 32_767), 21: (0, 15), 22: (-8, 7),
}  # fmt: skip
"""Element type of ``TensorProto`` -> least and largest integer."""


def _computed(model: Any) -> dict[str, int]:
    """Name -> element type of the inputs and of what nodes make."""
    made = {name for node in model.graph.node for name in node.output if name}
    constants = set(onnxio.initializers(model))
    inputs = {value.name for value in model.graph.input} - constants
    return {n: k for n, k in onnxio.value_types(model).items() if k and n in made | inputs}


def _reads(node: Any) -> Iterator[str]:
    """What ``node`` reads, and what the graphs inside it take from around them."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inside = {name for inner in graph.node for name in inner.output}
            inside |= {value.name for value in graph.input}
            inside |= {tensor.name for tensor in graph.initializer}
            read = [name for inner in graph.node for name in _reads(inner)]
            read += [value.name for value in graph.output]
            yield from (name for name in read if name not in inside)
