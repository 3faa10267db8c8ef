"""Whose time a kernel's is: a node's, or that of the border between float and integers.

The runtime merges nodes, renames them, changes layouts and moves Q/DQ pairs. What it leaves alone
are the names of most tensors; so a kernel belongs to the node whose name it bears, or else to the
node whose tensor it gives, and what rounds, restores or reorders a tensor belongs to that tensor.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from equipoise.quantize.borders import Roots
from equipoise.quantize.layers import LAYERS
from equipoise.quantize.pairs import PAIR
from equipoise.quantize.rewritten import Kernel, Times, plain_name

_LAYOUT: Final = frozenset({"ReorderInput", "ReorderOutput"})
_SUFFIXES: Final = (".quantized", ".dequantized", ".float")
"""What writing Q/DQ appends to the name of a tensor."""

_LEAST: Final = 0.1
"""Of its profiled time a kernel takes at least."""

_PROFILER_MS: Final = 5e-4
"""What the profiler takes for one input of a kernel, at most; 0.3 us were seen."""

_UNSEEN_MS: Final = 1e-3
"""What the runtime takes between two kernels, at most."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Whose time a kernel's is: a node's, a tensor's, or nobody's."""

    kind: Literal["node", "border", "other"]
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Where one run of a model spends its time, in milliseconds.

    Attributes:
        nodes: Node of the float graph -> time of the kernels that compute it.
        borders: Tensor, before any Relu or Clip -> time of what rounds, restores and reorders it.
        other: What belongs to nobody.
    """

    nodes: dict[str, float]
    borders: dict[str, float]
    other: float

    @property
    def total(self) -> float:
        """Time of all kernels."""
        return sum(self.nodes.values()) + sum(self.borders.values()) + self.other


class Attribution:
    """The places of kernels.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes, which all models are made from.
    """

    def __init__(self, model: Any) -> None:
        self._nodes = {str(node.name): node for node in model.graph.node}
        self._roots = Roots(model)
        self._tensors = {value.name for value in model.graph.input} | set(self._roots.makers)

    def places(self, kernels: Sequence[Kernel]) -> dict[str, Place]:
        """Name of each kernel of a rewritten graph -> its place."""
        makers = {name: kernel for kernel in kernels for name in kernel.outputs if name}
        found = {kernel.name: self._place(kernel, makers) for kernel in kernels}
        for kernel in reversed(kernels):
            # What restores a weight belongs to whom the weight does.
            for maker in (makers.get(name) for name in kernel.inputs):
                if maker is not None and found[maker.name].kind == "other":
                    found[maker.name] = found[kernel.name]
        return found

    def spent(self, kernels: Sequence[Kernel], times: Times) -> Spent:
        """The time of the kernels of one session, at their places."""
        places = self.places(kernels)
        found: dict[Place, float] = defaultdict(float)
        for name, (_, milliseconds) in times.items():
            found[places.get(name, Place(kind="other"))] += milliseconds
        return Spent(
            nodes={place.name: ms for place, ms in found.items() if place.kind == "node"},
            borders={place.name: ms for place, ms in found.items() if place.kind == "border"},
            other=found.get(Place(kind="other"), 0.0),
        )

    def _place(self, kernel: Kernel, makers: Mapping[str, Kernel]) -> Place:
        if not self._is_passage(kernel):
            node = self._node(kernel)
            if node:
                return Place(kind="node", name=node)
        tensor = self._tensor(kernel, makers)
        return Place(kind="border", name=self._roots.of(tensor)) if tensor else Place(kind="other")

    def _is_passage(self, kernel: Kernel) -> bool:
        made_up = plain_name(kernel.name) not in self._nodes
        return kernel.operator in PAIR | _LAYOUT or (kernel.operator == "Transpose" and made_up)

    def _node(self, kernel: Kernel) -> str:
        """The node that ``kernel`` computes, by its name or by what it gives; empty for none."""
        name = plain_name(kernel.name)
        if name in self._nodes:
            return name
        # A blocked convolution is called by what it gives.
        given = (self._known(tensor) for tensor in (name, *kernel.outputs))
        makers = (self._roots.makers.get(tensor) for tensor in given)
        return next((str(maker.name) for maker in makers if maker is not None), "")

    def _known(self, tensor: str) -> str:
        """The name of ``tensor`` in the float graph; empty when it has none there."""
        while tensor not in self._tensors:
            plain = plain_name(tensor)
            for suffix in _SUFFIXES:
                plain = plain.removesuffix(suffix)
            if plain == tensor:
                return ""
            tensor = plain
        return tensor

    def _tensor(self, kernel: Kernel, makers: Mapping[str, Kernel]) -> str:
        """The tensor that ``kernel`` passes on: what it reads or gives, or what that came from."""
        seen: set[str] = set()
        while kernel.name not in seen:
            seen.add(kernel.name)
            for tensor in (*kernel.inputs[:1], *kernel.outputs):
                if self._known(tensor):
                    return self._known(tensor)
            before = makers.get(kernel.inputs[0]) if kernel.inputs else None
            if before is None:
                return ""
            node = "" if self._is_passage(before) else self._node(before)
            if node:
                return str(self._nodes[node].output[0])
            kernel = before
        return ""


def unprofiled(kernels: Sequence[Kernel], times: Times, *, whole_ms: float) -> Times:
    """Times of kernels that add up to a run of the model without a profile.

    The profiler writes down the type and the shape of every input while its clock runs, which takes
    longer than a small kernel does; QLinearConv has nine inputs. And between kernels the runtime
    takes time that no profile shows. Both are put down to the inputs of a kernel, and neither is
    more than a fraction of a microsecond for each: a whole run that says otherwise was disturbed by
    other load, which the medians of short kernels bear better.

    Args:
        kernels: Of the model.
        times: As profiled.
        whole_ms: Milliseconds of a run that is not profiled.
    """
    counts = {kernel.name: max(len(kernel.inputs), 1) for kernel in kernels}
    total = sum(counts.get(name, 1) for name in times)
    profiled = sum(ms for _, ms in times.values())
    most, least = profiled + _UNSEEN_MS * len(times), profiled - _PROFILER_MS * total
    whole_ms = min(max(whole_ms, least), most)
    excess = (profiled - whole_ms) / max(total, 1)
    left = {n: max(ms - excess * counts.get(n, 1), _LEAST * ms) for n, (_, ms) in times.items()}
    scale = whole_ms / (sum(left.values()) or 1.0)
    return {name: (operator, left[name] * scale) for name, (operator, _) in times.items()}


def merged(
    model: Any, present: Sequence[Collection[str]], *, able: Collection[str]
) -> tuple[tuple[str, ...], ...]:
    """Groups of nodes that some kernel computes together; each in graph order.

    A node that has a kernel in one session and none in another is computed by a neighbour's where
    it has none: a Relu or an Add by the convolution before it, a product by the sum that adds its
    bias. The time of such a group is known, and that of its parts is not.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes.
        present: The nodes that have a kernel, for each session.
        able: Nodes that may run in integers.
    """
    return _Merging(model, present, able=able).groups()


class _Merging:
    def __init__(
        self, model: Any, present: Sequence[Collection[str]], *, able: Collection[str]
    ) -> None:
        self._graph = model.graph
        self._makers = {name: node for node in model.graph.node for name in node.output if name}
        self._readers = Counter(n for node in model.graph.node for n in dict.fromkeys(node.input))
        self._ever = frozenset[str]().union(*present)
        always = {name for name in self._ever if all(name in names for names in present)}
        self._sometimes = self._ever - always
        self._able = able

    def groups(self) -> tuple[tuple[str, ...], ...]:
        leaders: dict[str, str] = {}
        groups: dict[str, list[str]] = {}
        for node in self._graph.node:
            before = self._before(node)
            name = str(node.name)
            leaders[name] = name if before is None else leaders[str(before.name)]
            groups.setdefault(leaders[name], []).append(name)
        return tuple(tuple(names) for names in groups.values())

    def _before(self, node: Any) -> Any:
        """The node that ``node`` is merged with, if any: it comes before it in the graph."""
        layers = [maker for maker in self._makers_of(node) if self._leads_to(maker, node)]
        absorbed = [layer for layer in layers if layer.name in self._sometimes]
        if absorbed:
            return absorbed[-1]
        if node.name not in self._sometimes or node.op_type in LAYERS:
            return None
        return self._computed((*reversed(layers), *self._makers_of(node)))

    def _computed(self, found: Sequence[Any]) -> Any:
        """The first of ``found``, or what comes before it where it has no kernel itself."""
        if not found or found[0].name in self._ever or found[0].name in self._able:
            return next(iter(found), None)
        return self._computed(self._makers_of(found[0]))

    def _makers_of(self, node: Any) -> list[Any]:
        return [self._makers[name] for name in node.input if name in self._makers]

    def _leads_to(self, layer: Any, node: Any) -> bool:
        """Whether ``layer`` has weights and nothing but ``node`` reads it."""
        return (
            layer.op_type in LAYERS
            and layer.output[0] in node.input
            and (self._readers[layer.output[0]] == 1)
        )
