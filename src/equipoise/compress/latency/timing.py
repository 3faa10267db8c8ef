"""Timing many small engines, each as if it were a layer inside a model.

Three things make a layer slower or faster alone than inside of a model. Its weights lie in the
cache that repeated calls keep warm, where the other layers of a model would have pushed them out:
so the engines take turns, in cycles that read as many bytes as a model does; and of several sizes,
for a narrower model leaves more in the cache. Its input comes from memory, where the layer before
would have left it in the cache: so it is touched before each call. And the machine drifts: so every
engine is visited in every round, in another order each time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from equipoise import progress
from equipoise.measure.interval import Interval
from equipoise.measure.latency import Clock, Times
from equipoise.runtimes.protocol import Session
from equipoise.spec import Array

_CYCLES: Final = 4
"""Rounds on one order of engines."""

_FILLING: Final = 2
"""Cycles before them that are not kept: they fill the caches."""

_WARM_UP: Final = 3
_MOST_REPEATS: Final = 100
_BLOCK_MS: Final = 0.04
"""A timed block lasts about as long at least: the clock and the loop take a microsecond."""

_NORMAL_975: Final = 1.96


@dataclass(frozen=True, kw_only=True)
class Timed:
    """An engine to time.

    Attributes:
        session: The engine.
        feeds: Inputs that take turns.
        read_bytes: What a call reads: weights and inputs.
    """

    session: Session
    feeds: tuple[dict[str, Array], ...]
    read_bytes: int


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How long to time.

    Attributes:
        rounds: At most so many.
        least_rounds: At least so many.
        working_sets: Bytes that are read between two calls of one engine: all engines are timed
            with each.
        stable: Stop when no median is less certain than this share of it.
        least_ms: An interval narrower than this is certain enough, whatever its share.
        most_s: Stop after so many seconds, at the least rounds or later.
    """

    rounds: int = 30
    least_rounds: int = 12
    working_sets: tuple[int, ...] = (0,)
    stable: float = 0.03
    least_ms: float = 0.001
    most_s: float = 90.0


def time_in_turns(timed: Sequence[Timed], *, turns: Turns, clock: Clock | None = None) -> Times:
    """Time engines in turns.

    Returns:
        float64 [working sets, rounds, engines]: milliseconds per call.
    """
    stopwatch = _Stopwatch(timed, clock=clock or time.perf_counter)
    random, begin = np.random.default_rng(0), stopwatch.clock()
    rows, done = np.empty((len(turns.working_sets), 0, len(timed))), 0
    while done < turns.rounds:
        new = np.empty((len(rows), min(_CYCLES, turns.rounds - done), len(timed)))
        order = random.permutation(len(timed))
        for part, working_set in zip(new, turns.working_sets, strict=True):
            for chunk in _chunks(timed, order, working_set):
                stopwatch.fill(part, chunk, first=done)
        rows = np.concatenate([rows, new], axis=1)
        done = rows.shape[1]
        progress.report(done, turns.rounds)
        over = stopwatch.clock() - begin > turns.most_s or all(_is_stable(r, turns) for r in rows)
        if done >= turns.least_rounds and over:
            break
    progress.report(turns.rounds, turns.rounds)
    return rows


def _chunks(timed: Sequence[Timed], order: NDArray[np.int64], working_set: int) -> list[list[int]]:
    """``order`` in pieces that read ``working_set`` bytes each, as nearly as they can."""
    chunks: list[list[int]] = [[]]
    read = 0.0
    for index in map(int, order):
        each = timed[index].read_bytes
        if chunks[-1] and read + each / 2 > working_set:
            chunks.append([])
            read = 0.0
        chunks[-1].append(index)
        read += each
    if len(chunks) > 1 and read < working_set / 2:
        chunks[-2:] = [chunks[-2] + chunks[-1]]
    return chunks


class _Stopwatch:
    """Times blocks of calls, each long enough for the clock."""

    def __init__(self, timed: Sequence[Timed], *, clock: Clock) -> None:
        self.clock = clock
        self._timed = timed
        self._repeats = [self._enough(each) for each in timed]

    def _enough(self, timed: Timed) -> int:
        """How many calls make a block that is long enough."""
        blocks = [self._block_ms(timed, timed.feeds[0], repeats=1) for _ in range(2 * _WARM_UP)]
        usual = float(np.median(blocks[_WARM_UP:]))
        return max(1, round(_BLOCK_MS / max(usual, _BLOCK_MS / _MOST_REPEATS)))

    def fill(self, rows: Times, chunk: list[int], *, first: int) -> None:
        """Fill the columns ``chunk`` of ``rows``, after cycles that are not kept."""
        for cycle in range(-_FILLING, len(rows)):
            for index in chunk:
                timed = self._timed[index]
                feeds = timed.feeds[(first + cycle) % len(timed.feeds)]
                passed = self._block_ms(timed, feeds, repeats=self._repeats[index])
                if cycle >= 0:
                    rows[cycle, index] = passed

    def _block_ms(self, timed: Timed, feeds: dict[str, Array], *, repeats: int) -> float:
        for array in feeds.values():
            array[...] = array.copy()  # as if the layer before had just written it
        begin = self.clock()
        for _ in range(repeats):
            timed.session.run(feeds)
        return (self.clock() - begin) * 1000 / repeats


def _is_stable(rows: Times, turns: Turns) -> bool:
    low, middle, high = _ranks(rows)
    return bool(np.all(high - low <= np.maximum(turns.stable * middle, turns.least_ms)))


def median_of(rows: Times, *, less: float = 0.0) -> tuple[Interval, ...]:
    """The median of each column with its 95 % interval, ``less`` a constant and never below 0.

    Args:
        rows: float64 [rounds, engines], milliseconds.
        less: Milliseconds to take off.
    """
    bounds = (np.maximum(part - less, 0.0) for part in _ranks(rows))
    columns = zip(*bounds, strict=True)
    return tuple(
        Interval(value=float(middle), low=float(low), high=float(high))
        for low, middle, high in columns
    )


def _ranks(rows: Times) -> tuple[Times, Times, Times]:
    """Low end, median and high end of each column.

    The interval of a median by ranks, whatever the distribution (Conover, Practical Nonparametric
    Statistics, 1999, section 3.2): the binomial's normal approximation, rounded outward.
    """
    count = len(rows)
    ordered = np.sort(rows, axis=0)
    half = _NORMAL_975 * np.sqrt(count) / 2
    low = max(0, int(np.floor(count / 2 - half)) - 1)
    high = min(count - 1, int(np.ceil(count / 2 + half)))
    return ordered[low], np.median(ordered, axis=0), ordered[high]
