"""How many requests there were, how many failed, and how long they took: bounded and cheap.

A request takes a number from a counter; one in four costs two readings of a clock and a write into
a ring besides. All of these are single steps of the interpreter, so threads need no lock.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from typing import Final

import numpy as np

WINDOW: Final = 4096
"""Latencies that are kept, a power of two."""
MASK: Final = WINDOW - 1
SHIFT: Final = 2
"""One request in four is timed: two readings of a clock are 2 % of a small model's run."""
UNTIMED: Final = (1 << SHIFT) - 1
"""Bits of a request's number of which none is set in one that is timed."""


@dataclass(frozen=True, kw_only=True)
class SessionStats:
    """What a session has done since it was loaded.

    Attributes:
        requests: Runs that gave an answer; samples that were run together are one.
        errors: Runs that raised an error.
        p50_ms: Median latency of the last 4,096 runs that were timed, one in four; 0 before the
            first.
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
    """Counts requests and keeps the latest latencies. Threads may share it.

    Attributes:
        ring: Latencies of the latest requests, in nanoseconds; None where there was none yet.
        number: Gives the next request its number.
    """

    def __init__(self) -> None:
        self.ring: list[int | None] = [None] * WINDOW
        self._numbers = itertools.count()
        self.number = self._numbers.__next__
        self._errors = 0
        self._lock = threading.Lock()
        self._begin = time.monotonic()

    def took(self, nanoseconds: int) -> None:
        """Note a request that was answered."""
        number = self.number()
        if not number & UNTIMED:
            self.ring[(number >> SHIFT) & MASK] = nanoseconds

    def failed(self) -> None:
        """Note that a request with a number raised an error."""
        with self._lock:
            self._errors += 1

    def _requests(self) -> int:
        # ``count(7)``: the one way to read a counter that does not count on.
        return int(repr(self._numbers)[len("count(") : -1])

    def stats(self, *, engine: str, serial: int, reloads: int) -> SessionStats:
        """What was noted so far, of a session that runs ``engine`` now."""
        taken = np.array([t for t in self.ring[:] if t is not None], dtype=np.float64) / 1e6
        p50, p95, p99 = np.percentile(taken, (50, 95, 99)) if taken.size else (0.0, 0.0, 0.0)
        return SessionStats(
            requests=self._requests() - self._errors,
            errors=self._errors,
            p50_ms=float(p50),
            p95_ms=float(p95),
            p99_ms=float(p99),
            engine=engine,
            serial=serial,
            reloads=reloads,
            uptime_s=time.monotonic() - self._begin,
        )
