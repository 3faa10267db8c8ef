"""From statistics to ranges: which part of what an activation does its integer grid should cover.

A range that covers everything rounds coarsely; a narrow one cuts values off. The methods weigh the
two in different ways. All include zero, because padding, masks and ReLU need it exact, and none
looks at mask constants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

import numpy as np

from equipoise import fs, record
from equipoise.errors import DataError, IntegrityError, RecipeError
from equipoise.quantize.histogram import Histogram
from equipoise.quantize.statistics import TensorStatistics
from equipoise.spec import Array

Bounds = tuple[float, float]
"""Low and high end of a range; ``low <= 0 <= high``."""

_SEARCH_BINS: Final = 512
_COARSE: Final = 2.0 ** -(np.arange(33) / 4)
"""Shares of a full range: all of it to a 256th, a quarter of an octave apart."""

_FINE: Final = 2.0 ** np.concatenate([np.linspace(-1, 1, 15) / 4, np.linspace(-1, 1, 15) / 32])
"""Factors around the best one so far: between its neighbours, and to a third of a percent."""

_LEAST_PROBABILITY: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class MinMax:
    """All that was seen. Never cuts anything off; one outlier makes the grid coarse."""

    kind: Literal["minmax"] = "minmax"


@dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """Average extremes of a sample. Depends on the order of the samples."""

    kind: Literal["moving-average"] = "moving-average"


@dataclass(frozen=True, kw_only=True)
class Percentile:
    """Cut off a fixed share of the values.

    Attributes:
        percent: How many values of a hundred the range holds. Half of the rest lies beyond each
            end; for a symmetric grid, all of it in magnitude.
    """

    kind: Literal["percentile"] = "percentile"
    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise RecipeError(f"percent is {self.percent}; it has to be above 50, at most 100")


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """Lose the least information: minimal Kullback-Leibler divergence from the quantised values.

    As published by Migacz, 8-bit Inference with TensorRT, GTC 2017, with these repairs. The
    histogram has several bins for each level of the grid: with as many bins as levels there is but
    one candidate, which is minmax. Candidates are magnitudes, so that a short side (as of GELU)
    stays whole while the long one shrinks. What is cut off goes to the end it lay beyond. Zeros,
    half of what ReLU gives, do not count: every grid holds them exactly, yet spread over a wide
    level they would speak for the narrowest range.

    Attributes:
        candidates: Number of magnitudes to try, evenly spread.
    """

    kind: Literal["entropy"] = "entropy"
    candidates: int = 96


@dataclass(frozen=True, kw_only=True)
class Mse:
    """Lose the least power: minimal expected squared error, of rounding and of clipping.

    Attributes:
        clipping_weight: How much more an error of clipping counts than one of rounding. Rounding
            errors are independent and average out in the next layer; values that are cut off are
            the strongest ones and all err in one direction. And data to come is wilder than the
            samples.
    """

    kind: Literal["mse"] = "mse"
    clipping_weight: float = 10.0

    def __post_init__(self) -> None:
        if not 1 <= self.clipping_weight < np.inf:
            raise RecipeError(f"clipping_weight is {self.clipping_weight}; it has to be 1 or more")


Method = MinMax | MovingAverage | Percentile | Entropy | Mse


def choose_range(
    statistics: TensorStatistics, method: Method, *, bits: int = 8, symmetric: bool = False
) -> Bounds:
    """The range of an activation.

    Args:
        statistics: What calibration saw.
        method: How to weigh rounding against clipping.
        bits: Bits of the integer grid.
        symmetric: Whether the range has to be as wide on both sides of zero.

    Returns:
        ``(low, high)`` with ``low <= 0 <= high``, within what was seen; ``(0, 0)`` when nothing
        was. A symmetric range is ``(-m, m)``.

    Raises:
        RecipeError: ``bits`` is not from 2 to 16.
    """
    if not 2 <= bits <= 16:
        raise RecipeError(f"a grid has 2 to 16 bits, not {bits}")
    full = _balanced(_whole(statistics.low, statistics.high), symmetric=symmetric)
    if statistics.count == 0 or full == (0.0, 0.0):
        return full
    chosen = _chosen(statistics, method, full=full, bits=bits, symmetric=symmetric)
    low, high = _balanced(chosen, symmetric=symmetric)
    return max(low, full[0]), min(high, full[1])


def choose_ranges(
    tensors: Mapping[str, TensorStatistics],
    method: Method,
    *,
    bits: int = 8,
    symmetric: bool = False,
) -> dict[str, Bounds]:
    """The range of each activation; see :func:`choose_range`."""
    return {
        name: choose_range(statistics, method, bits=bits, symmetric=symmetric)
        for name, statistics in tensors.items()
    }


def _chosen(
    statistics: TensorStatistics, method: Method, *, full: Bounds, bits: int, symmetric: bool
) -> Bounds:
    histogram = statistics.histogram
    if isinstance(method, MovingAverage):
        return _whole(statistics.moving_low, statistics.moving_high)
    if isinstance(method, Percentile):
        return _percentile(histogram, method.percent / 100, symmetric=symmetric)
    if isinstance(method, Entropy):
        return _entropy(histogram, full, bits=bits, candidates=method.candidates)
    if isinstance(method, MinMax):
        return full
    return _least_squares(
        histogram, full, bits=bits, symmetric=symmetric, clipping_weight=method.clipping_weight
    )


def _whole(low: float, high: float) -> Bounds:
    """The range with zero in it."""
    return min(low, 0.0), max(high, 0.0)


def _balanced(bounds: Bounds, *, symmetric: bool) -> Bounds:
    magnitude = max(-bounds[0], bounds[1])
    return (-magnitude, magnitude) if symmetric else bounds


def _percentile(histogram: Histogram, share: float, *, symmetric: bool) -> Bounds:
    if symmetric:
        magnitude = _quantile(histogram.folded(), share)
        return -magnitude, magnitude
    tail = (1 - share) / 2
    return _whole(_quantile(histogram, tail), _quantile(histogram, 1 - tail))


def _quantile(histogram: Histogram, share: float) -> float:
    """Where ``share`` of the values lie below, as if they were spread evenly within each bin."""
    below = np.concatenate([[0], np.cumsum(histogram.counts)])
    rising = np.concatenate([[True], np.diff(below) > 0])
    return float(np.interp(share * below[-1], below[rising], histogram.edges[rising]))


def expected_errors(
    histogram: Histogram, lows: Array, highs: Array, *, bits: int, clipping_weight: float = 1.0
) -> Array:
    """Mean squared error of quantising the values of a histogram, for many ranges at once.

    Values are taken as spread evenly within each bin, and then it is exact. With step ``s``,
    ``u = x / s``, ``k`` the nearest level to ``u`` that the range has, and ``r = u - k``, the error
    is ``s**2 * r**2``; its integral from 0 to ``x`` is ``s**3 * (k / 12 + r**3 / 3)``, beyond the
    ends of the range too.

    Args:
        histogram: The values.
        lows: float ``[ranges]``, none above zero.
        highs: float ``[ranges]``, none below zero.
        bits: Bits of the grid.
        clipping_weight: How much more the error beyond the ends counts.

    Returns:
        float64 ``[ranges]``; infinite for an empty range.
    """
    steps = (highs - lows)[:, None] / (2**bits - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = histogram.edges / steps
        least = np.rint(lows[:, None] / steps)
        levels = np.clip(np.rint(scaled), least, least + 2**bits - 1)
        left = scaled - levels
        # Not left**3: NumPy takes a power of 3 by way of logarithms.
        integral = steps**3 * (levels / 12 + left * left * left / 3)
        integral += (clipping_weight - 1) * _clipped_integral(histogram.edges, lows, highs)
        errors = np.diff(integral, axis=1) @ histogram.counts
    total = max(histogram.total, 1) * histogram.width
    return np.where(steps[:, 0] > 0, errors / total, np.inf)


def _clipped_integral(edges: Array, lows: Array, highs: Array) -> Array:
    """Integral of the squared distance from the range, up to each edge: ``[ranges, edges]``."""
    beyond = np.maximum(edges - highs[:, None], 0) + np.minimum(edges - lows[:, None], 0)
    integral: Array = beyond * beyond * beyond / 3
    return integral


def _least_squares(
    histogram: Histogram, full: Bounds, *, bits: int, symmetric: bool, clipping_weight: float
) -> Bounds:
    """Search the magnitude, then each end alone, first in octaves, then on fine steps."""
    errors = partial(expected_errors, bits=bits, clipping_weight=clipping_weight)
    doublings = max(0, (len(histogram.counts) // _SEARCH_BINS).bit_length() - 1)
    coarse = histogram.coarser(doublings)
    best = _best(coarse, _clipped(full, _COARSE), errors)
    if symmetric:
        best = _best(coarse, _clipped(full, np.minimum(best[1] / full[1] * _FINE, 1)), errors)
    else:
        for end in (1, 0, 1, 0):
            shares = np.concatenate([_COARSE, np.minimum(_share(best, full, end) * _FINE, 1)])
            best = _best(coarse, _with_end(best, full[end] * shares, end=end), errors)
    # What is best for wide bins need not be for narrow ones; minmax is never beaten by a worse one.
    return _best(histogram, np.array([full, best]).T, errors)


def _share(bounds: Bounds, full: Bounds, end: int) -> float:
    return bounds[end] / full[end] if full[end] else 1.0


def _with_end(bounds: Bounds, candidates: Array, *, end: int) -> Array:
    """Ranges ``[2, candidates]`` that differ in one end."""
    ranges = np.repeat(np.array(bounds)[:, None], len(candidates), axis=1)
    ranges[end] = candidates
    return ranges


def _clipped(full: Bounds, shares: Array) -> Array:
    """Ranges ``[2, shares]``: ``full``, cut off at shares of its magnitude."""
    magnitudes = max(-full[0], full[1]) * shares
    return np.stack([np.maximum(full[0], -magnitudes), np.minimum(full[1], magnitudes)])


def _best(histogram: Histogram, ranges: Array, errors: Callable[..., Array]) -> Bounds:
    """The range of ``[2, ranges]`` with the least error, the first of equals."""
    index = int(errors(histogram, ranges[0], ranges[1]).argmin())
    return float(ranges[0, index]), float(ranges[1, index])


def _entropy(histogram: Histogram, full: Bounds, *, bits: int, candidates: int) -> Bounds:
    """The range that loses the least information; the widest of equals, and of too few bins."""
    histogram = _without_zeros(histogram)
    best, least = full, np.inf
    for low, high in _clipped(full, np.arange(candidates, 0, -1) / candidates).T.tolist():
        if (high - low) / histogram.width <= 2**bits:
            break
        found = _divergence(histogram, low, high, levels=2**bits)
        if found < least:
            best, least = (low, high), found
    return best


def _without_zeros(histogram: Histogram) -> Histogram:
    """The histogram without the bin of exact zeros, which lose nothing on any grid."""
    counts = histogram.counts.copy()
    if 0 <= -histogram.first < len(counts):
        counts[-histogram.first] = 0
    return replace(histogram, counts=counts)


def _divergence(histogram: Histogram, low: float, high: float, *, levels: int) -> float:
    """Kullback-Leibler divergence, in nats, of the clipped values from their quantised form.

    The quantised form has one probability for all bins of a level that hold values.
    """
    centres = histogram.edges[:-1] + histogram.width / 2
    start, stop = np.searchsorted(centres, [low, high])
    counts = histogram.counts[start:stop].astype(np.float64)
    if not counts.any():
        return np.inf
    clipped = counts.copy()
    clipped[0] += histogram.counts[:start].sum()
    clipped[-1] += histogram.counts[stop:].sum()
    level = ((centres[start:stop] - low) / (high - low) * levels).astype(np.int64)
    filled = counts > 0
    members = np.bincount(level, weights=filled)[level]
    quantized = np.where(filled, np.bincount(level, weights=counts)[level], 0)
    quantized /= np.maximum(members, 1) * counts.sum()
    kept = clipped > 0
    real = clipped[kept] / clipped.sum()
    return float(np.sum(real * np.log(real / np.maximum(quantized[kept], _LEAST_PROBABILITY))))


@dataclass(frozen=True, kw_only=True)
class ChosenRanges:
    """Ranges as data, and what they hold for.

    Attributes:
        model_sha256: Hash of the model file.
        data_sha256: Hash of the calibration inputs; see :func:`data_sha256`.
        method: How they were chosen.
        bits: Bits of the grid.
        symmetric: Whether they are symmetric.
        ranges: Activation -> low and high end.
    """

    model_sha256: str
    data_sha256: str
    method: Method
    bits: int
    symmetric: bool
    ranges: dict[str, Bounds]


def data_sha256(samples: Path) -> str:
    """One hash of all files of a directory of calibration inputs."""
    files = {path.name: fs.sha256_file(path) for path in samples.iterdir() if path.is_file()}
    return hashlib.sha256(record.dumps(files).encode()).hexdigest()


def save_ranges(path: Path, chosen: ChosenRanges) -> None:
    """Write ranges as JSON. Raises OutputError when ``path`` cannot be written."""
    fs.write_json(path, chosen)


def load_ranges(path: Path, *, model_sha256: str, data_sha256: str) -> ChosenRanges:
    """Read ranges that :func:`save_ranges` wrote for this model and this data.

    Raises:
        DataError: The file is missing or holds something else.
        IntegrityError: It belongs to another model or to other data.
    """
    text = fs.read_text(path, error=DataError)
    chosen = record.loads(ChosenRanges, text, where=str(path), error=DataError)
    for what, wanted, found in (
        ("another model", model_sha256, chosen.model_sha256),
        ("other calibration data", data_sha256, chosen.data_sha256),
    ):
        if wanted != found:
            raise IntegrityError(
                f"{path} was made for {what}: {found[:12]}, not {wanted[:12]}",
                hint="Calibrate again; ranges of another model or other data are wrong in silence.",
            )
    return chosen
