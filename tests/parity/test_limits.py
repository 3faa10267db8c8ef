"""Limits of the user, and those that the noise floor of the model sets."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.errors import UsageError
from equipoise.parity.compare import OutputParity, ParityMeter
from equipoise.parity.limits import Limits, judge
from equipoise.parity.tolerance import ALLOWANCES, Allowed, Tolerance, allowed_difference


def parity(*, difference: float, rtol: float = 0.0) -> OutputParity:
    """Of one sample of three classes, the second value off by ``difference``."""
    meter = ParityMeter("logits", rtol=rtol)
    reference = np.array([[1.0, 4.0, 3.0]], dtype=np.float32)
    meter.add(reference, reference + np.array([[0.0, difference, 0.0]], dtype=np.float32))
    return meter.result()


def passed(found: OutputParity, limits: Limits, *, allowed: float = 0.1) -> bool:
    return all(
        f.passed for f in judge(found, limits, allowed=Allowed(atol=allowed, why="for a test"))
    )


def test_without_limits_the_noise_floor_decides() -> None:
    assert passed(parity(difference=0.09), Limits())
    assert not passed(parity(difference=0.11), Limits())


def test_a_limit_takes_the_place_of_the_noise_floor() -> None:
    assert passed(parity(difference=0.5), Limits(min_cosine=0.9))
    assert passed(parity(difference=0.5), Limits(atol=0.51))
    assert not passed(parity(difference=0.5), Limits(atol=0.49))


def test_atol_and_rtol_are_those_of_numpy() -> None:
    """|difference| <= atol + rtol * |reference|, value by value."""
    for difference in (0.2, 0.4, 0.6):
        for atol, rtol in ((0.0, 0.1), (0.1, 0.05), (0.3, 0.01), (0.0, 0.12)):
            found = parity(difference=difference, rtol=rtol)
            reference = np.array([1.0, 4.0, 3.0], dtype=np.float32)
            other = reference + np.array([0.0, difference, 0.0], dtype=np.float32)
            assert passed(found, Limits(atol=atol, rtol=rtol)) == np.allclose(
                other, reference, atol=atol, rtol=rtol
            )


@pytest.mark.parametrize(
    ("limits", "good", "bad"),
    [
        (Limits(min_sqnr_db=20.0), 0.4, 0.6),
        (Limits(min_cosine=0.999), 0.1, 0.9),
        (Limits(max_flips=0.0), -0.9, -1.1),
    ],
)
def test_every_measure_has_two_sides(limits: Limits, good: float, bad: float) -> None:
    assert passed(parity(difference=good), limits)
    assert not passed(parity(difference=bad), limits)


def test_a_finding_says_what_was_measured_and_what_is_allowed() -> None:
    finding = judge(
        parity(difference=0.5), Limits(min_sqnr_db=30.0), allowed=Allowed(atol=0.1, why="")
    )[0]
    assert (finding.output, finding.measure) == ("logits", "SQNR")
    assert finding.measured == "20.2 dB"
    assert finding.allowed == "at least 30 dB"


@pytest.mark.parametrize(
    "limits",
    [{"atol": -1.0}, {"min_cosine": 1.1}, {"max_flips": -0.1}, {"rtol": float("nan")}],
)
def test_a_limit_that_means_nothing_is_a_usage_error(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"--[a-z-]+ is .* is possible"):
        Limits(**limits)


def test_nan_passes_nothing() -> None:
    meter = ParityMeter("y")
    meter.add(np.ones((1, 4), np.float32), np.full((1, 4), np.nan, np.float32))
    found = meter.result()
    for limits in (
        Limits(), Limits(atol=1e30), Limits(min_sqnr_db=0.0), Limits(min_cosine=0.5)
    ):  # fmt: skip
        assert not passed(found, limits)


def test_a_coarser_precision_may_cost_more() -> None:
    tolerance = Tolerance(output="y", atol=32e-7, floor=1e-7)
    allowed = [allowed_difference(tolerance, precision=p, scale=0.25).atol for p in ALLOWANCES]
    assert allowed == sorted(allowed)
    assert allowed[0] == tolerance.atol


@pytest.mark.parametrize("precision", sorted(set(ALLOWANCES) - {"float32"}))
def test_a_noisy_model_is_no_excuse_for_everything(precision: str) -> None:
    loud = Tolerance(output="y", atol=0.0, floor=1.0)
    allowed = allowed_difference(loud, precision=precision, scale=2.0)
    assert allowed.atol == 2 * ALLOWANCES[precision].most
    assert "of the largest value, 2" in allowed.why


def test_little_noise_is_enough_by_itself() -> None:
    """A peak above the floor passes where the noise as a whole is small, and not elsewhere."""
    quiet = Allowed(atol=0.01, sqnr_db=30.0, why="")
    for difference, enough in ((0.1, True), (0.5, False)):
        found = judge(parity(difference=difference), Limits(), allowed=quiet)[0]
        assert found.passed == enough
        assert "or 30 dB" in found.allowed


# Measures.


def test_kl_is_that_of_the_softmax() -> None:
    """And of the values themselves where they are probabilities."""
    scores = np.random.default_rng(0).normal(size=(5, 7))
    other = scores + np.random.default_rng(1).normal(size=(5, 7)) / 10
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (scores, other))
    expected = (p * np.log(p / q)).sum(-1).mean()
    for first, second in ((scores, other), (p, q)):
        meter = ParityMeter("y")
        meter.add(first, second)
        assert meter.result().kl == pytest.approx(expected, rel=1e-6)


def test_top_k_overlap_counts_entries_not_places() -> None:
    reference = np.array([[9.0, 8.0, 7.0, 1.0, 0.0, 0.0]])
    meter = ParityMeter("y")
    meter.add(reference, np.array([[7.0, 8.0, 9.0, 1.0, 0.0, 0.0]]))
    meter.add(reference, np.array([[9.0, 8.0, 0.0, 7.0, 0.0, 0.0]]))
    found = meter.result()
    assert found.top_k == 3
    assert found.top_k_overlap == pytest.approx((1 + 2 / 3) / 2)
    assert found.flips == 0.5


def test_a_relative_error_is_not_that_of_a_value_near_zero() -> None:
    meter = ParityMeter("y")
    meter.add(np.array([10.0, 1e-9]), np.array([10.1, 1e-3]))
    assert meter.result().max_rel == pytest.approx(0.01)
