"""Errors of rounding cancel on the data that the layer reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from equipoise.quantize.grids import activation_grid, weight_grid
from equipoise.quantize.layers import find_layers
from equipoise.quantize.rounding import (
    RoundingSettings,
    SecondMoments,
    eliminate,
    round_to_moments,
    share_moments,
)

node, info = helper.make_node, helper.make_tensor_value_info
FINE = activation_grid(-8, 8, dtype="int16", symmetric=True)


def correlated(groups: int, inputs: int, *, seed: int, positions: int = 400) -> np.ndarray:
    """Positive, strongly correlated inputs ``[groups, positions, inputs]``."""
    rng = np.random.default_rng(seed)
    few = rng.normal(size=(groups, positions, max(2, inputs // 4)))
    mixed = few @ rng.normal(size=(groups, few.shape[2], inputs))
    return np.abs(mixed + 0.1 * rng.normal(size=mixed.shape)).astype(np.float32)


def moments_of(patches: np.ndarray) -> np.ndarray:
    return patches.transpose(0, 2, 1) @ patches


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def grid_of(rows: np.ndarray, *, bits: int):
    return weight_grid(np.abs(rows).max(axis=2).ravel(), axis=0, bits=bits)


def nearest(rows: np.ndarray, grid) -> np.ndarray:
    return grid.quantize(rows.reshape(-1, rows.shape[2])).reshape(rows.shape)


def output_error(patches: np.ndarray, rows: np.ndarray, integers: np.ndarray, grid) -> float:
    flat = integers.reshape(-1, rows.shape[2])
    error = grid.dequantize(flat).reshape(rows.shape) - rows
    return float(np.square(np.einsum("gpi,goi->gpo", patches, error), dtype=np.float64).sum())


@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize(("groups", "inputs"), [(1, 64), (1, 300), (6, 9), (2, 129)])
def test_the_error_of_the_output_falls(groups: int, inputs: int, bits: int) -> None:
    """Dense, depthwise, more inputs than one block; the integers stay on the grid."""
    patches, rows = correlated(groups, inputs, seed=1), weights(groups, 5, inputs)
    grid = grid_of(rows, bits=bits)
    integers = round_to_moments(rows, eliminate(moments_of(patches), damping=0.01), grid=grid)
    assert integers.dtype == np.int8
    assert np.abs(integers.astype(int)).max() <= 2 ** (bits - 1) - 1
    plain = output_error(patches, rows, nearest(rows, grid), grid)
    assert output_error(patches, rows, integers, grid) < 0.5 * plain


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), bits=st.sampled_from([4, 8]), inputs=st.integers(1, 40))
def test_uncorrelated_inputs_are_rounded_to_the_nearest(seed, bits, inputs) -> None:
    """Nothing can be made up for by another column."""
    rows, rng = weights(2, 3, inputs, seed=seed), np.random.default_rng(seed)
    moments = np.stack([np.diag(rng.uniform(0.5, 2, size=inputs)) for _ in range(2)])
    grid = grid_of(rows, bits=bits)
    integers = round_to_moments(
        rows, eliminate(moments.astype(np.float32), damping=0.01), grid=grid
    )
    np.testing.assert_array_equal(integers, nearest(rows, grid))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_the_order_of_the_inputs_does_not_matter(seed: int) -> None:
    """Columns are taken by power: shuffled weights give the shuffled integers."""
    patches, rows = correlated(1, 24, seed=seed), weights(1, 4, 24, seed=seed)
    shuffled = np.random.default_rng(seed).permutation(24)
    grid = grid_of(rows, bits=4)
    one = round_to_moments(rows, eliminate(moments_of(patches), damping=0.01), grid=grid)
    moved = eliminate(moments_of(patches[:, :, shuffled]), damping=0.01)
    other = round_to_moments(rows[:, :, shuffled], moved, grid=grid)
    assert (one[:, :, shuffled] == other).mean() > 0.97  # but for halves, and sums in other orders


def test_each_group_has_moments_of_its_own() -> None:
    """Two groups at once are two groups one after the other."""
    patches, rows = correlated(2, 16, seed=3), weights(2, 4, 16)
    grid = weight_grid(np.float32(3), axis=None, bits=4)
    both = round_to_moments(rows, eliminate(moments_of(patches), damping=0.01), grid=grid)
    for group in range(2):
        part = slice(group, group + 1)
        alone = eliminate(moments_of(patches[part]), damping=0.01)
        np.testing.assert_array_equal(both[part], round_to_moments(rows[part], alone, grid=grid))


@pytest.mark.parametrize("moments", ["zero", "one sample", "a dead input", "tiny", "huge"])
def test_degenerate_data_still_gives_sound_integers(moments: str) -> None:
    """Never far from the nearest, never an exception."""
    patches = correlated(1, 32, seed=4)
    made = {
        "zero": np.zeros((1, 32, 32)), "one sample": moments_of(patches[:, :1]),
        "a dead input": moments_of(patches * (np.arange(32) != 7)),
        "tiny": moments_of(patches) * 1e-20, "huge": moments_of(patches) * 1e12,
    }[moments].astype(np.float32)  # fmt: skip
    rows = weights(1, 4, 32)
    grid = grid_of(rows, bits=8)
    integers = round_to_moments(rows, eliminate(made, damping=0.01), grid=grid)
    plain = nearest(rows, grid).astype(int)
    assert np.abs(integers.astype(int) - plain).max() <= (0 if moments == "zero" else 40)
    assert output_error(patches[:, :1], rows, integers, grid) <= 1.05 * output_error(
        patches[:, :1], rows, plain, grid
    )


def layers() -> tuple:
    nodes = [
        node("Conv", ["x", "a"], ["ya"], name="a", pads=[1] * 4),
        node("Conv", ["x", "b"], ["yb"], name="b", pads=[1] * 4),
        node("Conv", ["x", "c"], ["yc"], name="c"),
        node("Conv", ["x", "d"], ["yd"], name="d", group=4, pads=[1] * 4),
        node("Conv", ["ya", "e"], ["y"], name="e", pads=[1] * 4),
    ]
    shapes = {"a": (5, 4, 3, 3), "b": (7, 4, 3, 3), "c": (5, 4, 3, 3), "d": (4, 1, 3, 3),
              "e": (5, 5, 3, 3)}  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, [1, 4, 6, 6])],
        [info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights(*s), n) for n, s in shapes.items()],
    )
    return find_layers(helper.make_model(graph))


def test_layers_share_moments_only_of_equal_patches() -> None:
    """Same input, kernel and attributes, whatever the outputs; not other pads, groups, inputs."""
    found = share_moments(layers(), settings=RoundingSettings())
    assert found["a"] is found["b"]
    assert len({id(found[name]) for name in "acde"}) == 4


@pytest.mark.parametrize("samples", [500, 1])
def test_moments_are_those_of_the_patches(samples: int) -> None:
    """Summed over samples, of values that went through their grid, a share of the positions."""
    layer, rng = layers()[3], np.random.default_rng(5)
    arrays = [rng.normal(size=(1, 4, 6, 6)).astype(np.float32) for _ in range(30)]
    grid = activation_grid(-1, 1, dtype="uint8", symmetric=False)
    settings = RoundingSettings(samples=samples)
    most, moments = settings.most(layer), SecondMoments(layer, settings=settings)
    assert (most < 36) == (samples == 500)
    for sample in arrays:
        moments.add(sample, grid=grid)
    wanted = sum(
        moments_of(layer.patches(grid.round(sample), most=most).astype(np.float64))
        for sample in arrays
    )
    assert wanted.shape == (4, 9, 9)
    np.testing.assert_allclose(moments.sum, wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(moments.sum, moments.sum.transpose(0, 2, 1))
