"""Latency of engines side by side, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.measure.interval import Interval, median_interval
from equipoise.measure.latency import time_engines
from equipoise.runtimes.engine import EngineFile
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class BenchRecord:
    """What was measured.

    Attributes:
        engine: Engine file.
        threads: Threads per operator.
        latency_ms: Median with its 95 % interval over rounds, milliseconds per inference.
        p95_ms: 95th percentile over rounds.
        rounds: Number of rounds.
        speedup: Latency of the other engine / latency of this one; None without another.
    """

    engine: str
    threads: int
    latency_ms: Interval
    p95_ms: float
    rounds: int
    speedup: Interval | None


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
        rounds: Number of rounds.
    """
    times = time_engines(engines, samples, threads=threads, rounds=rounds)
    return tuple(
        BenchRecord(
            engine=str(engine.file),
            threads=threads,
            latency_ms=median_interval(times[:, index]),
            p95_ms=float(np.quantile(times[:, index], 0.95)),
            rounds=rounds,
            speedup=median_interval(times[:, 0] / times[:, index]) if index else None,
        )
        for index, engine in enumerate(engines)
    )
