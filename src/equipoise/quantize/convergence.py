"""Whether there were enough calibration samples: how far ranges still move with the second half."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from equipoise.quantize.ranges import Bounds, Method, choose_ranges
from equipoise.quantize.statistics import Statistics

SETTLED: Final = 0.05
"""A range that is off by a twentieth costs 0.4 dB of rounding, or clips what was never seen."""

_ENOUGH: Final = 0.95
"""Share of the activations that have to be settled: extremes of a few always move."""


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """How far the ranges moved between half of the samples and all of them.

    Attributes:
        samples: Number of all samples.
        half_samples: Number of the first half.
        moved: Activation -> the larger move of its two ends, as a share of its final range; the
            farthest first.
        settled: Share of the activations that moved by at most ``SETTLED``.
        sentence: Whether the samples were enough, in words.
    """

    samples: int
    half_samples: int
    moved: dict[str, float]
    settled: float
    sentence: str

    @property
    def enough(self) -> bool:
        """Whether more samples would hardly change the ranges."""
        return self.half_samples > 0 and self.settled >= _ENOUGH


def convergence(
    statistics: Statistics, method: Method, *, bits: int = 8, symmetric: bool = False
) -> Convergence:
    """How far the ranges of ``method`` still moved in the second half of the samples."""
    final = choose_ranges(statistics.tensors, method, bits=bits, symmetric=symmetric)
    early = choose_ranges(statistics.half, method, bits=bits, symmetric=symmetric)
    moved = {name: _moved(early[name], final[name]) for name in final if name in early}
    moved = dict(sorted(moved.items(), key=lambda item: -item[1]))
    settled = sum(move <= SETTLED for move in moved.values()) / max(len(moved), 1)
    return Convergence(
        samples=statistics.samples,
        half_samples=statistics.half_samples,
        moved=moved,
        settled=settled,
        sentence=_sentence(statistics, moved, settled=settled),
    )


def _moved(early: Bounds, final: Bounds) -> float:
    span = final[1] - final[0]
    if span == 0:
        return 0.0 if early == final else math.inf
    return max(abs(final[0] - early[0]), abs(final[1] - early[1])) / span


def _sentence(statistics: Statistics, moved: dict[str, float], *, settled: float) -> str:
    if not statistics.half_samples:
        return "one calibration sample says nothing about how far ranges vary"
    unsettled = sum(move > SETTLED for move in moved.values())
    came = f"from {statistics.half_samples} to {statistics.samples} calibration samples"
    if settled >= _ENOUGH:
        return f"{came}, {settled:.0%} of the ranges moved by less than {SETTLED:.0%}: enough"
    return (
        f"{came}, {unsettled} of {len(moved)} ranges still moved by more than {SETTLED:.0%}:"
        f" more samples would change them"
    )
