"""What a choice of precisions costs in time: nodes, and the borders between float and integers.

The time of a model is a sum over its nodes, each in one of two forms, and over the tensors between
them. A tensor that passes from float to integers is rounded by a kernel of its own, one that passes
back is restored by another, and one that stays on its side is neither; so a node in float between
two in integers pays twice, and three products that read one activation round it once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from equipoise.quantize.static import Prepared

_CLIPS: Final = frozenset({"Clip", "Relu"})
_PRODUCTS: Final = frozenset({"Gemm", "MatMul"})
"""Operators that give float out where anything but integers reads them."""

State = Literal["float", "integer", "rounded", "restored"]
"""How a tensor passes: ``rounded`` from float to integers, ``restored`` from integers to float."""

STATES: Final[tuple[State, ...]] = ("float", "integer", "rounded", "restored")


@dataclass(frozen=True, kw_only=True)
class Border:
    """A tensor that nodes read or write which may run in integers.

    A Relu or Clip on the way belongs to it: the grid or the runtime does what they do.

    Attributes:
        tensor: The tensor, before such a Relu or Clip.
        producer: The node that may give it in integers; empty for none.
        readers: Nodes that may read it in integers.
        outside: Whether anything else reads it, or it is an output of the model.
        joint: Whether it is in integers only when all its readers are too.
    """

    tensor: str
    producer: str
    readers: tuple[str, ...]
    outside: bool
    joint: bool

    def state(self, integers: Collection[str]) -> State:
        """How it passes when the nodes ``integers`` run in integers."""
        read = [name in integers for name in self.readers]
        if self._is_given_in_integers(integers, read):
            return "restored" if self.outside or not all(read) else "integer"
        return "rounded" if any(read) else "float"

    def _is_given_in_integers(self, integers: Collection[str], read: list[bool]) -> bool:
        if self.producer not in integers:
            return False
        return not self.joint or (bool(read) and all(read) and not self.outside)


@dataclass(frozen=True, kw_only=True)
class Join:
    """A node without weights that runs in integers only between nodes that do.

    Attributes:
        name: The node.
        producers: Nodes that give what it reads: all of them have to run in integers.
        readers: Nodes that read it: one of them has to.
    """

    name: str
    producers: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BorderTimes:
    """What a border costs in each state, in milliseconds.

    Attributes:
        border: Where.
        float_ms: All on both sides in float.
        integer_ms: All in integers.
        rounded_ms: Float given, integers read.
        restored_ms: Integers given, float read.
        measured: States that were seen; the others are estimated from the size of the tensor.
    """

    border: Border
    float_ms: float
    integer_ms: float
    rounded_ms: float
    restored_ms: float
    measured: tuple[str, ...]

    def ms(self, integers: Collection[str]) -> float:
        """Milliseconds when the nodes ``integers`` run in integers."""
        return float(getattr(self, f"{self.border.state(integers)}_ms"))


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """The time of a model as a function of which nodes run in integers.

    Attributes:
        base_ms: With all nodes in float, borders apart.
        changes_ms: Node -> what its integer form takes more than its float form, borders apart;
            negative where integers are faster.
        borders: Tensors between them.
        joins: Which choices there are.
    """

    base_ms: float
    changes_ms: dict[str, float]
    borders: tuple[BorderTimes, ...]
    joins: tuple[Join, ...]

    def predict_ms(self, integers: Collection[str]) -> float:
        """Milliseconds of the whole model with the nodes ``integers`` in integers."""
        changes = (ms for name, ms in self.changes_ms.items() if name in integers)
        borders = (border.ms(integers) for border in self.borders)
        return self.base_ms + math.fsum(changes) + math.fsum(borders)

    def settled(self, integers: Collection[str]) -> frozenset[str]:
        """Those of ``integers`` that can run in integers: joins need what is around them."""
        found = set(integers)
        while True:
            lost = {
                join.name
                for join in self.joins
                if join.name in found
                and not (found.issuperset(join.producers) and found.intersection(join.readers))
            }
            if not lost:
                return frozenset(found)
            found -= lost


def find_borders(prepared: Prepared) -> tuple[Border, ...]:
    """Every tensor that a node which may run in integers reads or writes, in graph order."""
    return tuple(_Graph(prepared).borders())


def find_joins(prepared: Prepared) -> tuple[Join, ...]:
    """The nodes without weights of ``prepared`` that may run in integers, in graph order."""
    return tuple(_Graph(prepared).joins())


class Roots:
    """Tensors seen through the Relu and Clip behind them.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes.
    """

    def __init__(self, model: Any) -> None:
        self.makers = {name: node for node in model.graph.node for name in node.output if name}

    def of(self, tensor: str) -> str:
        """The tensor before every Relu and Clip that gives ``tensor``."""
        node = self.makers.get(tensor)
        return tensor if node is None or node.op_type not in _CLIPS else self.of(node.input[0])


class _Graph:
    def __init__(self, prepared: Prepared) -> None:
        self._model, self._placement = prepared.model, prepared.placement
        self._roots = Roots(prepared.model)
        self._readers: dict[str, list[Any]] = {}
        for node in prepared.model.graph.node:
            if node.op_type not in _CLIPS:
                for root in dict.fromkeys(self._roots.of(name) for name in node.input if name):
                    self._readers.setdefault(root, []).append(node)

    def borders(self) -> Iterator[Border]:
        given_out = {self._roots.of(value.name) for value in self._model.graph.output}
        for tensor, producer in self._tensors().items():
            all_readers = self._readers.get(tensor, [])
            able = [n.name for n in all_readers if self._reads(n, tensor)]
            yield Border(
                tensor=tensor,
                producer=producer,
                readers=tuple(able),
                outside=tensor in given_out or len(able) < len(all_readers),
                joint=self._is_joint(tensor),
            )

    def joins(self) -> Iterator[Join]:
        for node in self._able():
            if self._is_layer(node):
                continue
            makers = [self._roots.makers.get(self._roots.of(name)) for name in self._values(node)]
            readers = self._readers.get(node.output[0], [])
            yield Join(
                name=node.name,
                producers=tuple(dict.fromkeys(str(m.name) for m in makers if m is not None)),
                readers=tuple(n.name for n in readers if self._reads(n, node.output[0])),
            )

    def _able(self) -> list[Any]:
        nodes = self._placement.nodes
        return [node for node in self._model.graph.node if node.name in nodes]

    def _tensors(self) -> dict[str, str]:
        """Tensor at a border -> the node that may give it in integers, or an empty name."""
        found: dict[str, str] = {}
        for node in self._able():
            for name in self._values(node):
                found.setdefault(self._roots.of(name), "")
            found.update(dict.fromkeys(node.output, str(node.name)))
        return found

    def _values(self, node: Any) -> list[str]:
        """The activations that ``node`` reads rounded: a layer its first input, others all."""
        names = node.input[:1] if self._is_layer(node) else node.input
        return [name for name in names if name in self._placement.activations]

    def _is_layer(self, node: Any) -> bool:
        return len(node.input) > 1 and node.input[1] in self._placement.weights

    def _reads(self, node: Any, root: str) -> bool:
        is_able = node.name in self._placement.nodes
        return is_able and root in map(self._roots.of, self._values(node))

    def _is_joint(self, tensor: str) -> bool:
        node = self._roots.makers.get(tensor)
        is_product = node is not None and node.op_type in _PRODUCTS
        return not self._placement.quantize_outputs or (
            is_product and self._placement.float_products
        )
