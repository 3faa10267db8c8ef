"""Which channels of a module go together, out of what one run of it shows."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from equipoise.compress.channels.calls import Call
from equipoise.compress.channels.coupling import NO_CHANNEL, Coupling, Member, Role
from equipoise.compress.channels.tracing import ROLES, Element, Key, Traced


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What a traced run shows.

    Attributes:
        couplings: Channels that can be cut together, in the order that they are made.
        calls: Layers in the order that they run.
        norms: Layer -> the batch norm that alone follows it.
        notes: What cannot be cut and why.
    """

    couplings: tuple[Coupling, ...]
    calls: tuple[Call, ...]
    norms: dict[str, str]
    notes: tuple[str, ...]


def read_graph(module: Any, *, names: Sequence[str], tensors: Sequence[Any], source: str) -> Graph:
    """Trace ``module`` and find its couplings.

    Args:
        module: In evaluation mode. It is not changed.
        names: Of its inputs.
        tensors: One sample.
        source: For messages.

    Raises:
        SourceError: It does not run, or its graph cannot be followed.
        MissingExtraError: torch-pruning is not installed.
    """
    traced = Traced(copy.deepcopy(module), names=names, tensors=tensors, source=source)
    classes = traced.classes()
    found = _Sorter(traced, classes)
    return Graph(
        couplings=found.couplings(),
        calls=traced.calls,
        norms=traced.norms(),
        notes=tuple(dict.fromkeys(found.notes)),
    )


def _places(elements: list[Element]) -> frozenset[tuple[Key, int]]:
    """Where a channel is, and how often; once is enough where it cannot be cut."""
    counts = Counter(key for key, _ in elements)
    return frozenset((key, n if key[1] in ROLES else 0) for key, n in counts.items())


class _Sorter:
    """Classes with the same places are channels of one coupling."""

    def __init__(self, traced: Traced, classes: list[list[Element]]) -> None:
        self.traced = traced
        self.classes = classes
        self.notes = list(traced.notes)
        self._order = {call.name: place for place, call in enumerate(traced.calls)}

    def couplings(self) -> tuple[Coupling, ...]:
        """Couplings in the order that their first layers run; the others are told in the notes."""
        alike: dict[frozenset[tuple[Key, int]], list[list[Element]]] = defaultdict(list)
        for elements in self.classes:
            alike[_places(elements)].append(elements)
        named = [(self._first(channels[0]), channels) for channels in alike.values()]
        taken: Counter[str] = Counter()
        found = []
        for (_, name), channels in sorted(named, key=lambda pair: pair[0]):
            taken[name] += 1
            unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
            coupling = self._coupling(unique, channels)
            found += [coupling] if coupling is not None else []
        return tuple(found)

    def _first(self, channel: list[Element]) -> tuple[int, str]:
        """The first layer that makes a channel, and when it runs."""
        makers = [key[0] for key, _ in channel if key[1] in {"outputs", "depthwise"}]
        return min((self._order[name], name) for name in makers)

    def _coupling(self, name: str, channels: list[list[Element]]) -> Coupling | None:
        blocked = {key[1] for key, _ in channels[0] if key[1] not in ROLES}
        if blocked:
            self.notes.append(f"{name}: cannot be cut; it reaches {', '.join(sorted(blocked))}")
            return None
        if len(channels) == 1:
            return None
        maker = self._first(channels[0])[1]
        channels = sorted(channels, key=lambda c: min(i for key, i in c if key[0] == maker))
        members = self._members(channels)
        parts = self._parts(members, len(channels))
        if parts is None:
            self.notes.append(f"{name}: cannot be cut; groups would come out of unequal size")
            return None
        return Coupling(name=name, width=len(channels), members=members, parts=parts)

    def _members(self, channels: list[list[Element]]) -> tuple[Member, ...]:
        places: dict[Key, dict[int, int]] = defaultdict(dict)
        for channel, elements in enumerate(channels):
            for key, index in elements:
                places[key][index] = channel
        return tuple(
            Member(
                module=key[0],
                role=cast("Role", key[1]),
                axis=key[2],
                channels=tuple(indices.get(index, NO_CHANNEL) for index in range(self._size(key))),
            )
            for key, indices in sorted(places.items())
        )

    def _size(self, key: Key) -> int:
        if key[1] == "parameter":
            return int(self.traced.module.get_parameter(key[0]).shape[key[2]])
        node = self.traced.graph.module2node[self.traced.module.get_submodule(key[0])]
        return self.traced.key(node, outputs=key[1] != "inputs")[1]

    def _parts(self, members: Sequence[Member], width: int) -> tuple[int, ...] | None:
        """Which part each channel is in; None when the parts are not of one size."""
        labels: list[list[tuple[str, int]]] = [[] for _ in range(width)]
        for member in members:
            count = self._groups(member)
            held = Counter(dict.fromkeys(range(count), 0))
            for index, channel in enumerate(member.channels):
                if channel != NO_CHANNEL:
                    group = index * count // len(member.channels)
                    labels[channel].append((member.module, group))
                    held[group] += 1
            if len(set(held.values())) > 1:
                return None
        numbers = {label: i for i, label in enumerate(sorted({tuple(x) for x in labels}))}
        parts = [numbers[tuple(label)] for label in labels]
        return tuple(parts) if len(set(np.bincount(parts))) == 1 else None

    def _groups(self, member: Member) -> int:
        """Into how many groups of equal size a layer divides the axis."""
        if member.role in {"depthwise", "parameter", "embedding"}:
            return 1
        layer = self.traced.module.get_submodule(member.module)
        return int(getattr(layer, "groups", getattr(layer, "num_groups", 1)))
