"""Widths being chosen: what each change would lose and save."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise.compress.latency.estimate import Cost, Estimator
from equipoise.compress.structure import Group, Structure
from equipoise.errors import InputError, NonFiniteError, UsageError

_MOST_CHOICES: Final = 48
"""Widths of one group that are looked at; of a wider one, every second multiple, or third."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One group given another width.

    Attributes:
        group: Its name.
        width: The new width.
        saved_ms: Estimated milliseconds that it saves; negative where it costs.
        lost: Score that it removes; negative where it gives back.
    """

    group: str
    width: int
    saved_ms: float
    lost: float


class Costs:
    """Losses by score and milliseconds by estimate, kept layer by layer so that trying is cheap.

    Args:
        structure: Groups with their scores and widths now.
        estimator: Estimates milliseconds.
        least_share: No group keeps a smaller share of the width it has now.

    Raises:
        UsageError: ``least_share`` is not above 0 and at most 1, or a group is none of the
            estimator's.
        InputError: A group has not one score per channel.
        NonFiniteError: A score is NaN or infinite.
    """

    def __init__(self, structure: Structure, estimator: Estimator, *, least_share: float) -> None:
        if not 0 < least_share <= 1:
            raise UsageError(f"least_share is {least_share}; it has to be above 0 and at most 1")
        self.estimator = estimator
        self.groups = {group.name: group for group in structure.groups}
        self._losses = {group.name: _losses(group) for group in structure.groups}
        self.choices = {g.name: _choices(g, least_share=least_share) for g in structure.groups}
        self.full = {group.name: group.width for group in structure.groups}
        layers = estimator.structure.layers
        self._readers = {
            name: [i for i, x in enumerate(layers) if name in {x.input_group, x.output_group}]
            for name in self.groups
        }
        self._neighbours = {
            name: [
                other
                for other, theirs in self._readers.items()
                if other != name and not set(own).isdisjoint(theirs)
            ]
            for name, own in self._readers.items()
        }
        self._known: dict[tuple[str | int, ...], Cost] = {}
        estimator.latency_ms(self.full)  # refuses groups and widths that it does not know

    def lost(self, group: str, width: int) -> float:
        """Score that goes when ``group`` keeps ``width`` channels: the least ones go."""
        return self._losses[group][self.full[group] - width]

    def total_lost(self, widths: Mapping[str, int]) -> float:
        """Score that goes at ``widths``."""
        return sum(self.lost(name, width) for name, width in widths.items())

    def latency_ms(self, widths: Mapping[str, int]) -> float:
        """Estimated milliseconds at ``widths``."""
        return self.estimator.latency_ms(widths)

    def moves(
        self, widths: Mapping[str, int], *, groups: Iterable[str] | None = None
    ) -> Iterator[Move]:
        """Every change of one group from ``widths``, up or down; of ``groups`` alone if given."""
        whole = self._whole(widths)
        for group in self.choices if groups is None else groups:
            yield from self._moves(group, widths, whole=whole)

    def _moves(self, group: str, widths: Mapping[str, int], *, whole: Cost) -> Iterator[Move]:
        choices, costs = self.choices[group], self._costs(group, widths)
        now = costs[choices.index(widths[group])]
        totals = self.estimator.total_ms(whole + (costs - now)).tolist()
        before, lost = float(self.estimator.total_ms(whole)), self.lost(group, widths[group])
        for width, total in zip(choices, totals, strict=True):
            if width != widths[group]:
                yield Move(
                    group=group,
                    width=width,
                    saved_ms=before - total,
                    lost=self.lost(group, width) - lost,
                )

    def _whole(self, widths: Mapping[str, int]) -> Cost:
        layers = range(len(self.estimator.structure.layers))
        found: Cost = np.sum([self.estimator.layer(index, widths) for index in layers], axis=0)
        return found

    def _costs(self, group: str, widths: Mapping[str, int]) -> Cost:
        """Costs of the layers that ``group`` is in, [choices, working sets + 1].

        Most changes of other groups do not touch those layers, so what was computed is kept.
        """
        key: tuple[str | int, ...] = (group, *(widths[name] for name in self._neighbours[group]))
        if key not in self._known:
            tried = ({**widths, group: width} for width in self.choices[group])
            self._known[key] = np.array([self._sum(group, each) for each in tried])
        return self._known[key]

    def _sum(self, group: str, widths: Mapping[str, int]) -> Cost:
        costs = [self.estimator.layer(index, widths) for index in self._readers[group]]
        return np.sum(costs, axis=0) if costs else np.zeros_like(self._whole(widths))


def _losses(group: Group) -> list[float]:
    """Sum of the n least scores, for every n."""
    if len(group.scores) != group.width:
        raise InputError(
            f"group {group.name!r} has {group.width} channels and {len(group.scores)} scores"
        )
    if not all(map(math.isfinite, group.scores)):
        raise NonFiniteError(f"group {group.name!r} has scores that are NaN or infinite")
    losses = [0.0]
    for score in sorted(group.scores):
        losses.append(losses[-1] + score)
    return losses


def _choices(group: Group, *, least_share: float) -> tuple[int, ...]:
    """Widths that ``group`` may have, largest first: multiples, and the one it has now."""
    least = max(group.multiple, math.ceil(least_share * group.width))
    many = math.ceil((group.width - least) / (group.multiple * _MOST_CHOICES))
    step = group.multiple * max(1, many)
    first = math.ceil(least / step) * step
    return (group.width, *reversed(range(first, group.width, step)))
