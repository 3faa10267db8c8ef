"""Which widths reach a speed-up at least loss of importance.

Each group of channels may keep any multiple that its target likes. A cut is worth what it loses per
millisecond saved, and milliseconds fall in steps: a narrower layer saves nothing until it crosses
one. So every width of a group is looked at, not the next one alone, and a cut that saves nothing is
never taken by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from equipoise.compress.latency.costs import Costs, Move
from equipoise.compress.latency.estimate import Estimator
from equipoise.compress.structure import Layer, Structure
from equipoise.errors import NotMetError, UsageError

Scope = Literal["global", "per-layer"]
"""Whether groups compete for what is kept, or each keeps the same share."""

_PAYS: Final = 1e-4
"""Share of the whole latency that a cut has to save to count as saving anything."""

_ROUNDING: Final = 1e-9
_MOST_SWAPS: Final = 200
_WINDOW: Final = 6
"""Widths above and below that are looked at when two groups exchange channels."""

_NAMED: Final = 3


@dataclass(frozen=True, kw_only=True)
class Step:
    """One change of a width.

    Attributes:
        group: Its group.
        before: Channels before.
        after: Channels after.
        saved_ms: Estimated milliseconds that it saved; negative where channels were given back.
        lost_score: Score that it removed; negative where channels were given back.
    """

    group: str
    before: int
    after: int
    saved_ms: float
    lost_score: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Chosen widths.

    Attributes:
        widths: Group -> channels to keep.
        estimated_ms: Estimated latency.
        estimated_speedup: Estimated latency of the estimator's structure at full width over it.
        removed_score: Sum of the scores that go.
        steps: What was changed, in order.
    """

    widths: dict[str, int]
    estimated_ms: float
    estimated_speedup: float
    removed_score: float
    steps: tuple[Step, ...]


def allocate(
    structure: Structure,
    estimator: Estimator,
    *,
    speedup: float,
    scope: Scope = "global",
    least_share: float = 0.1,
) -> Allocation:
    """Choose the width of each group so that the estimate reaches ``speedup``.

    The global scope is a knapsack: the cut that loses least per millisecond, again and again, from
    the full widths; and channels given back, from the fastest widths; each then bettered by
    exchanges between two groups. The one that loses less is taken.

    Args:
        structure: Groups with scores and the widths that they have now, which may be narrower than
            those of the estimator.
        estimator: Estimates milliseconds.
        speedup: Latency of the estimator's structure at full width over that of the result.
        scope: ``global``, or ``per-layer``: the same share of every group, rounded to multiples.
        least_share: No group keeps a smaller share of what it has now.

    Raises:
        UsageError: ``speedup`` is not above 1, ``least_share`` is out of range, or a group is not
            one of the estimator's.
        NotMetError: No widths reach it; it says how far they get and which layers take the time.
        InputError: A group has not one score per channel.
        NonFiniteError: A score is NaN or infinite.
    """
    if not (math.isfinite(speedup) and speedup > 1):
        raise UsageError(f"a speed-up of {speedup} cannot be asked for; it has to be above 1")
    costs = Costs(structure, estimator, least_share=least_share)
    goal_ms = estimator.full_ms / speedup * (1 + _ROUNDING)
    lowest = _lowest(costs)
    if lowest.ms > goal_ms:
        raise _unreachable(costs, lowest, speedup=speedup)
    ways = {"global": _global, "per-layer": _per_layer}
    return ways[scope](costs, lowest, goal_ms).allocation()


class _Path:
    """Widths, and how they came about."""

    def __init__(self, costs: Costs, steps: tuple[Step, ...] = ()) -> None:
        self.costs, self.steps = costs, steps
        self.widths = dict(costs.full)
        self.widths.update({step.group: step.after for step in steps})
        self.ms = costs.latency_ms(self.widths)
        self.lost = costs.total_lost(self.widths)

    def then(self, *moves: Move) -> _Path:
        """This path with ``moves``, each worth what it is once those before it are made."""
        path = self
        for move in moves:
            widths = {**path.widths, move.group: move.width}
            step = Step(
                group=move.group,
                before=path.widths[move.group],
                after=move.width,
                saved_ms=path.ms - self.costs.latency_ms(widths),
                lost_score=self.costs.total_lost(widths) - path.lost,
            )
            path = _Path(self.costs, (*path.steps, step))
        return path

    def allocation(self) -> Allocation:
        full_ms = self.costs.estimator.full_ms
        return Allocation(
            widths=self.widths,
            estimated_ms=self.ms,
            estimated_speedup=full_ms / self.ms,
            removed_score=self.lost,
            steps=self.steps,
        )


def _lowest(costs: Costs) -> _Path:
    """The fastest widths that are found, from the least ones or from the full ones."""
    full = _Path(costs)
    least = [
        Move(group=group, width=choices[-1], saved_ms=0.0, lost=0.0)
        for group, choices in costs.choices.items()
        if choices[-1] != full.widths[group]
    ]
    return min((_faster(full.then(*least)), _faster(full)), key=lambda path: (path.ms, path.lost))


def _faster(path: _Path) -> _Path:
    """Changes of one group as long as one saves time, most first."""
    while True:
        moves = [m for m in path.costs.moves(path.widths) if m.saved_ms > path.ms * _ROUNDING]
        if not moves:
            return path
        path = path.then(max(moves, key=lambda move: (move.saved_ms, -move.lost)))


def _global(costs: Costs, lowest: _Path, goal_ms: float) -> _Path:
    ends = [
        _bettered(path, goal_ms) for path in (*_cut(costs, goal_ms), _given_back(lowest, goal_ms))
    ]
    return min(ends, key=lambda path: path.lost)


def _cut(costs: Costs, goal_ms: float) -> list[_Path]:
    """From the full widths: the best cuts until the goal, ended by the best last cut of any."""
    path, ends = _Path(costs), []
    pays = costs.estimator.full_ms * _PAYS
    while path.ms > goal_ms:
        moves = [move for move in _narrower(path) if move.saved_ms > 0]
        enough = [move for move in moves if path.ms - move.saved_ms <= goal_ms]
        if enough:
            ends.append(path.then(min(enough, key=lambda m: (m.lost, -m.saved_ms))))
        moves = [move for move in moves if move.saved_ms > pays]
        if not moves:
            return _least(ends)
        path = path.then(min(moves, key=lambda m: (m.lost / m.saved_ms, -m.saved_ms)))
    return _least([*ends, path])


def _narrower(path: _Path) -> list[Move]:
    moves = path.costs.moves(path.widths)
    return [move for move in moves if move.width < path.widths[move.group]]


def _least(paths: list[_Path]) -> list[_Path]:
    return sorted(paths, key=lambda path: path.lost)[:2]


def _given_back(path: _Path, goal_ms: float) -> _Path:
    """From fast widths: channels given back, most score per millisecond first, within the goal."""
    while True:
        slack = goal_ms - path.ms
        moves = [m for m in path.costs.moves(path.widths) if m.lost < 0 and -m.saved_ms <= slack]
        if not moves:
            return path
        path = path.then(max(moves, key=_back_per_ms))


def _back_per_ms(move: Move) -> tuple[bool, float]:
    """What is free comes first, the most of it; then the most score per millisecond."""
    if move.saved_ms >= 0:
        return True, -move.lost
    return False, move.lost / move.saved_ms


def _bettered(path: _Path, goal_ms: float) -> _Path:
    """Channels given back where there is room, and exchanged between two groups, while it pays."""
    for _ in range(_MOST_SWAPS):
        path = _given_back(path, goal_ms)
        better = _exchange(path, goal_ms)
        if better is None:
            return path
        path = better
    return path


def _exchange(path: _Path, goal_ms: float) -> _Path | None:
    """The exchange between two groups that wins most score within the goal; None if none does."""
    least = -_ROUNDING * (1 + abs(path.lost))
    found: tuple[Move, Move] | None = None
    near = [move for move in path.costs.moves(path.widths) if _is_near(path, move)]
    for up in sorted((move for move in near if move.lost < 0), key=lambda move: move.lost):
        for down in _that_pay_for(up, near, path=path, goal_ms=goal_ms, most_lost=least - up.lost):
            if up.lost + down.lost < least:
                found, least = (up, down), up.lost + down.lost
    return path.then(*reversed(found)) if found else None


def _that_pay_for(
    up: Move, near: Iterable[Move], *, path: _Path, goal_ms: float, most_lost: float
) -> list[Move]:
    """Moves of other groups that lose less than ``most_lost`` and reach the goal after ``up``."""
    cheap = {
        (move.group, move.width)
        for move in near
        if move.group != up.group and move.lost < most_lost
    }
    widths = {**path.widths, up.group: up.width}
    over_ms = path.ms - up.saved_ms - goal_ms
    after = path.costs.moves(widths, groups=dict.fromkeys(group for group, _ in sorted(cheap)))
    return [m for m in after if (m.group, m.width) in cheap and m.saved_ms >= over_ms]


def _is_near(path: _Path, move: Move) -> bool:
    """Whether it is a change by a few multiples."""
    multiple = path.costs.groups[move.group].multiple
    return abs(move.width - path.widths[move.group]) <= _WINDOW * multiple


def _per_layer(costs: Costs, lowest: _Path, goal_ms: float) -> _Path:
    """The largest share, the same of every group, at which the goal is reached."""
    shares = {w / costs.full[g] for g, choices in costs.choices.items() for w in choices}
    for share in sorted(shares, reverse=True):
        path = _Path(costs)
        for group, choices in costs.choices.items():
            width = _nearest(choices, share * costs.full[group])
            if width != costs.full[group]:
                path = path.then(Move(group=group, width=width, saved_ms=0.0, lost=0.0))
        if path.ms <= goal_ms:
            return path
    return _given_back(lowest, goal_ms)  # no even one reaches it, but an uneven one does


def _nearest(choices: tuple[int, ...], wanted: float) -> int:
    """The largest choice up to ``wanted``; the least where none is."""
    return next((width for width in choices if width <= wanted + _ROUNDING), choices[-1])


def _unreachable(costs: Costs, lowest: _Path, *, speedup: float) -> NotMetError:
    estimator = costs.estimator
    times = estimator.layers_ms(lowest.widths)
    slowest = sorted(times, key=lambda name: -times[name])[:_NAMED]
    named = ", ".join(f"{name} {times[name]:.3f} ms" for name in slowest)
    fixed = sum(times[layer.name] for layer in estimator.structure.layers if _is_fixed(layer))
    best = estimator.full_ms / lowest.ms
    return NotMetError(
        f"a speed-up of {speedup:.2f} cannot be reached: the narrowest widths are estimated at"
        f" {lowest.ms:.3f} of {estimator.full_ms:.3f} ms, a speed-up of {best:.2f}; layers that"
        f" cannot be made narrower take {fixed / lowest.ms:.0%} of it; the slowest are {named}",
        hint=f"Ask for at most {math.floor(best * 100) / 100:.2f}, let groups keep a smaller share,"
        " or drop whole layers.",
    )


def _is_fixed(layer: Layer) -> bool:
    return not layer.input_group and not layer.output_group
