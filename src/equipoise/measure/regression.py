"""Has an engine become slower than it was when it was locked? A test with stated errors.

What is compared is the log of (latency of the engine / latency of the float engine), both timed in
interleaved rounds of one process: a machine that is slower today slows both. Whatever disturbs a
run makes it longer, so the least of several short blocks, of every sample, is what an engine takes
undisturbed (Chen and Revels, Robust benchmarking in noisy environments, 2016). An engine of one
thread on the CPU is timed in CPU time: a neighbour who takes the core away takes none of it.

Where the two engines lie in memory, and which was opened first, moves their ratio by a per cent or
more for as long as they are open. More rounds do not help; so they are opened anew many times, with
few rounds each, in both orders. A *pair* of openings, one in each order, is the unit of noise.

The mean of the pairs then and the mean of the pairs now are compared with Yuen's test: means
without the fifth at either end, whose variance comes from the winsorized pairs, and Welch's degrees
of freedom (Yuen, Biometrika 61, 1974, 165-170). A neighbour who wakes up during an opening spoils
that opening and no more. It is measured until the interval lies on one side of
``c = log(1 + slowdown) / 2``, half-way between no change and the slow-down to be seen: below, the
engine is as fast as it was; above, slower. So either error needs the estimate to be off by half the
slow-down. Where the noise leaves it open after the last opening, it is slower if the estimate is
above ``c`` and above no change at 99 %: a noisy machine sees less, and cries wolf no more often.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from equipoise import fs, progress, record
from equipoise.data.store import Rows
from equipoise.errors import BackendError, UsageError
from equipoise.isolation import run_isolated
from equipoise.measure.interval import Estimate, student_t, trimmed_mean
from equipoise.measure.latency import interleave
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array

SLOWDOWN: Final = 0.05
ROUNDS: Final = 24
LOCK_PAIRS: Final = (16, 48)
CHECK_PAIRS: Final = (8, 32)
"""Pairs of openings: at first, and at most."""

_STOP: Final = 0.995
_ALARM: Final = 0.99
_SEEN: Final = 0.95
_FEWEST_PAIRS: Final = 4
_PAIRS_OF_A_PROCESS: Final = 4
_LOCK_SHARE: Final = 6.0
_MOST_SAMPLES: Final = 4
_BLOCK_S: Final = 0.0005
"""Short beside the time that a scheduler lets another process run."""

_ON_DEVICES: Final = {"tensorrt", "tensorrt-rtx"}
_CPU_PROVIDERS: Final = {(), ("CPUExecutionProvider",), ("CPU",)}
_TIME_LIMIT_S: Final = 3600.0


ClockName = Literal["cpu", "wall"]


@dataclass(frozen=True, kw_only=True)
class OpeningsConfig:
    """What to time.

    Attributes:
        engine: The engine.
        baseline: The float engine.
        samples: Directory of inputs; up to 4 of them, evenly spread, take turns.
        pairs: How often to open both in either order.
        rounds: Interleaved rounds of each opening.
        threads: Threads per operator.
        clock: What is read: the time on the wall, or the CPU time of the process.
    """

    engine: EngineFile
    baseline: EngineFile
    samples: Path
    pairs: int = _PAIRS_OF_A_PROCESS
    rounds: int = ROUNDS
    threads: int = 1
    clock: ClockName = "cpu"


@dataclass(frozen=True, kw_only=True)
class Openings:
    """What was timed, opening by opening: the float engine first, the engine first, and so on.

    Attributes:
        log_ratios: log(engine / float engine).
        engine_ms: Of the engine, milliseconds per inference: the mean over samples of the least.
        baseline_ms: Of the float engine.
    """

    log_ratios: tuple[float, ...] = ()
    engine_ms: tuple[float, ...] = ()
    baseline_ms: tuple[float, ...] = ()

    def __add__(self, other: Openings) -> Openings:
        return Openings(
            log_ratios=self.log_ratios + other.log_ratios,
            engine_ms=self.engine_ms + other.engine_ms,
            baseline_ms=self.baseline_ms + other.baseline_ms,
        )


@dataclass(frozen=True, kw_only=True)
class Change:
    """How the latency ratio has changed: 0.05 is 5 % slower than it was.

    Attributes:
        value: Estimate.
        low: At least so much, at 99.5 %.
        high: At most so much, at 99.5 %.
        sees: The smallest slow-down that this many openings, as noisy as these, show in 95 of 100.
        openings: How often both engines were opened.
        state: ``undecided`` while ``low`` and ``high`` lie on either side of half the slow-down.
    """

    value: float
    low: float
    high: float
    sees: float
    openings: int
    state: Literal["same", "slower", "undecided"]


Measure = Callable[[int], Openings]
"""Times so many pairs of openings more."""


def estimate(log_ratios: Sequence[float]) -> Estimate:
    """The trimmed mean over pairs of openings.

    Args:
        log_ratios: One value per opening, the two of a pair side by side; at least 4 pairs.

    Raises:
        UsageError: There are fewer, an odd number, or one is not finite.
    """
    values = np.asarray(log_ratios, dtype=np.float64)
    if len(values) % 2 or len(values) < 2 * _FEWEST_PAIRS or not np.isfinite(values).all():
        raise UsageError(
            f"{len(values)} openings of an engine; needed are pairs, at least {_FEWEST_PAIRS}, of"
            " finite ratios"
        )
    return trimmed_mean(values.reshape(-1, 2).mean(1))


def change(
    locked: Sequence[float], now: Sequence[float], *, slowdown: float = SLOWDOWN, last: bool = False
) -> Change:
    """Compare the log ratios of the openings then and now.

    Args:
        locked: Log ratios per opening when it was locked.
        now: The same now.
        slowdown: The slow-down that has to be seen; 0.05 is 5 %.
        last: Whether nothing more will be measured, so that a verdict is needed.

    Raises:
        UsageError: As :func:`estimate`, or ``slowdown`` is not above 0.
    """
    if not 0 < slowdown < math.inf:
        raise UsageError(f"the slow-down to be seen is {slowdown}; it must be above 0")
    before, after = estimate(locked), estimate(now)
    moved = after.mean - before.mean
    error, degrees = _error(before, after)
    stop, alarm, seen = (student_t(p, degrees=degrees) * error for p in (_STOP, _ALARM, _SEEN))
    half = math.log1p(slowdown) / 2
    state: Literal["same", "slower", "undecided"] = "undecided"
    if last or abs(moved - half) > stop:
        state = "slower" if moved > (max(half, alarm) if last else half) else "same"
    return Change(
        value=math.expm1(moved),
        low=math.expm1(moved - stop),
        high=math.expm1(moved + stop),
        sees=math.expm1(max(half, alarm) + seen),
        openings=len(now),
        state=state,
    )


def _error(before: Estimate, after: Estimate) -> tuple[float, float]:
    """Standard error of the difference, and its degrees of freedom by Welch and Satterthwaite."""
    total = before.variance + after.variance
    if total == 0.0:
        return 0.0, before.degrees + after.degrees
    shares = before.variance**2 / before.degrees + after.variance**2 / after.degrees
    return math.sqrt(total), total**2 / shares


def watch(
    locked: Sequence[float],
    measure: Measure,
    *,
    slowdown: float = SLOWDOWN,
    pairs: tuple[int, int] = CHECK_PAIRS,
) -> tuple[Change, Openings]:
    """Measure until the interval decides, or ``pairs`` are used up.

    Args:
        locked: Log ratios per opening when it was locked.
        measure: Times some more pairs of openings.
        slowdown: The slow-down that has to be seen.
        pairs: To begin with, and at most.
    """
    first, most = pairs
    found = measure(first)
    while True:
        last = len(found.log_ratios) >= 2 * most
        verdict = change(locked, found.log_ratios, slowdown=slowdown)
        if verdict.state != "undecided":
            return verdict, found
        if last:
            return change(locked, found.log_ratios, slowdown=slowdown, last=True), found
        found += measure(min(_PAIRS_OF_A_PROCESS, most - len(found.log_ratios) // 2))


def settle(
    measure: Measure, *, slowdown: float = SLOWDOWN, pairs: tuple[int, int] = LOCK_PAIRS
) -> Openings:
    """Measure for a lock: until its own error is a sixth of half the slow-down, or to the cap.

    A lock is measured once and compared with often: what it is off by is in every comparison.
    """
    first, most = pairs
    found = measure(first)
    target = math.log1p(slowdown) / 2 / _LOCK_SHARE
    while len(found.log_ratios) < 2 * most:
        if math.sqrt(estimate(found.log_ratios).variance) <= target:
            break
        found += measure(min(_PAIRS_OF_A_PROCESS, most - len(found.log_ratios) // 2))
    return found


def clock_for(engine: EngineFile, *, threads: int) -> ClockName:
    """CPU time where one thread of a CPU does it all; else that would say nothing of waiting."""
    alone = threads == 1 and engine.providers in _CPU_PROVIDERS
    return "cpu" if alone and engine.runtime not in _ON_DEVICES else "wall"


def in_children(config: OpeningsConfig) -> Measure:
    """A measure that opens the engines of ``config`` in a new process for every four pairs."""

    def measure(pairs: int) -> Openings:
        found = Openings()
        while (left := pairs - len(found.log_ratios) // 2) > 0:
            found += _in_child(config, pairs=min(left, _PAIRS_OF_A_PROCESS))
        return found

    return measure


def _in_child(config: OpeningsConfig, *, pairs: int) -> Openings:
    with fs.scratch_directory() as folder:
        text = run_isolated(
            f"{__name__}:time_openings",
            replace(config, pairs=pairs),
            output=folder,
            on_progress=progress.report,
            time_limit_s=_TIME_LIMIT_S,
        )
    return record.loads(Openings, text, where="openings", error=BackendError)


def time_openings(config: OpeningsConfig, *, output: Path) -> Openings:  # noqa: ARG001
    """Time ``config.engine`` and ``config.baseline`` in this process.

    Raises:
        InputError: The samples do not fit an engine.
    """
    samples = _samples(Rows(config.samples))
    found = Openings()
    for opening in range(2 * config.pairs):
        found += _opening(config, samples, engine_first=bool(opening % 2))
        progress.report(opening + 1, 2 * config.pairs)
    return found


def _samples(rows: Rows) -> list[dict[str, Array]]:
    """The same few samples every time, from the first to the last: lengths may differ."""
    count = min(len(rows), _MOST_SAMPLES)
    return [rows[int(index)] for index in np.linspace(0, len(rows) - 1, count).round()]


def _opening(
    config: OpeningsConfig, samples: Sequence[dict[str, Array]], *, engine_first: bool
) -> Openings:
    settings = SessionSettings(threads=config.threads)
    order = [1, 0] if engine_first else [0, 1]
    engines = (config.baseline, config.engine)
    with ExitStack() as stack:
        opened = {index: stack.enter_context(engines[index].session(settings)) for index in order}
        times = interleave(
            [opened[0], opened[1]],
            samples,
            rounds=config.rounds,
            block_s=_BLOCK_S,
            settle_s=0.0,  # of many times the least counts
            clock=time.process_time if config.clock == "cpu" else None,
        )
    least = [times[start :: len(samples)].min(0) for start in range(min(len(samples), len(times)))]
    baseline_ms, engine_ms = (float(value) for value in np.mean(least, axis=0))
    return Openings(
        log_ratios=(round(math.log(engine_ms / baseline_ms), 6),),
        engine_ms=(round(engine_ms, 6),),
        baseline_ms=(round(baseline_ms, 6),),
    )
