"""Adding up the statistics of one activation, sample by sample, in memory that does not grow."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from equipoise.quantize.histogram import BINS, RunningHistogram
from equipoise.quantize.statistics import (
    MASK_MAGNITUDE,
    ChannelStatistics,
    TensorRange,
    TensorStatistics,
)
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class AccumulateSettings:
    """How statistics are taken.

    Attributes:
        bins: Bins of a histogram.
        histogram_values: Values of a sample that a tensor's histogram takes at most, spread evenly
            over it. Extremes, means and channels take all.
        averaging: Weight of the newest sample in a moving average.
    """

    bins: int = BINS
    histogram_values: int = 16_384
    averaging: float = 0.01


_LOW, _HIGH, _TOTAL, _SQUARES, _COUNT = range(5)
"""Rows of a table of sums, float64 ``[5, channels]``; ``low > high`` where nothing was seen.

One array and not five: for the small tensors of a model, NumPy's calls are most of the cost.
"""


def _nothing() -> Array:
    return np.array([[np.inf], [-np.inf], [0.0], [0.0], [0.0]])


def _add_to(sums: Array, more: Array) -> None:
    """Add the table ``more`` to the table ``sums``, in place."""
    np.minimum(sums[_LOW], more[_LOW], out=sums[_LOW])
    np.maximum(sums[_HIGH], more[_HIGH], out=sums[_HIGH])
    sums[_TOTAL:] += more[_TOTAL:]


def _whole(sums: Array) -> Array:
    """The table of all channels as one."""
    rest = sums[_TOTAL:].sum(axis=1).tolist()
    return np.array([[sums[_LOW].min()], [sums[_HIGH].max()], *([value] for value in rest)])


def _reduced(function: np.ufunc, view: Array) -> Array:
    """``[channels]`` of ``view [outer, channels, inner]``.

    One axis after the other, and none of one element: several times as fast as both at once.
    """
    inner = view[:, :, 0] if view.shape[2] == 1 else function.reduce(view, axis=2)
    reduced: Array = function.reduce(inner, axis=0)
    return reduced


def _sums(view: Array, low: Array, high: Array) -> Array:
    """The table of ``view [outer, channels, inner]``, whose extremes are known and ordinary."""
    sums = np.empty((5, view.shape[1]))
    sums[_LOW], sums[_HIGH] = low, high
    sums[_TOTAL] = _reduced(np.add, view)
    sums[_SQUARES] = np.einsum("ock,ock->c", view, view)
    sums[_COUNT] = view.shape[0] * view.shape[2]
    return sums


def _sums_where(view: Array, kept: Array) -> Array:
    """The table of the values of ``view`` where ``kept``; in float64, for the squares of masks."""
    axes = (0, 2)
    values = np.where(kept, view, 0).astype(np.float64)
    sums = np.empty((5, view.shape[1]))
    sums[_LOW] = np.where(kept, view, np.inf).min(axis=axes)
    sums[_HIGH] = np.where(kept, view, -np.inf).max(axis=axes)
    sums[_TOTAL] = values.sum(axis=axes)
    sums[_SQUARES] = np.square(values).sum(axis=axes)
    sums[_COUNT] = kept.sum(axis=axes)
    return sums


class Accumulator:
    """Statistics of one activation so far.

    Args:
        settings: How statistics are taken.
        rank_3_axis: Axis of the channels of a tensor of rank 3: 1 beside a convolution, else 2.
    """

    def __init__(self, settings: AccumulateSettings, *, rank_3_axis: int = 2) -> None:
        self._settings = settings
        self._rank_3_axis = rank_3_axis
        self._histogram = RunningHistogram(settings.bins)
        self._values, self._masks = _nothing(), _nothing()
        self._channels: Array | None = None
        self._axis: int | None = None
        self._started = False
        self._samples, self._non_finite = 0, 0
        self._moving_low, self._moving_high = 0.0, 0.0

    def add(self, array: Array) -> None:
        """Add a float array of any shape: the values of one sample."""
        if not array.size:
            return
        axis = self._channel_axis(array.ndim)
        view = _by_channel(array, axis)
        sums, clean = self._split(view)
        self._add_channels(sums, axis)
        whole = _whole(sums)
        _add_to(self._values, whole)
        if whole[_COUNT, 0]:
            low, high = float(whole[_LOW, 0]), float(whole[_HIGH, 0])
            self._average(low, high)
            self._histogram.cover(low, high)
            self._histogram.add(self._spread(array, clean=clean))

    def _split(self, view: Array) -> tuple[Array, bool]:
        """Figures of the ordinary values, and whether there are no others."""
        low, high = _reduced(np.minimum, view), _reduced(np.maximum, view)
        if low.min() > -MASK_MAGNITUDE and high.max() < MASK_MAGNITUDE:  # false for NaN too
            return _sums(view, low, high), True
        kept, finite = np.abs(view) < MASK_MAGNITUDE, np.isfinite(view)
        self._non_finite += int(finite.size - finite.sum())
        _add_to(self._masks, _whole(_sums_where(view, finite & ~kept)))
        return _sums_where(view, kept), False

    def _add_channels(self, sums: Array, axis: int | None) -> None:
        """Add up channels for as long as they are of one number."""
        if not self._started:
            self._started, self._axis = True, axis
            self._channels = None if axis is None else sums
        elif self._channels is not None:
            if axis == self._axis and sums.shape == self._channels.shape:
                _add_to(self._channels, sums)
            else:
                self._channels = None

    def _average(self, low: float, high: float) -> None:
        weight = self._settings.averaging
        self._moving_low += weight * (low - self._moving_low)
        self._moving_high += weight * (high - self._moving_high)
        self._samples += 1

    def _spread(self, array: Array, *, clean: bool) -> Array:
        """An even share of the ordinary values.

        The stride shares no factor with the size, so that it visits every channel alike.
        """
        least = -(-array.size // self._settings.histogram_values)
        stride = next(s for s in itertools.count(least) if math.gcd(s, array.size) == 1)
        flat = array.reshape(-1)[:: stride if least > 1 else 1]
        return flat if clean else flat[np.abs(flat) < MASK_MAGNITUDE]

    def _channel_axis(self, rank: int) -> int | None:
        if rank < 2:
            return None
        return self._rank_3_axis if rank == 3 else 1

    def statistics(self) -> TensorStatistics:
        """The statistics so far."""
        low, high, mean, mean_square = (float(v[0]) for v in _figures(self._values))
        # An average that starts at zero leans towards it; this undoes it, as Adam does.
        started = 1 - (1 - self._settings.averaging) ** max(self._samples, 1)
        return TensorStatistics(
            low=low,
            high=high,
            mean=mean,
            mean_square=mean_square,
            moving_low=self._moving_low / started,
            moving_high=self._moving_high / started,
            count=int(self._values[_COUNT, 0]),
            masked=int(self._masks[_COUNT, 0]) + self._non_finite,
            histogram=self._histogram.snapshot(),
            channels=self._channel_statistics(),
        )

    def _channel_statistics(self) -> ChannelStatistics | None:
        if self._channels is None or self._axis is None:
            return None
        low, high, mean, mean_square = _figures(self._channels)
        return ChannelStatistics(
            axis=self._axis, low=low, high=high, mean=mean, mean_square=mean_square
        )

    def range(self) -> TensorRange:
        """The range so far; mask constants that are finite count."""
        both = self._values.copy()
        _add_to(both, self._masks)
        low, high, _, mean_square = (float(v[0]) for v in _figures(both))
        return TensorRange(
            low=low,
            high=high,
            mean_square=mean_square,
            count=int(both[_COUNT, 0]),
            non_finite=self._non_finite,
        )


def _by_channel(array: Array, axis: int | None) -> Array:
    """``array`` as ``[outer, channels, inner]``; one channel for no axis."""
    if axis is None:
        return array.reshape(1, 1, -1)
    shape = array.shape
    return array.reshape(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))


def _figures(sums: Array) -> tuple[Array, Array, Array, Array]:
    """Least, largest, mean and mean square of each channel; zeros where nothing was seen."""
    seen, count = sums[_COUNT] > 0, np.maximum(sums[_COUNT], 1)
    low, high = np.where(seen, sums[_LOW], 0.0), np.where(seen, sums[_HIGH], 0.0)
    return low, high, sums[_TOTAL] / count, sums[_SQUARES] / count
