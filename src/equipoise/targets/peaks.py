"""What this machine's CPU reaches, measured in a moment: products and copies of NumPy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from equipoise.targets.profile import Figure

_SIDE: Final = 768
_COPIED_BYTES: Final = 96 << 20
_REPEATS: Final = 5
_MEASURED: Final = "measured here: {what}, all usable cores"


@functools.cache
def measured_peaks() -> tuple[Figure, Figure]:
    """float32 operations, in 10^12 per second, and bandwidth, in 10^9 bytes per second.

    A copy reads and writes; a multiplication and an addition are two operations.
    """
    left = np.ones((_SIDE, _SIDE), dtype=np.float32)
    product = np.empty_like(left)
    source = np.ones(_COPIED_BYTES // 4, dtype=np.float32)
    copy = np.empty_like(source)
    multiplied_s = _shortest(lambda: np.matmul(left, left, out=product))
    copied_s = _shortest(lambda: np.copyto(copy, source))
    return (
        Figure(
            value=2 * _SIDE**3 / multiplied_s / 1e12,
            source=_MEASURED.format(what="a matrix product"),
        ),
        Figure(value=2 * source.nbytes / copied_s / 1e9, source=_MEASURED.format(what="a copy")),
    )


def _shortest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs: what else goes on only adds."""
    work()
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)
