"""How far a grid reaches: never worse than the largest weight, and as good as a search by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from equipoise.errors import InputError, NonFiniteError
from equipoise.quantize.clip import FixedPoint, LargestWeight, LeastError, weight_reach
from equipoise.quantize.grids import weight_grid

ROWS = arrays(
    np.float32,
    array_shapes(min_dims=3, max_dims=3, max_side=12),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)
METHODS = [LargestWeight(), LeastError(), FixedPoint()]


def heavy_tailed(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, size=shape).astype(np.float32)


def errors(rows: np.ndarray, reach: np.ndarray, *, bits: int, power=None) -> np.ndarray:
    """Squared error of each channel, weighted by ``power``."""
    flat = rows.reshape(-1, rows.shape[2])
    grid = weight_grid(reach, axis=0, bits=bits)
    weights = np.ones(rows.shape[::2]) if power is None else power
    shared = np.repeat(weights, rows.shape[1], axis=0)
    return (np.square(grid.round(flat).astype(np.float64) - flat) * shared).sum(axis=1)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from(METHODS), st.sampled_from([4, 7, 8]))
def test_no_reach_is_beyond_the_largest_weight(rows, method, bits) -> None:
    """Finite, not negative, zero for a channel of zeros only, one per channel."""
    reach = weight_reach(rows, method=method, bits=bits)
    largest = np.abs(rows).max(axis=2).ravel()
    assert reach.shape == largest.shape
    assert reach.dtype == np.float32
    assert (reach <= largest * (1 + 1e-6)).all()
    assert ((reach > 0) == (largest > 0)).all()


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from([4, 7, 8]))
def test_least_error_is_never_worse_than_the_largest_weight(rows, bits) -> None:
    """For any weights at all: the largest is one of the reaches that are tried."""
    chosen = errors(rows, weight_reach(rows, method=LeastError(), bits=bits), bits=bits)
    whole = errors(rows, weight_reach(rows, method=LargestWeight(), bits=bits), bits=bits)
    assert (chosen <= whole * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("bits", [4, 7, 8])
def test_least_error_is_what_a_search_channel_by_channel_finds(bits: int) -> None:
    """The vectorised search against a loop."""
    rows = heavy_tailed(2, 3, 50)
    method = LeastError(steps=40, least=0.2)
    reach = weight_reach(rows, method=method, bits=bits).reshape(2, 3)
    for index in np.ndindex(2, 3):
        row = rows[index][None, None]
        largest = np.abs(row).max()
        tried = [np.array([largest * s], np.float32) for s in np.linspace(1, 0.2, 40)]
        best = min(errors(row, one, bits=bits)[0] for one in tried)
        got = errors(row, reach[index].reshape(1), bits=bits)[0]
        assert got == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize(("bits", "share"), [(4, 0.6), (8, 0.99)])
def test_clipping_pays_where_steps_are_wide(bits: int, share: float) -> None:
    """Heavy tails at 4 bits: much of the error goes; both methods find the same minimum."""
    rows = heavy_tailed(1, 16, 4096)
    whole = errors(rows, weight_reach(rows, method=LargestWeight(), bits=bits), bits=bits).sum()
    searched = LeastError(steps=200, least=0.02)
    least = errors(rows, weight_reach(rows, method=searched, bits=bits), bits=bits).sum()
    fixed = errors(rows, weight_reach(rows, method=FixedPoint(), bits=bits), bits=bits).sum()
    assert least < share * whole
    assert fixed < 1.15 * least


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_fixed_point_of_a_normal_distribution_is_the_optimum(bits: int) -> None:
    """The least expected error, by quadrature and a search."""
    from scipy import integrate, optimize, stats  # a dependency of scikit-learn

    noise = 1 / (12 * (2 ** (bits - 1) - 1) ** 2)

    def expected(reach: float) -> float:
        tail = integrate.quad(lambda x: (x - reach) ** 2 * stats.norm.pdf(x), reach, 12)[0]
        return 2 * tail + noise * reach**2 * (1 - 2 * stats.norm.sf(reach))

    best = optimize.minimize_scalar(expected, bounds=(1, 6), method="bounded").x
    rows = np.random.default_rng(1).normal(size=(1, 1, 2_000_000)).astype(np.float32)
    assert weight_reach(rows, method=FixedPoint(), bits=bits)[0] == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("method", [LeastError(steps=100, least=0.05), FixedPoint()])
def test_errors_count_by_the_power_of_their_inputs(method) -> None:
    """A large weight that reads next to nothing is clipped; one that reads much is not."""
    rows = np.random.default_rng(2).normal(size=(2, 4, 256)).astype(np.float32)
    rows[:, :, 0] = 20
    power = np.ones((2, 256))
    power[0, 0], power[1, 0] = 1e-5, 1e3
    quiet, loud = weight_reach(rows, method=method, bits=4, power=power).reshape(2, 4)
    assert quiet.max() < 6
    assert loud.min() > 15


def test_scaling_weights_scales_the_reach() -> None:
    """No figure in there has a unit."""
    rows = heavy_tailed(2, 8, 64)
    for method in METHODS:
        small = weight_reach(rows * np.float32(2**-20), method=method, bits=4)
        np.testing.assert_allclose(
            small * 2**20, weight_reach(rows, method=method, bits=4), rtol=1e-3
        )


@pytest.mark.parametrize(
    "power", [np.ones((1, 8)), np.full((2, 8), -1.0), np.full((2, 8), np.nan)], ids=str
)
def test_power_of_another_form_is_refused(power) -> None:
    """It names the shape it got and the one it wants."""
    with pytest.raises(InputError, match=r"allowed is \(2, 8\)"):
        weight_reach(heavy_tailed(2, 3, 8), method=FixedPoint(), power=power)


def test_weights_that_are_no_numbers_are_refused() -> None:
    """NaN has no reach."""
    rows = heavy_tailed(1, 2, 8)
    rows[0, 1, 3] = np.nan
    with pytest.raises(NonFiniteError):
        weight_reach(rows, method=LargestWeight())


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_were_never_seen_do_not_matter(method) -> None:
    """No power at all is the same as the same power everywhere."""
    rows = heavy_tailed(2, 3, 40)
    flat = weight_reach(rows, method=method, bits=4, power=np.zeros((2, 40)))
    np.testing.assert_allclose(flat, weight_reach(rows, method=method, bits=4), rtol=1e-5)
