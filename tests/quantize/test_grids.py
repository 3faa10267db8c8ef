"""Grids round as ONNX Runtime does, lose half a step at most, and keep zero exact."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from equipoise.quantize.grids import INTEGERS, Grid, activation_grid, weight_grid

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
TYPES = st.sampled_from(sorted(INTEGERS))


def runtime_rounds(values: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Integers and floats that ONNX Runtime makes of ``values``."""
    axis = {} if grid.axis is None else {"axis": grid.axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **axis),
    ]
    kind = helper.np_dtype_to_tensor_dtype(grid.zero_point.dtype)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)],
        [helper.make_tensor_value_info("q", kind, None),
         helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(grid.scale, "s"), numpy_helper.from_array(grid.zero_point, "z")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return tuple(session.run(None, {"x": values}))


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, (4, 5), elements=FLOATS), FLOATS, FLOATS, TYPES, st.booleans())
def test_activations_round_as_onnx_runtime_rounds_them(values, a, b, dtype, symmetric) -> None:
    """Bit for bit, saturation included."""
    grid = activation_grid(min(a, b), max(a, b), dtype=dtype, symmetric=symmetric)
    integers, back = runtime_rounds(values, grid)
    np.testing.assert_array_equal(grid.quantize(values), integers)
    np.testing.assert_array_equal(grid.dequantize(integers), back)
    np.testing.assert_array_equal(grid.round(values), back)
    assert grid.quantize(values).dtype == grid.dtype == dtype


@settings(deadline=None, max_examples=40)
@given(arrays(np.float32, (4, 3), elements=FLOATS), st.sampled_from([0, 1]))
def test_weights_round_as_onnx_runtime_rounds_them(values, axis) -> None:
    """With a scale per channel along either axis."""
    grid = weight_grid(np.abs(values).max(axis=1 - axis), axis=axis)
    integers, back = runtime_rounds(values, grid)
    np.testing.assert_array_equal(grid.quantize(values), integers)
    np.testing.assert_array_equal(grid.round(values), back)


@settings(deadline=None, max_examples=200)
@given(
    ends=st.tuples(FLOATS, FLOATS),
    dtype=TYPES,
    shares=arrays(np.float64, 16, elements=st.floats(0, 1)),
    symmetric=st.booleans(),
    power_of_two=st.booleans(),
)
def test_values_of_the_range_lose_half_a_step_at_most(ends, dtype, shares, symmetric, power_of_two):
    """A step at the very ends, as the zero point is rounded too; zero is exact."""
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    grid = activation_grid(
        min(ends), max(ends), dtype=dtype, symmetric=symmetric, power_of_two=power_of_two
    )
    values = (low + (high - low) * shares).astype(np.float32)
    step, slack = float(grid.scale), 1e-6 * (high - low)
    error = np.abs(grid.round(values).astype(np.float64) - values)
    inside = (values > low + step) & (values < high - step)
    assert error.max() <= step + slack
    assert (error[inside] <= 0.5 * step + slack).all()
    assert not grid.round(np.zeros(1, np.float32)).any()
    if power_of_two:
        assert np.frexp(step)[0] == 0.5


@settings(deadline=None, max_examples=100)
@given(FLOATS, FLOATS, TYPES, st.booleans())
def test_what_is_on_the_grid_stays(a, b, dtype, symmetric) -> None:
    """Rounding twice is rounding once, and integers come back as they were."""
    grid = activation_grid(min(a, b), max(a, b), dtype=dtype, symmetric=symmetric)
    integers = np.linspace(grid.low, grid.high, 257).astype(dtype)
    np.testing.assert_array_equal(grid.quantize(grid.dequantize(integers)), integers)


@pytest.mark.parametrize("dtype", sorted(INTEGERS))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1e-42), (-1e38, 1e38), (3, 5), (-5, -3)])
def test_every_range_has_a_usable_grid(low, high, dtype, symmetric) -> None:
    """Empty, next to nothing, huge, on one side of zero: scales are normal float32 numbers."""
    grid = activation_grid(low, high, dtype=dtype, symmetric=symmetric)
    assert np.isfinite(grid.scale)
    assert grid.scale >= np.finfo(np.float32).tiny
    assert INTEGERS[dtype][0] <= int(grid.zero_point) <= INTEGERS[dtype][1]
    for end in (low, high):
        back = float(grid.round(np.array([end], np.float32))[0])
        assert back == pytest.approx(end, abs=float(grid.scale))


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (7, 63), (4, 7)])
def test_weights_use_both_ends_of_their_bits(bits: int, most: int) -> None:
    """The largest weight lies on the last step; -128 is never used."""
    weights = np.array([[-2.0, 1.0, 0.5], [0.0, 0.0, 0.0], [3.0, -3.0, 0.1]], np.float32)
    grid = weight_grid(np.abs(weights).max(axis=1), axis=0, bits=bits)
    integers = grid.quantize(weights)
    assert (integers.min(), integers.max()) == (-most, most)
    assert not integers[1].any()
    np.testing.assert_allclose(grid.round(weights)[[0, 2], 0], weights[[0, 2], 0], rtol=1e-6)


def test_a_channel_of_next_to_nothing_keeps_a_scale_that_can_be_multiplied() -> None:
    """Its product with the scale of an activation must not vanish."""
    grid = weight_grid(np.array([1e-40, 1e-45, 0.0], np.float32), axis=0)
    small = activation_grid(0, 1e-30, dtype="uint8", symmetric=False)
    assert (grid.scale * small.scale > np.finfo(np.float32).tiny).all()
