"""A measured value with its uncertainty: bootstrap intervals over samples and over rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 2000
_BATCH: Final = 100


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measured value with its 95 % interval, in the unit of the value."""

    value: float
    low: float
    high: float


Values = NDArray[np.float64]


def resampled_totals(statistics: Values, *, seed: int = 0) -> Values:
    """Sums of ``statistics`` over bootstrap resamples of its rows.

    Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13):
    each resample draws as many rows as there are, with replacement. The same ``seed`` draws the
    same rows, which pairs two engines over the same samples.

    Args:
        statistics: ``[samples, k]``, one row per sample.
        seed: Of the random generator.

    Returns:
        ``[resamples, k]``.
    """
    generator = np.random.default_rng(seed)
    rows = len(statistics)
    share = np.full(rows, 1 / rows)
    batches = [
        generator.multinomial(rows, share, size=_BATCH).astype(np.float64) @ statistics
        for _ in range(_RESAMPLES // _BATCH)
    ]
    return np.concatenate(batches)


def metric_interval(statistics: Values, value: Callable[[Values], Values]) -> Interval:
    """A metric with its two-sided 95 % interval over evaluation samples.

    Args:
        statistics: ``[samples, k]``.
        value: Turns totals ``[..., k]`` into metric values ``[...]``.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(value(resampled_totals(statistics)), [tail, 1 - tail])
    return Interval(value=float(value(statistics.sum(0))), low=float(low), high=float(high))


def paired_drop(
    reference: Values,
    candidate: Values,
    value: Callable[[Values], Values],
    *,
    discrete: bool,
) -> Interval:
    """Metric of the reference minus metric of the candidate, paired over the same samples.

    ``low`` and ``high`` are the one-sided 95 % bounds. A metric that counts decisions
    (``discrete``) shows no difference in ``n`` samples with probability 5 % even when a share
    ``1 - 0.05**(1/n)`` of all inputs is decided otherwise (the rule of three: Hanley and
    Lippman-Hand, JAMA 249, 1983), so ``high`` is never below that.

    Args:
        reference: ``[samples, k]`` statistics of the reference.
        candidate: ``[samples, k]`` of the candidate, same samples in the same order.
        value: Turns totals ``[..., k]`` into metric values ``[...]``.
        discrete: Whether the metric counts decisions.
    """
    drops = value(resampled_totals(reference)) - value(resampled_totals(candidate))
    low, high = np.quantile(drops, [1 - CONFIDENCE, CONFIDENCE])
    drop = float(value(reference.sum(0)) - value(candidate.sum(0)))
    unseen = smallest_provable_drop(len(reference)) if discrete else drop
    return Interval(value=drop, low=float(low), high=max(float(high), unseen))


def smallest_provable_drop(samples: int) -> float:
    """The share of decisions that may be wrong unseen, at 95 % confidence, in ``samples``."""
    return float(1 - (1 - CONFIDENCE) ** (1 / samples))


def median_interval(values: Values) -> Interval:
    """The median with its two-sided 95 % bootstrap interval.

    Args:
        values: ``[n]`` measurements, such as one ratio per round.
    """
    generator = np.random.default_rng(0)
    drawn = generator.choice(values, size=(_RESAMPLES, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return Interval(value=float(np.median(values)), low=float(low), high=float(high))
