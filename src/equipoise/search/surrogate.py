"""What the recipes that were tried say about those that were not: Gaussian processes over points.

Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, ch. 2 and 5. The kernel is a
product over axes, ``exp(-distance / length)``: a choice is at distance 1 from another one, and on
an ordered axis by the share of its range between them. A space of recipes is small enough to
predict every point of it, so the next one to try is found by looking at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise.search.space import Axis, Point, Space
from equipoise.spec import Array

_LENGTHS: Final = (0.3, 1.0, 3.0, 10.0)
"""Lengths that each axis may have. Long: the axis hardly matters."""

_NOISES: Final = (1e-3, 1e-2, 5e-2)
"""Variance of what is not explained, over that of all."""

_SWEEPS: Final = 2


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Normal distributions, one per point.

    Attributes:
        mean: ``[points]``.
        deviation: ``[points]``.
    """

    mean: Array
    deviation: Array


class Coordinates:
    """Points of a space as numbers.

    Args:
        space: The space.
    """

    def __init__(self, space: Space) -> None:
        self._tables = [_distances(axis) for axis in space.axes]

    def distances(self, left: Sequence[Point], right: Sequence[Point]) -> Array:
        """``[axes, left, right]``: how far points are from each other on each axis."""
        a, b = np.array(left), np.array(right)
        return np.stack(
            [table[a[:, k][:, None], b[:, k][None]] for k, table in enumerate(self._tables)]
        )


def _distances(axis: Axis) -> Array:
    positions, count = axis.positions(), len(axis.choices)
    if positions is None or count < 2:
        return 1.0 - np.eye(count)
    values = np.array(positions)
    distances: Array = np.abs(values[:, None] - values[None]) / (values.max() - values.min())
    return distances


def fit_and_predict(
    coordinates: Coordinates,
    seen: Sequence[Point],
    values: Sequence[float],
    points: Sequence[Point],
) -> Prediction:
    """Predict ``points`` from the ``values`` at the points that were ``seen``.

    Lengths of the axes and the noise are those of the largest marginal likelihood, found axis by
    axis on a small grid: with a few dozen points finer ones would follow noise.
    """
    targets = np.asarray(values, dtype=np.float64)
    centre, scale = float(np.median(targets)), float(targets.std()) or 1.0
    standard = (targets - centre) / scale
    between = coordinates.distances(seen, seen)
    lengths, noise = _likeliest(between, standard)
    factor = _factor(between, lengths, noise)
    across = _kernel(coordinates.distances(points, seen), lengths)
    mean = across @ _solved(factor, standard)
    explained = np.square(np.linalg.solve(factor, across.T)).sum(axis=0)
    deviation = np.sqrt(np.maximum(1.0 + noise - explained, 1e-12))
    return Prediction(mean=centre + scale * mean, deviation=scale * deviation)


def _kernel(distances: Array, lengths: Array) -> Array:
    kernel: Array = np.exp(-(distances / lengths[:, None, None]).sum(axis=0))
    return kernel


def _factor(between: Array, lengths: Array, noise: float) -> Array:
    kernel = _kernel(between, lengths)
    factor: Array = np.linalg.cholesky(kernel + noise * np.eye(len(kernel)))
    return factor


def _solved(factor: Array, targets: Array) -> Array:
    solved: Array = np.linalg.solve(factor.T, np.linalg.solve(factor, targets))
    return solved


def _likeliest(between: Array, targets: Array) -> tuple[Array, float]:
    lengths, noise = np.full(len(between), _LENGTHS[2]), _NOISES[1]
    best = _log_likelihood(between, targets, lengths, noise)
    for _ in range(_SWEEPS):
        for axis in range(len(between)):
            for length in _LENGTHS:
                trial = lengths.copy()
                trial[axis] = length
                found = _log_likelihood(between, targets, trial, noise)
                if found > best:
                    best, lengths = found, trial
        for other in _NOISES:
            found = _log_likelihood(between, targets, lengths, other)
            if found > best:
                best, noise = found, other
    return lengths, noise


def _log_likelihood(between: Array, targets: Array, lengths: Array, noise: float) -> float:
    factor = _factor(between, lengths, noise)
    fit = float(targets @ _solved(factor, targets))
    return -0.5 * fit - float(np.log(np.diag(factor)).sum())


def expected_improvement(predicted: Prediction, best: float) -> Array:
    """``[points]``: by how much less than ``best`` a value is expected to be.

    Jones, Schonlau and Welch, Journal of Global Optimization 13, 1998.
    """
    gap = (best - predicted.mean) / predicted.deviation
    improvement: Array = predicted.deviation * (gap * _below(gap) + _density(gap))
    return improvement


def probability_below(predicted: Prediction, limit: float) -> Array:
    """``[points]``: how likely a value is to be at most ``limit``."""
    return _below((limit - predicted.mean) / predicted.deviation)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _below(z: Array) -> Array:
    below: Array = 0.5 * (1.0 + _erf(z / math.sqrt(2)))
    return below


def _density(z: Array) -> Array:
    density: Array = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return density
