"""The remedy for unlike channels fits the case, and leaves the noise that it was chosen for."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.quantize.grids import activation_grid, weight_grid
from equipoise.quantize.treatment import (
    Product,
    Remedies,
    Treatment,
    bounds,
    choose_treatment,
    treated,
)

NOTHING = Remedies(smoothing=False, outliers=False, clipping=False)
GRID = partial(activation_grid, dtype="uint8", symmetric=False)


def product(*, loud=(), times: float = 30.0, width: int = 128, seed: int = 0) -> Product:
    """1024 tokens of Gaussian channels of which some are louder than the others."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(1024, width)).astype(np.float32)
    values[:, list(loud)] *= times
    weight = (random.normal(size=(width, 96)) / np.sqrt(width)).astype(np.float32)
    return Product(
        activation="x", values=values, low=values.min(0), high=values.max(0), weight=weight
    )


def choose(given: Product, *, bits: int = 8, remedies: Remedies | None = None) -> Treatment:
    return choose_treatment(given, grid=GRID, bits=bits, remedies=remedies or Remedies())


def measured_db(given: Product, chosen: Treatment, *, bits: int) -> float:
    """Mean over tokens of noise to signal of the integer product, in dB."""
    after, _, channels = treated(given, alpha=chosen.alpha, outliers=chosen.outliers)
    assert len(channels) == chosen.outliers
    values = GRID(*bounds(after, cut=chosen.cut)).round(after.values)
    weight = weight_grid(np.abs(after.weight).max(0), axis=1, bits=bits).round(after.weight)
    noise = values @ weight - after.values.astype(np.float64) @ after.weight
    signal = given.values.astype(np.float64) @ given.weight
    return float(-10 * np.log10((np.square(noise).sum(1) / np.square(signal).sum(1)).mean()))


CASES = {
    "alike": {},
    "one loud": {"loud": [7]},
    "four loud": {"loud": [1, 5, 60, 127]},
    "a dozen loud": {"loud": range(12)},
    "one a bit louder": {"loud": [7], "times": 5.0},
    "one extreme": {"loud": [7], "times": 300.0},
    "narrow": {"loud": [3], "width": 32},
}


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_predicted_noise_is_what_integers_make(case, bits: int) -> None:
    """With and without remedies, within half a decibel of the product computed in integers."""
    given = product(**case)
    chosen = choose(given, bits=bits)
    untreated = choose(given, bits=bits, remedies=NOTHING)
    assert chosen.sqnr_db == pytest.approx(measured_db(given, chosen, bits=bits), abs=0.5)
    assert untreated.sqnr_db == pytest.approx(measured_db(given, untreated, bits=bits), abs=0.5)
    assert chosen.untreated_db == untreated.sqnr_db == untreated.untreated_db
    assert chosen.sqnr_db >= untreated.sqnr_db


@pytest.mark.parametrize("seed", range(5))
def test_channels_alike_are_left_alone(seed: int) -> None:
    """Remedies cost nodes; here none pays for them. Cutting off extremes costs nothing."""
    chosen = choose(product(seed=seed))
    assert (chosen.alpha, chosen.outliers) == (0.0, 0)
    assert chosen.sqnr_db - chosen.untreated_db < 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loud", [[7], [0, 127]])
def test_few_loud_channels_stay_in_float(loud, seed: int) -> None:
    """The loud ones and no other; the rest gets back the bits that they cost."""
    given = product(loud=loud, seed=seed)
    chosen = choose(given)
    assert chosen.outliers == len(loud)
    _, _, channels = treated(given, alpha=chosen.alpha, outliers=chosen.outliers)
    assert channels.tolist() == loud
    assert chosen.sqnr_db > chosen.untreated_db + 15


def test_many_loud_channels_are_smoothed() -> None:
    """More than may be taken out: their range goes to the weights."""
    chosen = choose(product(loud=range(12)))
    assert chosen.alpha > 0
    assert chosen.sqnr_db > chosen.untreated_db + 6


def test_rare_extremes_are_cut_off() -> None:
    """One value of a hundred thousand does not widen the steps of all others."""
    calm = product()
    values = calm.values.copy()
    values[5, 9] = 12.0
    given = Product(
        activation="x",
        values=values,
        low=calm.low,
        high=np.maximum(calm.high, values.max(0)),
        weight=calm.weight,
    )
    chosen = choose(given, remedies=Remedies(smoothing=False, outliers=False))
    assert chosen.cut < 1
    assert chosen.sqnr_db > chosen.untreated_db + 1


@pytest.mark.parametrize("left", ["smoothing", "outliers", "clipping"])
def test_remedies_that_may_not_be_used_are_not(left: str) -> None:
    """Each switch works alone."""
    allowed = Remedies(**{name: name == left for name in ("smoothing", "outliers", "clipping")})
    chosen = choose(product(loud=[7]), remedies=allowed)
    assert chosen.alpha == 0 or left == "smoothing"
    assert chosen.outliers == 0 or left == "outliers"
    assert chosen.cut == 1 or left == "clipping"


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    width=st.integers(1, 40),
    alpha=st.sampled_from([0.0, 0.5, 0.9]),
    outliers=st.integers(0, 3),
    cut=st.floats(0.3, 1),
)
def test_treated_product_is_the_same_but_for_its_outliers(seed, width, alpha, outliers, cut):
    """Values times weights stay, less the channels taken out; ranges hold all values that stay."""
    given = product(width=width, loud=[0], seed=seed)
    after, factors, channels = treated(given, alpha=alpha, outliers=outliers)
    assert len(channels) == min(outliers, width)
    kept = np.setdiff1d(np.arange(width), channels)
    wanted = given.values[:, kept] @ given.weight[kept]
    np.testing.assert_allclose(after.values @ after.weight, wanted, rtol=1e-3, atol=1e-3)
    assert not after.values[:, channels].any()
    assert not after.weight[channels].any()
    assert (factors == 1).all() or alpha
    low, high = bounds(after, cut=1.0)
    assert low <= after.values.min()
    assert after.values.max() <= high
    narrow = bounds(after, cut=cut)
    assert low <= narrow[0] <= 0 <= narrow[1] <= high
    assert max(-narrow[0], narrow[1]) == pytest.approx(cut * max(-low, high), rel=1e-5)


def test_silent_activation_is_no_error() -> None:
    """Zeros, as from a channel group that training has switched off: nothing to lose."""
    zeros = np.zeros((10, 32), dtype=np.float32)
    given = Product(
        activation="x", values=zeros, low=zeros[0], high=zeros[0], weight=product(width=32).weight
    )
    chosen = choose(given)
    assert (chosen.alpha, chosen.outliers, chosen.cut) == (0.0, 0, 1.0)
    assert chosen.sqnr_db > 200
