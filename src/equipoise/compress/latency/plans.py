"""Ways to make a transformer as fast as asked: fewer layers, narrower ones, or both.

How much it hurts to take out a layer beside a quarter of the feed-forward width no score says; one
pass over data does. So the ways that reach the goal are listed, and whoever prunes tries each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from equipoise.compress.latency.estimate import Estimator
from equipoise.compress.structure import Structure
from equipoise.errors import NotMetError, UsageError

SHARES: Final = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
_MOST_COMBINATIONS: Final = 200_000
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What may be combined.

    Attributes:
        blocks: Numbers of transformer layers to keep; empty where there are none.
        widths: Group -> its widths.
    """

    blocks: tuple[int, ...]
    widths: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to reach the goal.

    Attributes:
        blocks: Transformer layers to keep; None where the model has none.
        widths: Group -> channels to keep.
        estimated_ms: Estimated latency.
        estimated_speedup: Estimated latency at full width over it.
    """

    blocks: int | None
    widths: dict[str, int]
    estimated_ms: float
    estimated_speedup: float


def choices_of(structure: Structure, *, shares: Sequence[float] = SHARES) -> Choices:
    """Every number of layers, and each group at ``shares`` of its width, rounded to multiples.

    Raises:
        UsageError: A share is not above 0 and at most 1.
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UsageError(f"shares are {tuple(shares)}; each has to be above 0 and at most 1")
    blocks = len({layer.block for layer in structure.layers if layer.block >= 0})
    widths = {}
    for group in structure.groups:
        steps = {max(1, round(share * group.width / group.multiple)) for share in shares}
        rounded = {min(group.width, step * group.multiple) for step in steps}
        widths[group.name] = tuple(sorted(rounded | {group.width}, reverse=True))
    return Choices(blocks=tuple(range(blocks, 0, -1)), widths=widths)


def plans(
    structure: Structure,
    estimator: Estimator,
    *,
    speedup: float,
    choices: Choices | None = None,
) -> tuple[Plan, ...]:
    """The combinations that reach ``speedup`` and of which nothing more can be kept.

    A plan is left out where another one that reaches the goal keeps as many layers and as much of
    every group.

    Args:
        structure: Groups with the widths that they have now.
        estimator: Estimates milliseconds.
        speedup: Latency of the estimator's structure at full width over that of a plan.
        choices: What may be combined; :func:`choices_of` when None.

    Returns:
        Plans, the one nearest to the goal first.

    Raises:
        UsageError: ``speedup`` is not above 1, there are too many combinations, or a choice is none
            of this model's.
        NotMetError: No combination reaches it; it says how far they get.
    """
    if not (math.isfinite(speedup) and speedup > 1):
        raise UsageError(f"a speed-up of {speedup} cannot be asked for; it has to be above 1")
    found = [
        Plan(
            blocks=blocks,
            widths=widths,
            estimated_ms=(ms := estimator.latency_ms(widths, blocks=blocks)),
            estimated_speedup=estimator.full_ms / ms,
        )
        for blocks, widths in _combinations(structure, choices or choices_of(structure))
    ]
    enough = [plan for plan in found if plan.estimated_speedup >= speedup * (1 - _ROUNDING)]
    if not enough:
        raise _unreachable(found, speedup=speedup)
    return tuple(sorted(_undominated(enough), key=lambda plan: -plan.estimated_ms))


def _combinations(
    structure: Structure, choices: Choices
) -> Iterable[tuple[int | None, dict[str, int]]]:
    """Blocks and widths; the groups that ``choices`` do not name keep the width they have now."""
    now = {group.name: group.width for group in structure.groups}
    names = list(choices.widths)
    count = math.prod(map(len, [choices.blocks or (0,), *choices.widths.values()]))
    if not 0 < count <= _MOST_COMBINATIONS:
        raise UsageError(
            f"{count} combinations of layers and widths; from 1 to {_MOST_COMBINATIONS:,} can be"
            " looked at",
            hint="Name fewer groups or widths, or use allocate() for many groups.",
        )
    for blocks in choices.blocks or (None,):
        for widths in itertools.product(*choices.widths.values()):
            yield blocks, {**now, **dict(zip(names, widths, strict=True))}


def _undominated(found: Sequence[Plan]) -> list[Plan]:
    """The plans of which no other keeps as much of everything.

    What keeps as much of everything has as large a sum, so that only those before it are looked at.
    """
    kept: list[Plan] = []
    for plan in sorted(found, key=lambda plan: -sum(_held(plan))):
        if not any(_covers(other, plan) for other in kept):
            kept.append(plan)
    return kept


def _held(plan: Plan) -> tuple[int, ...]:
    return (plan.blocks or 0, *plan.widths.values())


def _covers(one: Plan, other: Plan) -> bool:
    return all(a >= b for a, b in zip(_held(one), _held(other), strict=True))


def _unreachable(found: Sequence[Plan], *, speedup: float) -> NotMetError:
    fastest = min(found, key=lambda plan: plan.estimated_ms)
    kept = [f"{name} {width}" for name, width in fastest.widths.items()]
    layers = [] if fastest.blocks is None else [f"{fastest.blocks} layers"]
    return NotMetError(
        f"a speed-up of {speedup:.2f} cannot be reached: the fastest combination"
        f" ({', '.join([*layers, *kept])}) is estimated at {fastest.estimated_ms:.3f} ms, a"
        f" speed-up of {fastest.estimated_speedup:.2f}",
        hint="Ask for less, or let fewer layers or narrower groups be chosen.",
    )
