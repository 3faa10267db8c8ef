"""Intervals cover the truth about as often as they say, and small sets prove little."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.data.metrics import get_metric
from equipoise.measure.interval import (
    median_interval,
    metric_interval,
    paired_drop,
    smallest_provable_drop,
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
    assert drop.high == pytest.approx(1 - 0.05 ** (1 / 300))
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
