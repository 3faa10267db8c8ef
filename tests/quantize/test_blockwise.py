"""Codes and scales of blocks: bounds that hold for any weight, and what each algorithm is for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from equipoise.errors import NonFiniteError, RecipeError
from equipoise.quantize import blockwise
from equipoise.quantize.blockwise import (
    BlockGrid,
    Blocks,
    Gptq,
    HalfQuadratic,
    Nearest,
    gptq,
    half_quadratic,
    round_to_nearest,
)

GRIDS = st.builds(
    BlockGrid,
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([0, 16, 32, 64]),
    symmetric=st.booleans(),
)
WEIGHTS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)
WHOLE_RANGE = Nearest(clip_steps=1)


def heavy_tailed(rows: int, columns: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, size=(rows, columns)).astype(np.float32)


def steps_of(blocks: Blocks) -> np.ndarray:
    """The step of every weight."""
    return np.repeat(blocks.scales, blocks.width, axis=1)[:, : blocks.codes.shape[1]]


def squared(weight: np.ndarray, blocks: Blocks) -> float:
    return float(np.square(weight - blocks.weight(), dtype=np.float64).sum())


@settings(deadline=None, max_examples=100)
@given(WEIGHTS, GRIDS)
def test_rounding_is_within_half_a_step_of_its_block(weight: np.ndarray, grid: BlockGrid) -> None:
    """For any weight, width and grid; zero stays zero, and codes stay on the grid."""
    blocks = round_to_nearest(weight, grid, settings=WHOLE_RANGE)
    assert blocks.codes.shape == weight.shape
    assert blocks.codes.max() <= grid.levels
    assert (blocks.scales > 0).all()
    assert not blocks.weight()[weight == 0].any()
    error = np.abs(blocks.weight().astype(np.float64) - weight)
    assert (error <= steps_of(blocks) * 0.501 + 1e-30).all()
    if grid.symmetric:
        assert (blocks.zeros == grid.middle).all()


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, GRIDS)
def test_searching_a_range_never_costs_squared_error(weight: np.ndarray, grid: BlockGrid) -> None:
    """The whole range is among those that are tried."""
    searched = squared(weight, round_to_nearest(weight, grid, settings=Nearest(clip_steps=8)))
    whole = squared(weight, round_to_nearest(weight, grid, settings=WHOLE_RANGE))
    assert searched <= whole * (1 + 1e-4) + 1e-12


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, GRIDS)
def test_half_quadratic_never_costs_error_in_its_own_norm(
    weight: np.ndarray, grid: BlockGrid
) -> None:
    """The best iterate is kept, and the first one is rounding to nearest."""
    chosen = HalfQuadratic(iterations=5)

    def missed(blocks: Blocks) -> float:
        return float((np.abs(weight - blocks.weight()).astype(np.float64) ** chosen.norm).sum())

    nearest = missed(round_to_nearest(weight, grid, settings=WHOLE_RANGE))
    assert missed(half_quadratic(weight, grid, settings=chosen)) <= nearest * (1 + 1e-3) + 1e-9


@settings(deadline=None, max_examples=25)
@given(WEIGHTS, GRIDS, st.booleans())
def test_gptq_without_correlation_is_rounding(
    weight: np.ndarray, grid: BlockGrid, activation_order
) -> None:
    """With a Hessian that is a multiple of the identity no error can be made up for."""
    chosen = Gptq(activation_order=activation_order, columns=7, clip_steps=1)
    found = gptq(weight, np.eye(weight.shape[1]) * 3, grid=grid, settings=chosen)
    plain = round_to_nearest(weight, grid, settings=WHOLE_RANGE)
    np.testing.assert_array_equal(found.scales, plain.scales)
    assert np.abs(found.codes.astype(int) - plain.codes).max() <= 1  # ties alone
    assert np.mean(found.codes == plain.codes) > 0.95


def test_portions_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is quantised some rows at a time."""
    weight = heavy_tailed(37, 80)
    whole = half_quadratic(weight, BlockGrid())
    monkeypatch.setattr(blockwise, "_PORTION", 200)
    parts = half_quadratic(weight, BlockGrid())
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_array_equal(whole.scales, parts.scales)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_keeps_outputs_on_new_activations(bits, symmetric) -> None:
    """On correlated activations of the same kind it halves the error of rounding, and more."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(12, 96)) * rng.lognormal(sigma=1, size=96)

    def activations(count: int) -> np.ndarray:
        return rng.normal(size=(count, 12)) @ mixing + 0.1 * rng.normal(size=(count, 96))

    weight = heavy_tailed(40, 96)
    grid = BlockGrid(bits=bits, symmetric=symmetric)
    known, fresh = activations(800), activations(400)

    def error(blocks: Blocks) -> float:
        return float(np.square(fresh @ (weight - blocks.weight()).T).sum())

    found = error(gptq(weight, known.T @ known, grid=grid))
    assert found < 0.5 * error(round_to_nearest(weight, grid))
    in_order = Gptq(activation_order=False)
    assert error(gptq(weight, known.T @ known, grid=grid, settings=in_order)) < 0.6 * error(
        round_to_nearest(weight, grid)
    )


def test_clipping_and_half_quadratic_serve_heavy_tails() -> None:
    """In wide blocks a few large weights take the steps of all the others."""
    weight = heavy_tailed(64, 512)
    grid = BlockGrid(block_size=256, symmetric=True)
    whole = round_to_nearest(weight, grid, settings=WHOLE_RANGE)
    assert squared(weight, round_to_nearest(weight, grid)) < 0.8 * squared(weight, whole)
    median = [
        np.median(np.abs(weight - blocks.weight()))
        for blocks in (half_quadratic(weight, grid), whole)
    ]
    assert median[0] < 0.95 * median[1]


def test_gptq_survives_dead_and_duplicate_inputs() -> None:
    """A Hessian without full rank is damped; inputs that never moved are rounded to nearest."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 32))
    x[:, 5] = 0
    x[:, 7] = x[:, 8]
    weight = heavy_tailed(16, 32)
    found = gptq(weight, x.T @ x, grid=BlockGrid(block_size=16), settings=Gptq(damping=0.0))
    assert np.isfinite(found.weight()).all()
    steps = steps_of(found)[:, 5]
    clipped = np.isin(found.codes[:, 5], [0, 15])
    assert (np.abs(found.weight() - weight)[:, 5] <= steps * 0.501)[~clipped].all()
    silent = gptq(weight, np.zeros((32, 32)), grid=BlockGrid())
    assert squared(weight, silent) < squared(weight, round_to_nearest(weight, BlockGrid())) * 1.5


def test_what_cannot_be_quantised_is_refused() -> None:
    """Not-a-number weights and activations, and grids that no kernel has."""
    weight = heavy_tailed(4, 32)
    weight[2, 3] = np.nan
    for quantise in (round_to_nearest, half_quadratic):
        with pytest.raises(NonFiniteError, match="1 values"):
            quantise(weight, BlockGrid())
    with pytest.raises(NonFiniteError, match="activations"):
        gptq(heavy_tailed(4, 32), np.full((32, 32), np.inf), grid=BlockGrid())
    with pytest.raises(RecipeError, match="allowed: 4, 8"):
        BlockGrid(bits=3)
    with pytest.raises(RecipeError, match="block size 48"):
        BlockGrid(block_size=48)
