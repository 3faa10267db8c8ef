"""Latency of an engine against the float engine: interleaved rounds in one process.

Shared machines drift by more than the differences that matter. So both engines run in turn in one
process, each round gives one ratio, and the claim is the median of the ratios with its interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from equipoise import progress
from equipoise.data.store import Rows
from equipoise.measure.interval import Interval, median_interval
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import Session, SessionSettings
from equipoise.spec import Array

_BLOCK_S: Final = 0.004
"""A timed block lasts at least as long, so that the clock and the loop cost nothing beside it."""

_WARM_UP_S: Final = 0.15
_OPENINGS: Final = 4
_MOST_SAMPLES: Final = 64


Times = NDArray[np.float64]
"""[rounds, engines]: milliseconds per inference."""

Clock = Callable[[], float]
"""Seconds since some moment."""


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """What to measure.

    Attributes:
        engine: Engine file.
        baseline: Float engine file.
        runtime: Runtime of both.
        samples: Directory of inputs; up to 64 real samples take turns.
        rounds: Number of interleaved rounds.
        threads: Threads per operator.
        machine: Description of the machine, so that a result is never taken for another's.
    """

    engine: Path
    baseline: Path
    samples: Path
    machine: str
    runtime: str = "onnxruntime"
    rounds: int = 60
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class LatencyRecord:
    """What was measured, in milliseconds per inference.

    Attributes:
        engine_ms: Median of the engine.
        engine_p95_ms: 95th percentile over rounds.
        baseline_ms: Median of the float engine in the same rounds.
        speedup: Float latency / engine latency.
        rounds: Number of rounds.
    """

    engine_ms: float
    engine_p95_ms: float
    baseline_ms: float
    speedup: Interval
    rounds: int


def measure_latency(config: LatencyConfig, *, output: Path) -> LatencyRecord:  # noqa: ARG001
    """Measure ``config.engine`` against ``config.baseline``.

    Raises:
        InputError: The samples do not fit an engine.
    """
    rows = Rows(config.samples)
    samples = [rows[i] for i in range(min(len(rows), _MOST_SAMPLES))]
    engines = [
        EngineFile(file=file, runtime=config.runtime) for file in (config.baseline, config.engine)
    ]
    times = time_engines(engines, samples, threads=config.threads, rounds=config.rounds)
    return LatencyRecord(
        engine_ms=float(np.median(times[:, 1])),
        engine_p95_ms=float(np.quantile(times[:, 1], 0.95)),
        baseline_ms=float(np.median(times[:, 0])),
        speedup=median_interval(times[:, 0] / times[:, 1]),
        rounds=len(times),
    )


def time_engines(
    engines: Sequence[EngineFile],
    samples: Sequence[dict[str, Array]],
    *,
    threads: int,
    rounds: int,
) -> Times:
    """Time engines in interleaved rounds, opened anew four times, each time in another order.

    Where an engine lies in memory favours one of two equal engines by several per cent for as long
    as both are open; opening them again in turned order takes that out of the ratio.

    Args:
        engines: What to time.
        samples: Inputs that take turns.
        threads: Threads per operator.
        rounds: Number of rounds in all, at least four.

    Returns:
        float64 [rounds, engines]: milliseconds per inference.
    """
    settings = SessionSettings(threads=threads)
    parts = []
    for opening in range(_OPENINGS):
        order = range(len(engines)) if opening % 2 == 0 else reversed(range(len(engines)))
        with ExitStack() as stack:
            opened = {
                index: stack.enter_context(engines[index].session(settings)) for index in order
            }
            sessions = [opened[index] for index in range(len(engines))]
            count = rounds // _OPENINGS + (opening < rounds % _OPENINGS)
            parts.append(interleave(sessions, samples, rounds=count))
        progress.report(opening + 1, _OPENINGS)
    return np.concatenate(parts)


def interleave(
    sessions: Sequence[Session],
    samples: Sequence[dict[str, Array]],
    *,
    rounds: int,
    block_s: float = _BLOCK_S,
    clock: Clock | None = None,
) -> Times:
    """Time the sessions in turn on the same samples.

    Each round takes the next sample and runs every session on it, in an order that is turned round
    from one round to the next, so that neither always runs on the other's warm cache.

    Args:
        sessions: What to time.
        samples: Inputs that take turns.
        rounds: Number of rounds.
        block_s: A timed block lasts at least as long.
        clock: Reads the time; that on the wall when None.

    Returns:
        float64 [rounds, sessions]: milliseconds per inference.
    """
    clock = clock or time.perf_counter
    repeats = max(_warm_up(session, samples, block_s=block_s) for session in sessions)
    times = np.empty((rounds, len(sessions)))
    order = list(range(len(sessions)))
    for index in range(rounds):
        feeds = samples[index % len(samples)]
        for position in order:
            times[index, position] = _block_ms(
                sessions[position], feeds, repeats=repeats, clock=clock
            )
        order.reverse()
    return times


def _warm_up(session: Session, samples: Sequence[dict[str, Array]], *, block_s: float) -> int:
    """Run for a while; return how many runs make a block of useful length."""
    begin, runs = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < _WARM_UP_S or runs < len(samples):
        session.run(samples[runs % len(samples)])
        runs += 1
    return max(1, round(block_s * runs / passed))


def _block_ms(session: Session, feeds: dict[str, Array], *, repeats: int, clock: Clock) -> float:
    begin = clock()
    for _ in range(repeats):
        session.run(feeds)
    return (clock() - begin) * 1000 / repeats
