"""How far the grid of a weight reaches: to its largest value, or less far where that costs less.

A grid that ends at the largest weight of a channel clips nothing and has the widest steps. One that
ends before it clips a few weights and rounds all others more finely. Where the sum of both errors
is least is searched step by step, or found as a fixed point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from equipoise.errors import InputError, NonFiniteError
from equipoise.quantize.grids import weight_grid
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class LargestWeight:
    """Up to the largest magnitude of each channel: nothing is clipped."""

    kind: Literal["largest"] = "largest"


@dataclass(frozen=True, kw_only=True)
class LeastError:
    """The reach with the least squared error, out of an even series of shares of the largest.

    Attributes:
        steps: Reaches that are tried.
        least: Smallest share of the largest magnitude that is tried.
    """

    kind: Literal["least-error"] = "least-error"
    steps: int = 64
    least: float = 0.5


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """OCTAV: the fixed point of a Newton-like recursion for the least expected squared error.

    Sakr et al., Optimal Clipping and Magnitude-aware Differentiation for Improved
    Quantization-aware Training, arXiv 2206.06501, section 3, with the step of the grid at hand:
    ``s' = sum of |w| over |w| > s / (#(|w| <= s) / (12 most^2) + #(|w| > s))``.

    Attributes:
        iterations: Most iterations; it is quadratic, so a few do.
        tolerance: Largest relative change at which it has converged.
    """

    kind: Literal["fixed-point"] = "fixed-point"
    iterations: int = 20
    tolerance: float = 1e-4


Clipping = LargestWeight | LeastError | FixedPoint


def weight_reach(
    rows: Array, *, method: Clipping, bits: int = 8, power: Array | None = None
) -> Array:
    """How far the grid of each channel reaches to either side.

    Args:
        rows: float32 weights ``[groups, outputs, inputs]``, as ``Layer.rows`` gives them.
        method: How to choose.
        bits: Bits of the grid.
        power: ``[groups, inputs]``, the mean square of each input of the layer. With it, errors of
            weights count by what they do to the output of the layer, inputs taken as uncorrelated.

    Returns:
        float32 ``[groups * outputs]``, for ``weight_grid``.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
        InputError: ``power`` has another shape, or is negative or not finite.
    """
    if not np.isfinite(rows).all():
        raise NonFiniteError(
            "a weight is NaN or infinite", hint="Look at the checkpoint: training has diverged."
        )
    counted = _counted(rows, power)
    largest = np.abs(rows).max(axis=2, initial=0.0)
    if isinstance(method, LeastError):
        reach = _least_error(rows, largest, counted, method=method, bits=bits)
    elif isinstance(method, FixedPoint):
        reach = _fixed_point(np.abs(rows), largest, counted, method=method, bits=bits)
    else:
        reach = largest
    return np.asarray(reach, dtype=np.float32).ravel()


def _counted(rows: Array, power: Array | None) -> Array:
    """What each weight counts for, ``[groups, 1, inputs]``, with a largest value of about one."""
    groups, _, inputs = rows.shape
    if power is None:
        return np.ones((1, 1, 1), dtype=np.float32)
    if power.shape != (groups, inputs) or not (np.isfinite(power).all() and (power >= 0).all()):
        raise InputError(
            f"the power of the inputs has the shape {power.shape}, least value"
            f" {power.min(initial=0)}; allowed is {(groups, inputs)}, finite and not negative"
        )
    most = power.max(axis=1, keepdims=True, initial=0.0)
    # An input that is always zero is not evidence that its weights may be anything.
    shares = np.where(most > 0, power / np.where(most > 0, most, 1), 1) + 1e-6
    return shares.astype(np.float32)[:, None, :]


def _least_error(
    rows: Array, largest: Array, counted: Array, *, method: LeastError, bits: int
) -> Array:
    """The best of ``method.steps`` reaches; the largest one wins a draw."""
    best, least = largest, np.full(largest.shape, np.inf)
    for share in np.linspace(1.0, method.least, method.steps):
        tried = largest * np.float32(share)
        error = _squared_error(rows, tried, counted, bits=bits)
        better = error < least
        best, least = np.where(better, tried, best), np.where(better, error, least)
    return best


def _squared_error(rows: Array, reach: Array, counted: Array, *, bits: int) -> Array:
    """``[groups, outputs]``: squared error of the channels on grids of this reach."""
    grid = weight_grid(reach, axis=None, bits=bits)
    scale = grid.scale[:, :, None]
    integers = np.rint(rows / scale)
    np.clip(integers, grid.low, grid.high, out=integers)
    integers *= scale
    integers -= rows
    np.square(integers, out=integers)
    integers *= counted
    error: Array = integers.sum(axis=2)
    return error


def _fixed_point(
    magnitudes: Array, largest: Array, counted: Array, *, method: FixedPoint, bits: int
) -> Array:
    """The recursion, from the mean magnitude upwards; a channel that clips nothing stays whole."""
    noise = 1 / (12 * (2 ** (bits - 1) - 1) ** 2)
    weights = np.broadcast_to(counted, magnitudes.shape)
    reach: Array = (magnitudes * weights).sum(axis=2) / weights.sum(axis=2)
    for _ in range(method.iterations):
        clipped = np.where(magnitudes > reach[:, :, None], weights, 0)
        outside = clipped.sum(axis=2)
        inside = weights.sum(axis=2) - outside
        wanted = (magnitudes * clipped).sum(axis=2) / np.maximum(noise * inside + outside, 1e-30)
        new = np.where(outside > 0, np.minimum(wanted, largest), largest)
        settled = np.abs(new - reach) <= method.tolerance * largest
        reach = new
        if settled.all():
            break
    return reach
