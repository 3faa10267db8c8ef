"""What profiles of several models say of each node and of each border.

The time of a model is taken for a sum over groups of nodes that the runtime computes together and
over borders; it is fitted to all models at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise.quantize.attribution import Spent, merged
from equipoise.quantize.borders import (
    STATES,
    Border,
    BorderTimes,
    LatencyModel,
    State,
    find_borders,
    find_joins,
)
from equipoise.quantize.static import Prepared
from equipoise.spec import Array

_FLOAT: Final = 0
_INTEGERS: Final = 1
"""Places of the two plain designs among all."""

Design = frozenset[str]
"""Nodes in integers."""

Seen = Mapping[State, float]
"""State of a border -> milliseconds."""


@dataclass(frozen=True, kw_only=True)
class NodeTimes:
    """One node in both forms, with its share of the borders, in milliseconds.

    Attributes:
        float_ms: In the model that is all in float; None where the runtime has it in another node.
        integer_ms: In the model with everything in integers that may be; None likewise.
        spread_ms: Half the range of the difference over the openings.
        group: The nodes that the runtime computes with it; their times cannot be told apart.
    """

    float_ms: float | None
    integer_ms: float | None
    spread_ms: float
    group: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was measured of the nodes of a model.

    Attributes:
        model: Time as a function of the nodes in integers, kernels alone.
        nodes: Node that may run in integers -> its times.
        others: Other node -> its time.
        designs: The models that were profiled, as nodes in integers.
    """

    model: LatencyModel
    nodes: dict[str, NodeTimes]
    others: dict[str, float]
    designs: tuple[Design, ...]


def fit_times(
    prepared: Prepared,
    openings: Sequence[Sequence[Spent]],
    *,
    designs: Sequence[Design],
    sizes: Mapping[str, int],
) -> Timing:
    """The times of nodes and borders that explain the profiles best.

    Args:
        prepared: What may run in integers.
        openings: Where each design spent its time, for each time that all were opened.
        designs: What was profiled; all in float first, everything in integers second.
        sizes: Tensor at a border -> number of its values.
    """
    present = [
        frozenset[str]().union(*(one.nodes for one in spent))
        for spent in zip(*openings, strict=True)
    ]
    groups = merged(prepared.model, present, able=prepared.placement.nodes)
    return _Fit(prepared, designs=designs, groups=groups, sizes=sizes).timing(openings)


class _Fit:
    """Sums over nodes and borders, fitted to the profiled models."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        designs: Sequence[Design],
        groups: Sequence[tuple[str, ...]],
        sizes: Mapping[str, int],
    ) -> None:
        self._prepared, self._designs = prepared, designs
        self._borders, self._sizes = find_borders(prepared), sizes
        self._able, self._groups = prepared.placement.nodes, groups

    def timing(self, openings: Sequence[Sequence[Spent]]) -> Timing:
        fits = [self._fitted(spent) for spent in openings]
        seen = [self._seen(spent) for spent in openings]
        changes = {name: [changes[name] for _, changes in fits] for name in fits[0][1]}
        model = LatencyModel(
            base_ms=statistics.median(base for base, _ in fits),
            changes_ms={name: statistics.median(values) for name, values in changes.items()},
            borders=self._border_times(seen),
            joins=find_joins(self._prepared),
        )
        plain = _medians([spent[_FLOAT].nodes for spent in openings])
        spreads = {name: (max(v) - min(v)) / 2 for name, v in changes.items()}
        return Timing(
            model=model,
            nodes=self._node_times(openings, model=model, spreads=spreads),
            others={n: ms for n, ms in plain.items() if n not in self._grouped_with_able()},
            designs=tuple(self._designs),
        )

    def _fitted(self, spent: Sequence[Spent]) -> tuple[float, dict[str, float]]:
        """Milliseconds with all in float, and what integers change, of one opening."""
        base = statistics.median(one.other + self._elsewhere(one) for one in spent)
        changes: dict[str, float] = {}
        for group in self._groups:
            totals = np.array([sum(one.nodes.get(n, 0.0) for n in group) for one in spent])
            able = [name for name in group if name in self._able]
            if able:
                start, found = self._group_fit(totals, able, spent)
                changes |= found
                base += start
            else:
                base += float(np.median(totals))
        return base, changes

    def _elsewhere(self, spent: Spent) -> float:
        """Time of what reorders tensors that nothing in integers ever touches."""
        known = {border.tensor for border in self._borders}
        return sum(ms for tensor, ms in spent.borders.items() if tensor not in known)

    def _group_fit(
        self, totals: Array, able: Sequence[str], spent: Sequence[Spent]
    ) -> tuple[float, dict[str, float]]:
        """Least squares around what the plain designs say of each node.

        Where the designs leave open which node of a group changes how much, that is what counts.
        """
        first = [spent[_INTEGERS].nodes.get(n, 0.0) - spent[_FLOAT].nodes.get(n, 0.0) for n in able]
        start = np.array([totals[_FLOAT], *first])
        factors = np.array([[1.0, *(n in design for n in able)] for design in self._designs])
        better, *_ = np.linalg.lstsq(factors, totals - factors @ start, rcond=None)
        found = start + better
        return float(found[0]), dict(zip(able, found[1:].tolist(), strict=True))

    def _seen(self, spent: Sequence[Spent]) -> dict[str, Seen]:
        """Tensor -> mean time in each state that it was seen in, of one opening."""
        found: dict[str, Seen] = {}
        for border in self._borders:
            times: dict[State, list[float]] = {}
            for design, one in zip(self._designs, spent, strict=True):
                times.setdefault(border.state(design), []).append(
                    one.borders.get(border.tensor, 0.0)
                )
            found[border.tensor] = {s: statistics.fmean(values) for s, values in times.items()}
        return found

    def _border_times(self, openings: Sequence[Mapping[str, Seen]]) -> tuple[BorderTimes, ...]:
        seen = {
            border.tensor: _medians([one[border.tensor] for one in openings])
            for border in self._borders
        }
        rates = {
            state: self._rate(seen, state, beside=beside)
            for state, beside in (("rounded", "float"), ("restored", "integer"))
        }
        return tuple(self._border(border, seen[border.tensor], rates) for border in self._borders)

    def _rate(self, seen: Mapping[str, Mapping[str, float]], state: str, *, beside: str) -> float:
        """Milliseconds per value of passing; the median of the borders that were seen to."""
        rates = [
            max(times[state] - times.get(beside, 0.0), 0.0) / max(self._sizes[tensor], 1)
            for tensor, times in seen.items()
            if state in times
        ]
        return statistics.median(rates) if rates else 0.0

    def _border(
        self, border: Border, times: Mapping[str, float], rates: Mapping[str, float]
    ) -> BorderTimes:
        """A kernel more costs no less: what noise says otherwise is cut off."""
        plain, integer = times.get("float", 0.0), times.get("integer", 0.0)
        size = self._sizes[border.tensor]
        rounded = times.get("rounded", plain + rates["rounded"] * size)
        restored = times.get("restored", integer + rates["restored"] * size)
        return BorderTimes(
            border=border,
            float_ms=plain,
            integer_ms=integer,
            rounded_ms=max(rounded, plain),
            restored_ms=max(restored, integer),
            measured=tuple(state for state in STATES if state in times),
        )

    def _grouped_with_able(self) -> frozenset[str]:
        return frozenset(
            name for group in self._groups if self._able.intersection(group) for name in group
        )

    def _node_times(
        self,
        openings: Sequence[Sequence[Spent]],
        *,
        model: LatencyModel,
        spreads: Mapping[str, float],
    ) -> dict[str, NodeTimes]:
        plain, integer = (
            (_medians([spent[index].nodes for spent in openings]), border_shares(model, design))
            for index, design in ((_FLOAT, frozenset()), (_INTEGERS, self._able))
        )
        found: dict[str, NodeTimes] = {}
        for group in self._groups:
            able = [name for name in group if name in self._able]
            for name in able:
                parts = group if len(able) == 1 else (name,)
                found[name] = NodeTimes(
                    float_ms=_share(name, parts, *plain),
                    integer_ms=_share(name, parts, *integer),
                    spread_ms=spreads[name],
                    group=group,
                )
        return found


def _share(
    name: str,
    parts: Sequence[str],
    times: Mapping[str, float],
    borders: Mapping[str, float],
) -> float | None:
    """Time of a node and what is merged with it, and its share of borders; None without kernel."""
    known = [times[part] for part in parts if part in times]
    return sum(known) + borders.get(name, 0.0) if known else None


def border_shares(model: LatencyModel, integers: Design) -> dict[str, float]:
    """Node -> its share of the borders when ``integers`` run in integers.

    Rounding is shared by the nodes that read what is rounded, restoring is its producer's.
    """
    shares: dict[str, float] = {}
    for times in model.borders:
        border, milliseconds = times.border, times.ms(integers)
        readers = [name for name in border.readers if name in integers] or list(border.readers)
        rounded = border.state(integers) == "rounded" or not border.producer
        payers = readers if rounded and readers else [border.producer]
        for name in payers:
            shares[name] = shares.get(name, 0.0) + milliseconds / len(payers)
    return shares


def _medians(openings: Sequence[Mapping[Any, float]]) -> dict[str, float]:
    """Medians over the openings, key by key."""
    return {
        key: statistics.median(one[key] for one in openings if key in one) for key in openings[0]
    }
