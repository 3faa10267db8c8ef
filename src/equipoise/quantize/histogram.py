"""Histograms that widen as values come in, so that one pass over the data is enough.

A bin is ``2**exponent`` wide and starts at a whole multiple of its width. When a value falls
outside, the width doubles and bins merge in pairs: exactly, because every coarse bin is two whole
fine ones. So the result depends on the values alone, not on their order or on how they were split,
zero is always an edge, and memory is the number of bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise.spec import Array

BINS: Final = 2048
"""Eight bins for each step of an 8-bit grid, and at least four after a doubling."""

_SIGNIFICANT_BITS: Final = 23
"""A float32 says no more than this about its place."""

_SMALLEST_EXPONENT: Final = -149
"""Of the smallest float32 above zero."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Histogram:
    """How many values fell into each bin.

    Attributes:
        first: Which multiple of the width the first bin starts at.
        exponent: Power of two that a bin is wide.
        counts: int64 ``[bins]``. Bin ``i`` holds the values from ``(first + i) * width`` up to the
            next multiple, which it does not hold.
    """

    first: int
    exponent: int
    counts: Array

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> Array:
        """float64 ``[bins + 1]``: where the bins begin, and where the last one ends."""
        return (self.first + np.arange(len(self.counts) + 1)) * self.width

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def coarser(self, doublings: int) -> Histogram:
        """The same values in bins ``2**doublings`` times as wide, as few as hold them."""
        first, counts = _moved(self, exponent=self.exponent + doublings)
        return Histogram(first=first, exponent=self.exponent + doublings, counts=counts)

    def folded(self) -> Histogram:
        """The histogram of the absolute values; exact, because zero is an edge."""
        positions = self.first + np.arange(len(self.counts))
        folded = np.where(positions < 0, -1 - positions, positions)
        counts = _counted(folded, self.counts, size=int(folded.max(initial=0)) + 1)
        return Histogram(first=0, exponent=self.exponent, counts=counts)


def _counted(positions: Array, counts: Array, *, size: int) -> Array:
    """int64 ``[size]``: the sums of ``counts`` at equal ``positions``."""
    added = np.zeros(size, dtype=np.int64)
    np.add.at(added, positions, counts)
    return added


def _moved(histogram: Histogram, *, exponent: int) -> tuple[int, Array]:
    """First position and counts on the grid of a larger ``exponent``."""
    used = np.flatnonzero(histogram.counts)
    if not used.size:
        return 0, np.zeros(1, dtype=np.int64)
    positions = (histogram.first + used) >> (exponent - histogram.exponent)
    first = int(positions[0])
    size = int(positions[-1]) - first + 1
    return first, _counted(positions - first, histogram.counts[used], size=size)


class RunningHistogram:
    """A histogram of what has come so far.

    Args:
        bins: Number of bins, all of which it may use.
    """

    def __init__(self, bins: int = BINS) -> None:
        self._bins = bins
        self._low, self._high = math.inf, -math.inf
        self._grid = Histogram(
            first=0, exponent=_SMALLEST_EXPONENT, counts=np.zeros(bins, dtype=np.int64)
        )

    def cover(self, low: float, high: float) -> None:
        """Widen the grid until it holds ``low`` and ``high``, both finite."""
        if low >= self._low and high <= self._high:
            return
        self._low, self._high = min(low, self._low), max(high, self._high)
        exponent = _exponent(self._low, self._high, bins=self._bins)
        first = _position(self._low, exponent)
        start, counts = _moved(self._grid, exponent=exponent)
        wide = np.zeros(self._bins, dtype=np.int64)
        if counts.any():
            wide[start - first : start - first + len(counts)] = counts
        self._grid = Histogram(first=first, exponent=exponent, counts=wide)

    def add(self, values: Array) -> None:
        """Count ``values``, one-dimensional and all within what has been covered."""
        # In float64 a product with a power of two is exact, so no value lands beside its bin.
        scaled = np.multiply(values, math.ldexp(1.0, -self._grid.exponent), dtype=np.float64)
        positions = np.floor(scaled, out=scaled).astype(np.int64)
        positions -= self._grid.first
        counts = self._grid.counts
        counts += np.bincount(positions, minlength=self._bins)

    def snapshot(self) -> Histogram:
        """What has been counted so far, as a copy."""
        grid = self._grid
        return Histogram(first=grid.first, exponent=grid.exponent, counts=grid.counts.copy())


def _position(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _exponent(low: float, high: float, *, bins: int) -> int:
    """The least exponent with which ``bins`` bins hold ``low`` and ``high``.

    Not so small that a bin would be finer than a float32 of that magnitude can tell. It grows with
    the range and depends on nothing else, which makes the grid independent of the order of values.
    """
    magnitude = max(abs(low), abs(high))
    spread = math.frexp((high - low) / (bins + 1))[1] - 1
    finest = math.frexp(magnitude)[1] - _SIGNIFICANT_BITS
    floor = [_SMALLEST_EXPONENT]
    floor += [spread] if high > low else []
    floor += [finest] if magnitude > 0 else []
    exponent = max(floor)
    while _position(high, exponent) - _position(low, exponent) >= bins:
        exponent += 1
    return exponent
