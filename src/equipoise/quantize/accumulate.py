"""Adding up the statistics of one activation, sample by sample, in memory that does not grow."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from equipoise.quantize.histogram import BINS, RunningHistogram
from equipoise.quantize.statistics import MASK_MAGNITUDE, ChannelStatistics, TensorStatistics
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class AccumulateSettings:
    """How statistics are taken.

    Attributes:
        bins: Bins of a histogram.
        histogram_values: Values of a sample that a tensor's histogram takes at most, spread evenly
            over it. Extremes take all.
        averaging: Weight of the newest sample in a moving average.
    """

    bins: int = BINS
    histogram_values: int = 16_384
    averaging: float = 0.01


def _reduced(function: np.ufunc, view: Array) -> Array:
    """``[channels]`` of ``view [outer, channels, inner]``.

    One axis after the other, and none of one element: several times as fast as both at once.
    """
    inner = view[:, :, 0] if view.shape[2] == 1 else function.reduce(view, axis=2)
    reduced: Array = function.reduce(inner, axis=0)
    return reduced


def _split(view: Array) -> tuple[Array, Array, int]:
    """Extremes of the ordinary values of each channel, and how many others there are."""
    low, high = _reduced(np.minimum, view), _reduced(np.maximum, view)
    if low.min() > -MASK_MAGNITUDE and high.max() < MASK_MAGNITUDE:  # false for NaN too
        return low, high, 0
    kept = np.abs(view) < MASK_MAGNITUDE
    low = np.where(kept, view, np.inf).min(axis=(0, 2))
    high = np.where(kept, view, -np.inf).max(axis=(0, 2))
    return low, high, int(kept.size - kept.sum())


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
        self._low, self._high = np.inf, -np.inf
        self._channels: tuple[Array, Array] | None = None
        self._axis: int | None = None
        self._started = False
        self._samples, self._count, self._masked = 0, 0, 0
        self._moving_low, self._moving_high = 0.0, 0.0

    def add(self, array: Array) -> None:
        """Add a float array of any shape: the values of one sample."""
        if not array.size:
            return
        axis = self._channel_axis(array.ndim)
        low, high, masked = _split(_by_channel(array, axis))
        self._add_channels(low, high, axis)
        self._count += array.size - masked
        self._masked += masked
        if masked < array.size:
            self._add_values(array, float(low.min()), float(high.max()), clean=not masked)

    def _add_values(self, array: Array, low: float, high: float, *, clean: bool) -> None:
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._average(low, high)
        self._histogram.cover(low, high)
        self._histogram.add(self._spread(array, clean=clean))

    def _add_channels(self, low: Array, high: Array, axis: int | None) -> None:
        """Widen the channels for as long as they are of one number."""
        if not self._started:
            self._started, self._axis = True, axis
            self._channels = None if axis is None else (low, high)
        elif self._channels is not None:
            if axis == self._axis and low.shape == self._channels[0].shape:
                np.minimum(self._channels[0], low, out=self._channels[0])
                np.maximum(self._channels[1], high, out=self._channels[1])
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
        # An average that starts at zero leans towards it; this undoes it, as Adam does.
        started = 1 - (1 - self._settings.averaging) ** max(self._samples, 1)
        return TensorStatistics(
            low=self._low if self._count else 0.0,
            high=self._high if self._count else 0.0,
            moving_low=self._moving_low / started,
            moving_high=self._moving_high / started,
            count=self._count,
            masked=self._masked,
            histogram=self._histogram.snapshot(),
            channels=self._channel_statistics(),
        )

    def _channel_statistics(self) -> ChannelStatistics | None:
        if self._channels is None or self._axis is None:
            return None
        low, high = self._channels
        seen = low <= high
        return ChannelStatistics(
            axis=self._axis, low=np.where(seen, low, 0.0), high=np.where(seen, high, 0.0)
        )


def _by_channel(array: Array, axis: int | None) -> Array:
    """``array`` as ``[outer, channels, inner]``; one channel for no axis."""
    if axis is None:
        return array.reshape(1, 1, -1)
    shape = array.shape
    return array.reshape(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
