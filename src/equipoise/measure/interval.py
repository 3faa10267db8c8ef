"""A measured value with its uncertainty: over samples, over rounds, over openings of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import UsageError

CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 2000
_BATCH: Final = 100
_TRIMMED: Final = 0.2


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


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A trimmed mean.

    Attributes:
        mean: The mean of the middle three fifths.
        variance: Of that mean.
        degrees: Degrees of freedom of the variance.
    """

    mean: float
    variance: float
    degrees: float


def trimmed_mean(values: Values) -> Estimate:
    """The mean without the fifth at either end, its variance from the winsorized values.

    Tukey and McLaughlin, Sankhya A 25, 1963, 331-352. Fewer than five values lose none.

    Args:
        values: ``[n]``, at least 2.
    """
    ordered = np.sort(values)
    count = len(ordered)
    cut = int(_TRIMMED * count)
    kept = count - 2 * cut
    winsorized = np.clip(ordered, ordered[cut], ordered[count - cut - 1])
    squares = float(((winsorized - winsorized.mean()) ** 2).sum())
    return Estimate(
        mean=float(ordered[cut : count - cut].mean()),
        variance=squares / (kept * (kept - 1)),
        degrees=kept - 1.0,
    )


def student_t(probability: float, *, degrees: float) -> float:
    """Quantile of Student's t, to within 1 %; exact for 1 and 2 degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, 26.7.5, and 26.7.3 and 26.7.4
    turned round. Degrees between 2 and 3 are beyond them.
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))


def clustered_interval(values: Values, *, first: int | None = None) -> Interval:
    """A typical value of clusters, with its two-sided 95 % interval.

    Whatever was measured in one cluster, such as an engine that was opened once, has an offset in
    common. More measurements of it make that no smaller, so the cluster is the unit of noise: the
    interval is Student's, of the trimmed mean of the logarithms.

    Who measures until an interval is narrow stops more often when the noise looks smaller than it
    is. So the interval is at least as wide as the noise of the ``first`` clusters makes it, which
    were there before anybody looked (Stein, Annals of Mathematical Statistics 16, 1945, 243-258).

    Args:
        values: ``[clusters]`` positive, such as the median ratio of each opening.
        first: Clusters before it was first asked whether to go on; None when that was fixed.

    Raises:
        UsageError: There are fewer than 2, or one is not positive and finite.
    """
    logs = _logs(values)
    whole = trimmed_mean(logs)
    reach = _reach(whole)
    if first is not None:
        reach = max(reach, _reach(trimmed_mean(logs[:first])) * math.sqrt(first / len(logs)))
    low, high = math.exp(whole.mean - reach), math.exp(whole.mean + reach)
    return Interval(value=math.exp(whole.mean), low=low, high=high)


def _reach(estimate: Estimate) -> float:
    quantile = student_t((1 + CONFIDENCE) / 2, degrees=estimate.degrees)
    return quantile * math.sqrt(estimate.variance)


def _logs(values: Values) -> Values:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2 or not ((array > 0) & np.isfinite(array)).all():
        raise UsageError(
            f"an interval over {array.size} clusters; needed are at least 2 positive finite values"
        )
    logs: Values = np.log(array)
    return logs
