"""What torch-pruning's dependency graph says of the indices of every layer.

The graph is asked one layer at a time; what it says is joined here, so that channels which meet in
more than one way (the halves of a gated layer, a residual over a concatenation) come out as they
are coupled, whichever layer one begins with. ``verifying.py`` finds what it gets wrong.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from equipoise import extras
from equipoise.compress.channels.calls import is_convolution, is_depthwise, watch_calls
from equipoise.errors import SourceError
from equipoise.sources.torch_model import NamedModule

Key = tuple[str, str, int]
"""Module, role and axis; the role of what cannot be cut is a reason in words."""
Element = tuple[Key, int]
"""One index of an axis."""
ROLES: Final = frozenset({"outputs", "inputs", "depthwise", "norm", "embedding", "parameter"})


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch-pruning prints, and warns of what is dealt with here."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class Traced:
    """A module and the dependency graph of one run of it.

    Args:
        module: A copy: all of its parameters get gradients.
        names: Of its inputs.
        tensors: One sample.
        source: For messages.

    Raises:
        SourceError: It does not run, or its graph cannot be followed.
        MissingExtraError: torch-pruning is not installed.
    """

    def __init__(
        self, module: Any, *, names: Sequence[str], tensors: Sequence[Any], source: str
    ) -> None:
        self.module = module.requires_grad_(requires_grad=True).eval()  # autograd is the tracer
        self.source = source
        self.named = NamedModule(module, names=names, source=source)
        self.name_of = {layer: name for name, layer in module.named_modules()}
        self.parameter_of = {p: name for name, p in module.named_parameters()}
        self.shared = _shared(module)
        self._pruning: Any = extras.require("torch_pruning")
        self.notes: list[str] = []
        self._marked = _with_marks(module, tensors)
        self.calls = watch_calls(module, lambda: self._run(self._marked, tensors))
        self.graph = self._graph(tensors)

    def _run(self, marked: Any, tensors: Sequence[Any]) -> list[Any]:
        """The outputs, each behind an operation, so that it is told from the layer that made it."""
        torch = extras.require("torch")
        try:
            with torch.enable_grad():
                given = [mark(t) for mark, t in zip(marked.marks, tensors, strict=True)]
                outputs = [value * 1 for value in self.named.call(given).values()]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            first = str(error).strip().partition("\n")[0]
            raise SourceError(f"{self.source} does not run on a sample: {first}") from error
        return [value for value in outputs if value.grad_fn is not None]

    def _graph(self, tensors: Sequence[Any]) -> Any:
        graph = self._pruning.DependencyGraph()
        try:
            with _quietly(), extras.require("torch").enable_grad():
                graph.build_dependency(self._marked, tensors, forward_fn=self._run, verbose=False)
        except SourceError:
            raise
        except Exception as error:  # it was not made for every model, and fails in any way
            raise self._unreadable("the run as a whole", error) from error
        return graph

    def _unreadable(self, part: str, error: Exception) -> SourceError:
        first = str(error).strip().partition("\n")[0]
        return SourceError(
            f"{self.source}: the dependencies of its channels cannot be followed: {part}:"
            f" {type(error).__name__}: {first}",
            hint="Such a model can be distilled or fine-tuned, but not made narrower.",
        )

    def classes(self) -> list[list[Element]]:
        """Indices that stand for one channel, each class with all of its places."""
        joined = Joined()
        for call in self.calls:
            layer = self.module.get_submodule(call.name)
            if layer not in self.graph.module2node:
                continue  # nothing that comes out depends on it
            key, size = self.key(self.graph.module2node[layer], outputs=True)
            if key[1] not in ROLES:
                self.notes.append(f"{call.name}: cannot be cut; it is {key[1]}")
                continue
            elements = [(key, index) for index in range(size)]
            if size > 1 and not all(element in joined for element in elements):
                self._join(joined, layer, call.name, elements)
        return joined.classes()

    def _join(self, joined: Joined, layer: Any, name: str, elements: list[Element]) -> None:
        pruner = self.graph.get_pruner_of_module(layer)
        indices = list(range(len(elements)))
        try:
            with _quietly():
                group = self.graph.get_pruning_group(layer, pruner.prune_out_channels, indices)
        except Exception as error:
            raise self._unreadable(f"from layer {name!r} on", error) from error
        for item in group:
            outputs = self.graph.is_out_channel_pruning_fn(item.dep.handler)
            key, size = self.key(item.dep.target, outputs=outputs)
            if size == 1:
                continue  # one number for all channels: nothing to cut
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                place = key if 0 <= index < size else _lost(key)
                joined.join(elements[root], (place, index))

    def key(self, node: Any, *, outputs: bool) -> tuple[Key, int]:
        """Which axis of which layer a node of the graph stands for, and its size.

        A node that is only an operation has size 1.
        """
        layer, nn = node.module, extras.require("torch").nn
        if isinstance(layer, nn.Parameter):
            axis = node.pruning_dim % layer.ndim
            return self._parameter(layer, axis), layer.shape[axis]
        if layer not in self.name_of:
            return self._operation(node, layer)
        name = self.name_of[layer]
        if name in self.shared:
            return ("", f"weights of {name!r} that another layer has too", 0), _UNBOUNDED
        if is_convolution(layer) or isinstance(layer, nn.Linear):
            return self._layer(layer, name, outputs=outputs)
        if isinstance(layer, nn.Embedding):
            return (name, "embedding", 0), layer.embedding_dim
        return self._norm(layer, name)

    def _parameter(self, parameter: Any, axis: int) -> Key:
        return self.parameter_of[parameter], "parameter", axis

    def _operation(self, node: Any, layer: Any) -> tuple[Key, int]:
        if node.type == self.graph.ops.OPTYPE.OUTPUT:
            return ("", "an output of the model", 0), _UNBOUNDED
        if any(layer is mark for mark in self._marked.marks):
            return ("", "an input of the model", 0), _UNBOUNDED
        return ("", "an operation", 0), 1

    def _layer(self, layer: Any, name: str, *, outputs: bool) -> tuple[Key, int]:
        if is_depthwise(layer):
            return (name, "depthwise", 0), layer.out_channels
        sizes = _sizes(layer)
        if getattr(layer, "groups", 1) > 1 and (layer.transposed or 1 in sizes.per_group):
            return ("", f"the {layer.groups} groups of {name!r}", 0), _UNBOUNDED
        if outputs:
            return (name, "outputs", 0), sizes.outputs
        return (name, "inputs", 0), sizes.inputs

    def _norm(self, layer: Any, name: str) -> tuple[Key, int]:
        nn = extras.require("torch").nn
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
            return (name, "norm", 0), layer.normalized_shape[0]
        for attribute in ("num_features", "num_channels", "num_parameters"):
            if hasattr(layer, attribute):
                return (name, "norm", 0), getattr(layer, attribute)
        if next(layer.parameters(), None) is None:
            return ("", "an operation", 0), 1
        return ("", f"the {type(layer).__name__} {name!r}", 0), _UNBOUNDED

    def norms(self) -> dict[str, str]:
        """Layer -> the batch norm that alone follows it."""
        batch: Any = extras.require("torch.nn.modules.batchnorm")
        found = {}
        for call in self.calls:
            node = self.graph.module2node.get(self.module.get_submodule(call.name))
            after = [out.module for out in node.outputs] if node else []
            if len(after) == 1 and isinstance(after[0], batch._BatchNorm):  # noqa: SLF001
                found[call.name] = self.name_of[after[0]]
        return found


_UNBOUNDED: Final = 1 << 62


def _lost(key: Key) -> Key:
    return "", f"indices of {key[0]!r} that it has not got", 0


def _with_marks(module: Any, tensors: Sequence[Any]) -> Any:
    """``module``, and for each input with channels a layer that makes them.

    So what is added to an input, or stands beside it in a concatenation, is known to be fixed. To
    torch-pruning the layer is a batch norm, which tells how many channels there are.
    """
    torch = extras.require("torch")
    norm: Any = extras.require("torch.nn.modules.batchnorm")

    class Mark(norm._BatchNorm):  # type: ignore[misc]  # noqa: SLF001
        def forward(self, value: Any) -> Any:
            return value * self.weight[0]

    def mark(tensor: Any) -> Any:
        channels = tensor.shape[-1 if tensor.ndim == 3 else 1] if tensor.ndim > 1 else 1
        return Mark(channels) if tensor.is_floating_point() else torch.nn.Identity()

    marked = torch.nn.Module()
    marked.module = module
    marked.marks = torch.nn.ModuleList(mark(tensor) for tensor in tensors)
    return marked


def _shared(module: Any) -> set[str]:
    """Layers that have a parameter in common with another one."""
    owners = defaultdict(set)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners[parameter].add(name.rpartition(".")[0])
    return {name for names in owners.values() if len(names) > 1 for name in names}


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    inputs: int
    outputs: int
    per_group: tuple[int, int]


def _sizes(layer: Any) -> _Sizes:
    if not is_convolution(layer):
        sizes = layer.in_features, layer.out_features
        return _Sizes(inputs=sizes[0], outputs=sizes[1], per_group=sizes)
    sizes = layer.in_channels, layer.out_channels
    per_group = sizes[0] // layer.groups, sizes[1] // layer.groups
    return _Sizes(inputs=sizes[0], outputs=sizes[1], per_group=per_group)


class Joined:
    """Disjoint sets of elements, joined as they are found to be one."""

    def __init__(self) -> None:
        self._parent: dict[Element, Element] = {}

    def __contains__(self, element: Element) -> bool:
        return element in self._parent

    def _root(self, element: Element) -> Element:
        self._parent.setdefault(element, element)
        while (parent := self._parent[element]) != element:
            self._parent[element] = self._parent[parent]
            element = self._parent[element]
        return element

    def join(self, left: Element, right: Element) -> None:
        """Say that two elements are one channel."""
        # What cannot be cut is one element for everybody who meets it, and must not join them.
        if right[0][0] == "":
            right = (right[0], hash(self._root(left)))
        self._parent[self._root(right)] = self._root(left)

    def classes(self) -> list[list[Element]]:
        """The sets, each with all of its elements."""
        found: dict[Element, list[Element]] = defaultdict(list)
        for element in list(self._parent):
            found[self._root(element)].append(element)
        return list(found.values())
