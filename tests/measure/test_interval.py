"""Intervals cover the truth about as often as they say, and small sets prove little."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from equipoise.data.metrics import get_metric
from equipoise.errors import UsageError
from equipoise.measure.interval import (
    bounded,
    clustered_interval,
    draw_drop,
    median_interval,
    metric_interval,
    paired_drop,
    smallest_provable_drop,
    student_t,
    trimmed_mean,
)

value = get_metric("accuracy", labels=()).value


def decisions(right: np.ndarray) -> np.ndarray:
    """Statistics of the accuracy metric."""
    return np.stack([right, np.ones_like(right)], axis=1).astype(float)


def test_metric_interval_covers_the_truth() -> None:
    """Of 100 intervals for a coin of 0.9, about 95 hold 0.9."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        found = metric_interval(decisions(generator.random(300) < 0.9), value)
        held += found.low <= 0.9 <= found.high
    assert 88 <= held <= 100


def test_equal_engines_are_not_proved_better_than_the_samples_allow() -> None:
    """No difference in n samples leaves 1 - 0.05 ** (1 / n) open (the rule of three)."""
    same = decisions(np.ones(300))
    drop = paired_drop(same, same, value, discrete=True)
    assert drop.value == 0
    assert drop.high == pytest.approx(1 - 0.05 ** (1 / 300), rel=0.01)
    assert drop.high == pytest.approx(3 / 300, rel=0.01)
    assert smallest_provable_drop(30) > 0.09


def test_pairing_sees_a_small_loss_that_the_metrics_own_intervals_hide() -> None:
    """Two per cent lost on the same samples: shown to be above one, though intervals overlap."""
    generator = np.random.default_rng(1)
    reference = generator.random(3000) < 0.8
    candidate = reference.copy()
    candidate[np.flatnonzero(reference)[:60]] = False
    drop = paired_drop(decisions(reference), decisions(candidate), value, discrete=True)
    assert drop.value == pytest.approx(0.02)
    assert 0.01 < drop.low < drop.value < drop.high < 0.03
    a, b = (metric_interval(decisions(x), value) for x in (reference, candidate))
    assert b.high > a.low


def test_bound_of_the_drop_holds_about_as_often_as_it_says() -> None:
    """The one-sided bound is above the true drop in about 95 of 100 draws."""
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        reference = generator.random(400) < 0.95
        candidate = np.where(generator.random(400) < 0.05, ~reference, reference)
        true_drop = 0.95 - (0.95 * 0.95 + 0.05 * 0.05)
        drop = paired_drop(decisions(reference), decisions(candidate), value, discrete=True)
        held += drop.high >= true_drop
    assert held >= 88


def test_median_interval_holds_the_median() -> None:
    """Around the sample median, and narrow for many values."""
    found = median_interval(np.random.default_rng(3).normal(2, 0.1, size=400))
    assert found.low < 2 < found.high
    assert found.high - found.low < 0.05


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 40])
def test_quantiles_of_t_are_those_of_scipy(degrees: int) -> None:
    """To within 1 %, also with the few degrees that few openings leave."""
    exact = stats.t.ppf(0.975, degrees)
    assert student_t(0.975, degrees=degrees) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("count", [2, 4, 5, 8, 13])
def test_trimmed_mean_is_that_of_scipy(count: int) -> None:
    """And its standard error that of the trimmed t-test of one sample with itself left out."""
    values = np.random.default_rng(count).normal(3, 1, count)
    found = trimmed_mean(values)
    assert found.mean == pytest.approx(stats.trim_mean(values, 0.2))
    cut = int(0.2 * count)
    winsorized = np.asarray(stats.mstats.winsorize(values, limits=(cut / count, cut / count)))
    kept = count - 2 * cut
    error = np.sqrt((count - 1) * winsorized.var(ddof=1) / (kept * (kept - 1)))
    assert found.variance**0.5 == pytest.approx(error)
    assert found.degrees == kept - 1


def test_clustered_interval_covers_the_truth() -> None:
    """At 4 clusters, and at 12 of which one in fifty is spoilt."""
    random = np.random.default_rng(5)
    for count, spoilt in ((4, 0.0), (12, 0.02)):
        held = 0
        for _ in range(400):
            logs = random.normal(0, 0.02, count)
            logs += (random.random(count) < spoilt) * random.normal(0, 0.5, count)
            found = clustered_interval(2 * np.exp(logs))
            held += found.low <= 2 <= found.high
        assert held >= 0.93 * 400


def test_clustered_interval_is_no_narrower_than_the_first_clusters_make_it() -> None:
    """Noise that was seen before anybody looked stays, with the square root of the clusters."""
    values = np.exp(np.r_[0.1 * np.tile([1, -1], 4), np.zeros(24)])
    alone, late = clustered_interval(values[:8]), clustered_interval(values, first=8)
    assert np.log(late.high) == pytest.approx(np.log(alone.high) / 2, rel=1e-6)
    free = clustered_interval(values)
    assert free.high - free.low < (late.high - late.low) / 2


@pytest.mark.parametrize(
    "values", [[], [1.0], [1.0, 0.0], [1.0, -2.0], [1.0, np.nan], [[1.0, 2.0]]]
)
def test_clusters_without_an_interval_are_refused(values: list) -> None:
    """One cluster has no noise to be seen; a ratio is positive."""
    with pytest.raises(UsageError, match="at least 2 positive finite values"):
        clustered_interval(np.array(values))


def test_bounds_hold_for_all_candidates_together() -> None:
    """Eight candidates that each truly lose 2 %: in about 5 of 100 draws any bound is below that.

    Each alone would be in 5 of 100, so that the best of them would pass far more often.
    """
    generator = np.random.default_rng(5)
    together = alone = 0
    for _ in range(100):
        reference = np.ones(400)
        drawn = [
            draw_drop(
                decisions(reference),
                decisions(generator.random(400) >= 0.02),
                value,
                discrete=True,
                seed=seed,
            )
            for seed in range(8)
        ]
        together += any(one.high < 0.02 for one in bounded(drawn))
        alone += any(bounded([one])[0].high < 0.02 for one in drawn)
    assert together <= 11
    assert alone > 15


def test_candidates_that_are_wrong_together_widen_each_other_little() -> None:
    """Ten that lose on the same samples are one claim; ten with losses of their own are ten."""
    reference, generator = decisions(np.ones(2000)), np.random.default_rng(3)
    right = [generator.random(2000) >= 0.05 for _ in range(10)]

    def reach(candidates: list[np.ndarray], *, discrete: bool) -> float:
        drawn = [
            draw_drop(reference, decisions(one), value, discrete=discrete, seed=seed)
            for seed, one in enumerate(candidates)
        ]
        return bounded(drawn)[0].high - drawn[0].value

    same = right[:1] * 10
    assert reach(same, discrete=False) == reach(same[:1], discrete=False)
    assert reach(same, discrete=True) < reach(right, discrete=True)
    assert reach(right, discrete=False) > 1.1 * reach(right[:1], discrete=False)


def test_losses_are_bounded_as_a_rare_event_is() -> None:
    """k losses of n: the bound is the 95 % quantile of a gamma distribution of k + 1."""
    quantiles = {0: 2.996, 1: 4.744, 2: 6.296, 5: 10.513}
    for lost, quantile in quantiles.items():
        candidate = np.ones(2000)
        candidate[:lost] = 0
        drop = paired_drop(decisions(np.ones(2000)), decisions(candidate), value, discrete=True)
        assert drop.high == pytest.approx(quantile / 2000, rel=0.06)


def test_what_certainly_loses_too_much_widens_no_other_bound() -> None:
    """Ten hopeless candidates beside a good one change nothing of it; near ones do."""
    reference, good = decisions(np.ones(1000)), decisions(np.ones(1000))
    hopeless, near = np.ones(1000), np.ones(1000)
    hopeless[:300] = 0
    near[:8] = 0

    def high(*others: np.ndarray) -> float:
        drawn = [
            draw_drop(reference, one, value, discrete=True, seed=seed)
            for seed, one in enumerate([good, *map(decisions, others)])
        ]
        return bounded(drawn, allowed=0.01)[0].high

    assert high(*[hopeless] * 10) == high()
    assert high(*[near] * 10) > high()


def test_confidence_and_bounds_of_the_metric_itself() -> None:
    """More confidence is a wider bound; without a reference the drop is the metric, negated."""
    right = np.ones(500)
    right[:25] = 0
    pair = decisions(np.ones(500)), decisions(right)
    bounds = [paired_drop(*pair, value, discrete=True, confidence=c).high for c in (0.9, 0.99)]
    assert bounds[0] < bounds[1]
    negated = bounded([draw_drop(None, decisions(right), value, discrete=True)])[0]
    assert negated.value == pytest.approx(-0.95)
    assert -negated.high < 0.95
    assert bounded([]) == ()
