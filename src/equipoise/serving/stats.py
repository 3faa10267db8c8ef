"""How many requests there were, how many failed, and how long they took: bounded and cheap.

A request costs two readings of a clock, a number from a counter and one write into a ring. All of
these are single steps of the interpreter, so threads need no lock.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from typing import Final

import numpy as np

WINDOW: Final = 4096
"""Requests whose latency is kept, a power of two."""
_MASK: Final = WINDOW - 1


@dataclass(frozen=True, kw_only=True)
class SessionStats:
    """What a session has done since it was loaded.

    Attributes:
        requests: Runs that gave an answer; samples that were run together are one.
        errors: Runs that raised an error.
        p50_ms: Median latency of the last 4,096 runs that gave an answer; 0 before the first.
        p95_ms: 95th percentile of these.
        p99_ms: 99th percentile of these.
        engine: Name of the engine that runs now.
        serial: Serial of the bundle that runs now.
        reloads: How often it was replaced.
        uptime_s: Seconds since it was loaded first.
    """

    requests: int
    errors: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    engine: str
    serial: int
    reloads: int
    uptime_s: float


class Recorder:
    """Counts requests and keeps the latest latencies. Threads may share it."""

    def __init__(self) -> None:
        self._ring: list[int | None] = [None] * WINDOW
        self._numbers = itertools.count()
        self._looks = 0
        self._errors = 0
        self._lock = threading.Lock()
        self._begin = time.monotonic()

    def took(self, nanoseconds: int) -> None:
        """Note a request that was answered."""
        self._ring[next(self._numbers) & _MASK] = nanoseconds

    def failed(self) -> None:
        """Note a request that raised an error."""
        with self._lock:
            self._errors += 1

    def _requests(self) -> int:
        # A counter cannot be read without counting on; how often that was done is taken off. The
        # place in the ring that it skips keeps an older latency.
        with self._lock:
            number = next(self._numbers) - self._looks
            self._looks += 1
            return number

    def stats(self, *, engine: str, serial: int, reloads: int) -> SessionStats:
        """What was noted so far, of a session that runs ``engine`` now."""
        taken = np.array([t for t in self._ring[:] if t is not None], dtype=np.float64) / 1e6
        p50, p95, p99 = np.percentile(taken, (50, 95, 99)) if taken.size else (0.0, 0.0, 0.0)
        return SessionStats(
            requests=self._requests(),
            errors=self._errors,
            p50_ms=float(p50),
            p95_ms=float(p95),
            p99_ms=float(p99),
            engine=engine,
            serial=serial,
            reloads=reloads,
            uptime_s=time.monotonic() - self._begin,
        )
