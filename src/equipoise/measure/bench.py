"""Latency of engines side by side, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise import progress
from equipoise.measure.glimpse import look
from equipoise.measure.interval import Interval, clustered_interval
from equipoise.measure.latency import Times, openings_of, shared, timed_openings
from equipoise.measure.steadiness import Steadiness, judge
from equipoise.measure.stopping import medians
from equipoise.runtimes.engine import EngineFile
from equipoise.spec import Array

_TOLERANCE: Final = 0.02
"""The smallest change of the first engine's own times that is worth a word."""


@dataclass(frozen=True, kw_only=True)
class BenchRecord:
    """What was measured.

    Attributes:
        engine: Engine file.
        threads: Threads per operator.
        latency_ms: With its 95 % interval over openings, milliseconds per inference: the median of
            each opening, and of those the trimmed mean.
        p95_ms: 95th percentile over rounds.
        rounds: Number of rounds.
        speedup: Latency of the first engine / latency of this one, in the same way; None for the
            first.
        drift: Whether the machine was steady meanwhile; the same for all engines.
    """

    engine: str
    threads: int
    latency_ms: Interval
    p95_ms: float
    rounds: int
    speedup: Interval | None
    drift: Steadiness


def bench(
    engines: Sequence[EngineFile],
    samples: Sequence[dict[str, Array]],
    *,
    threads: int,
    rounds: int,
) -> tuple[BenchRecord, ...]:
    """Time engines in interleaved rounds; the first is what the others are compared with.

    Args:
        engines: What to time.
        samples: Inputs that take turns.
        threads: Threads per operator.
        rounds: Number of rounds, at least 4: shared among 8 openings, or 4 if fewer than 16.

    Raises:
        UsageError: There are fewer rounds.
        InputError: The samples do not fit an engine.
    """
    shares = shared(rounds, openings_of(rounds))
    openings, seen = list[Times](), [look()]
    timed = timed_openings(engines, samples, threads=[threads] * len(engines), rounds=shares)
    for times in progress.track(timed, total=len(shares)):
        openings.append(times)
        seen.append(look())
    drift = judge(seen, medians(openings, 0), threads=threads, tolerance=_TOLERANCE)
    return tuple(
        _record(openings, index, file=str(engine.file), threads=threads, drift=drift)
        for index, engine in enumerate(engines)
    )


def _record(
    openings: Sequence[Times], index: int, *, file: str, threads: int, drift: Steadiness
) -> BenchRecord:
    times = np.concatenate(openings)
    ratios = np.array([np.median(part[:, 0] / part[:, index]) for part in openings])
    return BenchRecord(
        engine=file,
        threads=threads,
        latency_ms=clustered_interval(medians(openings, index)),
        p95_ms=float(np.quantile(times[:, index], 0.95)),
        rounds=len(times),
        speedup=clustered_interval(ratios) if index else None,
        drift=drift,
    )
