"""Leaving in float what must be, and spending the least time on it.

A node's harm is the noise that it makes when it alone is quantised; what its integers gain is
measured, with the borders to its neighbours. A knapsack over both says which nodes go back to float
for a budget of noise, and what the whole then makes of it corrects the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise.quantize.knapsack import Choice, fastest, worth_of_integers
from equipoise.quantize.nodes import FloatNode, connected
from equipoise.quantize.static import Prepared, written
from equipoise.quantize.sweeps import Judge, noise_power
from equipoise.quantize.timing import Timing
from equipoise.quantize.weighing import Timer, harms_of, weight_sizes
from equipoise.spec import Feeds

_MOST_SOLVED: Final = 12
"""Budgets that are tried; the models of most of them are the same."""

_NEAR: Final = 0.8
"""Noise from this share of the goal on is near enough to it."""

_BELOW: Final = 1 - 1e-6
"""A budget just below the noise of a choice rules that choice out."""

_TINY: Final = 1e-30


@dataclass(frozen=True, kw_only=True)
class Spared:
    """The quantised graph, and what was left in float for it.

    Attributes:
        model: ``onnx.ModelProto``.
        nodes: Nodes put back into float, with the reason.
        sqnr_db: Signal to noise of the worst output; None when nothing is lost.
        enough: Whether that is what was asked for.
        notes: What a user should know, in words.
    """

    model: Any
    nodes: tuple[FloatNode, ...]
    sqnr_db: float | None
    enough: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Sparing:
    """What is asked of the outputs, and how it is found out.

    Attributes:
        min_sqnr_db: Signal to noise that the worst output has to keep.
        budget_s: Time for the harm of nodes; those that time does not reach stay in integers.
        timer: Times the nodes.
    """

    min_sqnr_db: float
    budget_s: float
    timer: Timer

    @property
    def goal(self) -> float:
        """Most noise, as a share of the signal."""
        return noise_of(self.min_sqnr_db)


def noise_of(sqnr_db: float) -> float:
    """Noise as a share of the signal."""
    return float(10 ** (-sqnr_db / 10))


def is_enough(prepared: Prepared, *, judge: Judge, min_sqnr_db: float) -> bool:
    """Whether the outputs keep that with everything in integers: then no node has to be timed."""
    whole = _tried(prepared, prepared.placement.nodes, judge=judge)
    return whole.noise <= noise_of(min_sqnr_db)


def spare(prepared: Prepared, *, judge: Judge, asked: Sparing) -> Spared:
    """Quantise, and put nodes back into float until the outputs keep what is asked.

    Args:
        prepared: What to quantise.
        judge: Samples, and the float model's outputs on them.
        asked: How much, and how nodes are weighed.

    Raises:
        SourceError: ONNX Runtime refuses a model with some nodes in float.
    """
    whole = _tried(prepared, prepared.placement.nodes, judge=judge)
    if whole.noise <= asked.goal:
        return _spared(prepared, whole, harms={}, asked=asked)
    harms = harms_of(prepared, judge=judge, budget_s=asked.budget_s)
    timing = asked.timer(prepared, timed_samples(judge))
    search = _Search(prepared, judge, harms=harms, timing=timing, goal=asked.goal)
    return _spared(prepared, search.best(whole), harms=harms, asked=asked)


def timed_samples(judge: Judge) -> list[Feeds]:
    """Samples that nodes are timed on."""
    return [dict(feeds) for feeds in judge.feeds[:1]]


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A model that was made and judged."""

    integers: frozenset[str]
    model: Any
    noise: float
    sqnr_db: float | None


def _tried(prepared: Prepared, integers: frozenset[str], *, judge: Judge) -> _Tried:
    model = written(prepared, without=prepared.placement.nodes - integers)
    score = judge.rounding(model)
    return _Tried(integers=integers, model=model, noise=noise_power(score), sqnr_db=score.sqnr_db)


class _Search:
    """The fastest choice whose noise, measured, is within a goal.

    The noise of single nodes adds up to that of all of them but nearly. So a budget for the sum is
    searched between one that was too much and one that was little enough, by bisection.
    """

    def __init__(
        self,
        prepared: Prepared,
        judge: Judge,
        *,
        harms: Mapping[str, float],
        timing: Timing,
        goal: float,
    ) -> None:
        self._prepared, self._judge = prepared, judge
        self._harms, self._model, self._goal = harms, timing.model, goal
        self._worth = worth_of_integers(
            weight_sizes(prepared),
            {name: times.spread_ms for name, times in timing.nodes.items()},
            float_ms=timing.model.predict_ms(()),
        )

    def best(self, whole: _Tried) -> _Tried:
        """The fastest within the goal of those that were tried; the least noisy if none is."""
        tried = {whole.integers: whole}
        low, high = 0.0, math.fsum(self._harms.values())
        budget = high * self._goal / whole.noise
        for _ in range(_MOST_SOLVED):
            choice = self._choice(budget)
            noise = self._judged(choice, tried).noise
            if noise > self._goal:
                high = min(high, choice.noise)
            elif noise >= _NEAR * self._goal:
                break
            else:
                low = max(low, budget)
            budget = self._next(low, high, scaled=choice.noise * self._goal / max(noise, _TINY))
        if all(one.noise > self._goal for one in tried.values()):
            self._judged(self._choice(0.0), tried)
        return min(tried.values(), key=self._rank)

    def _choice(self, budget: float) -> Choice:
        """Nobody gains from being faster than everything in integers: then few leave them."""
        return fastest(
            self._model,
            self._harms,
            most_noise=budget,
            worth_ms=self._worth,
            least_ms=self._model.predict_ms(self._prepared.placement.nodes),
        )

    def _judged(self, choice: Choice, tried: dict[frozenset[str], _Tried]) -> _Tried:
        if choice.integers not in tried:
            tried[choice.integers] = _tried(self._prepared, choice.integers, judge=self._judge)
        return tried[choice.integers]

    def _next(self, low: float, high: float, *, scaled: float) -> float:
        """A budget between one that was little enough and one that was too much.

        It is the one that the noise of the last choice, scaled, says; the middle where that lies
        outside.
        """
        if low < scaled < high * _BELOW:
            return scaled
        return math.sqrt(low * high) if low > 0 else high / 2

    def _rank(self, one: _Tried) -> tuple[float, float, float]:
        if one.noise > self._goal:
            return one.noise, 0.0, 0.0
        least_ms = self._model.predict_ms(self._prepared.placement.nodes)
        milliseconds = max(self._model.predict_ms(one.integers), least_ms)
        worth = math.fsum(self._worth[name] for name in one.integers)
        return 0.0, milliseconds - worth, one.noise


def _spared(
    prepared: Prepared,
    best: _Tried,
    *,
    harms: Mapping[str, float],
    asked: Sparing,
) -> Spared:
    enough = best.noise <= asked.goal
    notes = _notes(prepared, harms, enough=enough, min_sqnr_db=asked.min_sqnr_db)
    return Spared(
        model=best.model,
        nodes=_told(prepared, best.integers, harms),
        sqnr_db=best.sqnr_db,
        enough=enough,
        notes=notes if harms else (),
    )


def _told(
    prepared: Prepared, integers: frozenset[str], harms: Mapping[str, float]
) -> tuple[FloatNode, ...]:
    """The nodes that were put into float, the most harmful first; not those that followed them."""
    operators = {str(node.name): str(node.op_type) for node in prepared.model.graph.node}
    out = [n for n, harm in harms.items() if n not in integers and harm > 0]
    return tuple(
        FloatNode(
            name=name,
            operator=operators[name],
            reason=f"alone it would leave the outputs {-10 * np.log10(harms[name]):.1f} dB",
        )
        for name in sorted(out, key=lambda name: -harms[name])
        if name in connected(prepared.model, integers | {name})
    )


def _notes(
    prepared: Prepared, harms: Mapping[str, float], *, enough: bool, min_sqnr_db: float
) -> tuple[str, ...]:
    notes = []
    unmeasured = len(prepared.placement.nodes) - len(harms)
    if unmeasured:
        notes.append(f"time ran out before {unmeasured} nodes were measured: give a larger budget")
    if not enough:
        whatever = "" if unmeasured else " whatever is left in float"
        notes.append(f"the outputs keep less than {min_sqnr_db:g} dB{whatever}")
    return tuple(notes)
