"""A measured value with its uncertainty: over samples, over rounds, over openings of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import UsageError

CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 4000
_BATCH: Final = 100
_MOST_KEPT: Final = 4000
"""Rows whose weights are kept: 128 MB at most."""

_TRIMMED: Final = 0.2
_FALL: Final = -1.5
"""Found on the tables of benchmarks/search.py: with -2 hardly any candidate but the cheapest can
pass narrowly, with -1 not even that one."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measured value with its 95 % interval, in the unit of the value."""

    value: float
    low: float
    high: float


Values = NDArray[np.float64]


def _weights(rows: int) -> Iterator[Values]:
    """``[draws, rows]`` weights of samples, batch by batch; always the same ones.

    The Bayesian bootstrap (Rubin, Annals of Statistics 9, 1981): exponential numbers whose mean is
    one in each draw, so that the weights have a Dirichlet distribution.
    """
    return iter(_kept_weights(rows)) if rows <= _MOST_KEPT else _drawn_weights(rows)


@lru_cache(maxsize=2)
def _kept_weights(rows: int) -> tuple[Values, ...]:
    """Drawing them takes ten times as long as using them."""
    return tuple(_drawn_weights(rows))


def _drawn_weights(rows: int) -> Iterator[Values]:
    generator = np.random.default_rng(0)
    for _ in range(_RESAMPLES // _BATCH):
        weights = generator.exponential(size=(_BATCH, rows))
        weights *= rows / weights.sum(axis=1, keepdims=True)
        yield weights


def metric_interval(statistics: Values, value: Callable[[Values], Values]) -> Interval:
    """A metric with its two-sided 95 % interval over evaluation samples.

    Args:
        statistics: ``[samples, k]``.
        value: Turns totals ``[..., k]`` into metric values ``[...]``.
    """
    tail = (1 - CONFIDENCE) / 2
    drawn = np.concatenate([value(weights @ statistics) for weights in _weights(len(statistics))])
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(value=float(value(statistics.sum(0))), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True)
class DrawnDrop:
    """How much of a metric a candidate loses, and how that varies over the choice of samples.

    Attributes:
        value: Metric of the reference minus that of the candidate.
        drawn: ``[resamples]``: the same with the samples weighted anew.
        unseen: ``[resamples]``: what one more sample adds, on which the candidate decides wrongly;
            zeros for a metric that does not count decisions.
    """

    value: float
    drawn: Values
    unseen: Values

    @cached_property
    def whole(self) -> Values:
        """``[resamples]``: what is lost, seen or not."""
        return self.drawn + self.unseen

    @cached_property
    def tails(self) -> Values:
        """``[resamples]``: the share of resamples in which at least as much is lost."""
        ranks = np.empty(len(self.whole))
        ranks[np.argsort(-self.whole, kind="stable")] = np.arange(1, len(self.whole) + 1)
        return ranks / len(ranks)


def draw_drop(
    reference: Values | None,
    candidate: Values,
    value: Callable[[Values], Values],
    *,
    discrete: bool,
    seed: int = 0,
) -> DrawnDrop:
    """Draw the paired drop of one candidate by the Bayesian bootstrap.

    Samples are weighted anew (:func:`_weights`), for all candidates alike. A metric that counts
    decisions (``discrete``) gets one more sample that is lost: for ``k`` losses the upper quantile
    is then that of a gamma distribution of ``k + 1``, which is the exact bound of a rare event,
    also when none was seen.

    Args:
        reference: ``[samples, k]`` statistics of the reference; None for a metric of 0, so that the
            drop is the metric itself with its sign turned.
        candidate: ``[samples, k]``, same samples in the same order.
        value: Turns totals ``[..., k]`` into metric values ``[...]``.
        discrete: Whether the metric counts decisions.
        seed: For the unseen losses, which are another candidate's own.
    """
    rows = len(candidate)
    drawn = [_drops(reference, candidate, value, weights=weights) for weights in _weights(rows)]
    unseen = _unseen_losses(seed) / rows if discrete else np.zeros(_RESAMPLES)
    point = _drops(reference, candidate, value, weights=np.ones((1, rows)))
    return DrawnDrop(value=float(point[0]), drawn=np.concatenate(drawn), unseen=unseen)


def _drops(
    reference: Values | None,
    candidate: Values,
    value: Callable[[Values], Values],
    *,
    weights: Values,
) -> Values:
    """``[draws]``: drops with samples weighted by ``[draws, samples]``."""
    wanted = 0.0 if reference is None else value(weights @ reference)
    drops: Values = wanted - value(weights @ candidate)
    return drops


def _unseen_losses(seed: int) -> Values:
    """``[resamples]`` exponential numbers: their quantiles exact, their order at random."""
    ranks = (np.arange(_RESAMPLES) + 0.5) / _RESAMPLES
    losses: Values = np.random.default_rng([1, seed]).permutation(-np.log(ranks))
    return losses


def bounded(
    drops: Sequence[DrawnDrop], *, confidence: float = CONFIDENCE, allowed: float | None = None
) -> tuple[Interval, ...]:
    """The drops with one-sided bounds.

    ``low`` is that of each alone. The ``high`` ones hold together, for all candidates with the
    stated confidence, so that the best may be picked among those that pass. What may be wrong is
    spent on the candidates in their order, in proportion to ``j ** -1.5`` for the ``j``-th: the
    first ones, which would be chosen, have bounds little wider than alone. Candidates that are
    wrong on the same samples are wrong together, so the levels are such that in the stated share of
    resamples none of them loses more than its bound (the weighted minimum of p-values: Westfall and
    Young, Resampling-Based Multiple Testing, 1993, ch. 2). What certainly loses more than
    ``allowed`` cannot pass, so it can make no claim false, and nothing is spent on it.

    Args:
        drops: Of all candidates, the ones that matter most first. The order must not come from
            their drops; by their cost it does not.
        confidence: Of the bounds.
        allowed: Largest drop that a candidate may have; None for no limit.
    """
    lows = [float(np.quantile(drop.drawn, 1 - confidence)) for drop in drops]
    may_pass = [i for i, low in enumerate(lows) if allowed is None or low <= allowed]
    levels = np.full(len(drops), confidence)
    levels[may_pass] = 1 - _spent([drops[i] for i in may_pass], wrong=1 - confidence)
    return tuple(
        Interval(value=drop.value, low=low, high=max(_upper(drop, float(level)), drop.value))
        for drop, low, level in zip(drops, lows, levels, strict=True)
    )


def _spent(drops: Sequence[DrawnDrop], *, wrong: float) -> Values:
    """``[drops]``: how often each may be wrong, so that any of them is in a share ``wrong``."""
    if not drops:
        return np.zeros(0)
    shares = np.arange(1, len(drops) + 1) ** _FALL
    least = np.min([drop.tails / share for drop, share in zip(drops, shares, strict=True)], axis=0)
    spent: Values = shares * np.quantile(least, wrong, method="lower")
    return spent


def _upper(drop: DrawnDrop, level: float) -> float:
    return float(np.quantile(drop.whole, level))


def paired_drop(
    reference: Values,
    candidate: Values,
    value: Callable[[Values], Values],
    *,
    discrete: bool,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Metric of the reference minus that of one candidate, with bounds that hold for it alone.

    Args and the method are those of :func:`draw_drop` and :func:`bounded`.
    """
    drawn = draw_drop(reference, candidate, value, discrete=discrete)
    return bounded([drawn], confidence=confidence)[0]


def smallest_provable_drop(samples: int, *, confidence: float = CONFIDENCE) -> float:
    """The share of decisions that may be wrong unseen in ``samples``.

    A difference in ``n`` samples is missed with probability 5 % even when a share
    ``1 - 0.05**(1/n)`` of all inputs is decided otherwise (the rule of three: Hanley and
    Lippman-Hand, JAMA 249, 1983).
    """
    return float(1 - (1 - confidence) ** (1 / samples))


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
