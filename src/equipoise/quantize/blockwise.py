"""Block-wise quantisation of one weight matrix: rounding to nearest, HQQ and GPTQ.

Each row of a weight ``[outputs, inputs]`` is cut into blocks along its inputs, and each block has a
scale and a zero point of its own: ``weight = (code - zero) * scale`` with codes of 4 or 8 bits. The
three algorithms here differ in how they choose codes and scales, and give the same
:class:`Blocks`, so that every file format can hold every result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from equipoise.errors import NonFiniteError, RecipeError
from equipoise.spec import Array

WHOLE: Final = 0
"""Block size that stands for one block per row."""

_BLOCK_SIZES: Final = (WHOLE, 16, 32, 64, 128, 256)
_NARROWEST: Final = 0.5
"""Share of a block's range below which clipping never pays."""

_LARGEST_DAMPING: Final = 1.0
_PORTION: Final = 1 << 21
"""Weights handled at once, as the searches hold several copies; a table of embeddings has more."""


@dataclass(frozen=True, kw_only=True)
class BlockGrid:
    """The codes that a block may use.

    Attributes:
        bits: 4 or 8 bits per code.
        block_size: Inputs that share a scale: a power of two from 16 to 256, or 0 for all.
        symmetric: Fix the zero point in the middle. Costs fidelity, saves a byte per block, and is
            the only form that TensorRT reads.

    Raises:
        RecipeError: A value that no runtime has a kernel for.
    """

    bits: Literal[4, 8] = 4
    block_size: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in {4, 8}:
            raise RecipeError(f"{self.bits} bits per weight are not supported; allowed: 4, 8")
        if self.block_size not in _BLOCK_SIZES:
            allowed = ", ".join(map(str, _BLOCK_SIZES))
            raise RecipeError(
                f"block size {self.block_size} is not one of {allowed} (0: whole row)"
            )

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A quantised weight matrix.

    Attributes:
        codes: uint8 ``[outputs, inputs]``.
        scales: float32 ``[outputs, blocks]``, all positive.
        zeros: uint8 ``[outputs, blocks]``, the code of zero; ``grid.middle`` when symmetric.
        width: Inputs per block; the last block of a row may have fewer.
        grid: The grid they lie on.
    """

    codes: Array
    scales: Array
    zeros: Array
    width: int
    grid: BlockGrid

    def weight(self) -> Array:
        """The float32 ``[outputs, inputs]`` that a runtime restores."""
        inputs = self.codes.shape[1]
        zeros = np.repeat(self.zeros.astype(np.float32), self.width, axis=1)[:, :inputs]
        scales = np.repeat(self.scales, self.width, axis=1)[:, :inputs]
        restored: Array = (self.codes - zeros) * scales
        return restored


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Round to nearest (RTN).

    Attributes:
        clip_steps: Ranges to try per block, from the whole down to half of it; the one with the
            least squared error wins. 1 keeps the whole range.
    """

    kind: Literal["rtn"] = "rtn"
    clip_steps: int = 20


@dataclass(frozen=True, kw_only=True)
class HalfQuadratic:
    """HQQ: a grid that a few large weights cannot pull away from the rest.

    Attributes:
        norm: Exponent ``p < 1`` of the error that is minimised.
        strength: Weight ``beta`` of the quadratic half at the start, for errors in steps of the
            grid, so that it fits weights of any size.
        growth: Factor on ``beta`` per iteration.
        iterations: Iterations.
    """

    kind: Literal["hqq"] = "hqq"
    norm: float = 0.7
    strength: float = 10.0
    growth: float = 1.01
    iterations: int = 20


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """GPTQ: the error of each rounded input is made up for by the inputs not rounded yet.

    Attributes:
        damping: Share of the mean of the Hessian's diagonal that is added to the diagonal. More of
            it trusts the calibration data less: on texts of another kind than the calibration's
            0.1 keeps more than the customary 0.01.
        activation_order: Round the inputs with the largest activations first. Blocks stay those of
            the original order, so that no runtime has to shuffle activations.
        columns: Inputs that are rounded before the rest is brought up to date.
        clip_steps: As in :class:`Nearest`, but the error is weighted by the activations.
        hessian_bytes: Hessians held at once; more of them mean more passes over the data.
    """

    kind: Literal["gptq"] = "gptq"
    damping: float = 0.1
    activation_order: bool = True
    columns: int = 128
    clip_steps: int = 20
    hessian_bytes: int = 256 << 20


Algorithm = Nearest | HalfQuadratic | Gptq


def round_to_nearest(weight: Array, grid: BlockGrid, *, settings: Nearest | None = None) -> Blocks:
    """Round each weight to the nearest code of its block.

    Args:
        weight: float ``[outputs, inputs]``.
        grid: The grid.
        settings: How many ranges to try.

    Raises:
        NonFiniteError: ``weight`` holds NaN or infinity.
    """
    steps = (settings or Nearest()).clip_steps
    return _by_portions(weight, grid, choose=lambda blocks: _fit(blocks, grid, steps=steps))


def half_quadratic(
    weight: Array, grid: BlockGrid, *, settings: HalfQuadratic | None = None
) -> Blocks:
    """Quantise by half-quadratic splitting of ``|weight - restored| ** p``.

    Alternates a shrinkage of the errors with a closed form for the grid (Badri and Shaji,
    Half-Quadratic Quantization of Large Machine Learning Models, 2023) and keeps each block's best
    iterate. The paper moves real zero points and leaves the scales; every file format wants
    integer zero points, which hardly move, so the scales take the closed form as well.

    Args:
        weight: float ``[outputs, inputs]``.
        grid: The grid.
        settings: Norm and schedule.

    Raises:
        NonFiniteError: ``weight`` holds NaN or infinity.
    """
    chosen = settings or HalfQuadratic()
    return _by_portions(weight, grid, choose=lambda blocks: _split(blocks, grid, settings=chosen))


def gptq(weight: Array, hessian: Array, *, grid: BlockGrid, settings: Gptq | None = None) -> Blocks:
    """Quantise so that the outputs, not the weights, stay close.

    Rounds one input after the other; what the rounding changes in the outputs is taken back by the
    inputs that are still free, along the inverse Hessian of the squared output error (Frantar et
    al., GPTQ, ICLR 2023, algorithm 1).

    Args:
        weight: float ``[outputs, inputs]``.
        hessian: float64 ``[inputs, inputs]``: sum of ``x x^T`` over calibration activations ``x``.
        grid: The grid.
        settings: Damping and order.

    Raises:
        NonFiniteError: ``weight`` or ``hessian`` holds NaN or infinity.
    """
    chosen = settings or Gptq()
    _require_finite(weight, "a weight")
    _require_finite(hessian, "the activations of a layer")
    importance = np.diag(hessian)
    blocks = _cut(weight, grid)
    weights = _cut(np.sqrt(importance / (importance.max() or 1.0))[None], grid)
    scales, zeros = _fit(blocks, grid, steps=chosen.clip_steps, importance=weights)
    width = blocks.shape[2]
    order = np.arange(weight.shape[1])
    if chosen.activation_order:
        order = np.argsort(-importance, kind="stable")
    factor = _inverse_factor(hessian[np.ix_(order, order)], damping=chosen.damping)
    grids = (scales[:, order // width].T, zeros[:, order // width].T)
    ordered = _round_in_turn(weight[:, order], factor, grids, levels=grid.levels, settings=chosen)
    codes = np.empty(weight.shape, dtype=np.uint8)
    codes[:, order] = ordered
    return Blocks(codes=codes, scales=scales, zeros=zeros, width=width, grid=grid)


def _require_finite(array: Array, what: str) -> None:
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise NonFiniteError(
            f"{what} of shape {list(array.shape)} holds {bad} values that are NaN or infinite",
            hint="Look for the layer with `equipoise inspect`; its training may have diverged.",
        )


def _by_portions(
    weight: Array, grid: BlockGrid, *, choose: Callable[[Array], tuple[Array, Array]]
) -> Blocks:
    """Choose scales and zero points portion by portion of the rows, then round to nearest."""
    _require_finite(weight, "a weight")
    outputs, inputs = weight.shape
    width = _width(inputs, grid)
    blocks = -(-inputs // width)
    codes = np.empty((outputs, inputs), dtype=np.uint8)
    scales = np.empty((outputs, blocks), dtype=np.float32)
    zeros = np.empty((outputs, blocks), dtype=np.uint8)
    rows = max(1, _PORTION // inputs)
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        cut = _cut(weight[part], grid)
        scales[part], zeros[part] = choose(cut)
        coded = _encode(cut, scales[part], zeros[part], levels=grid.levels)
        codes[part] = coded.reshape(len(cut), -1)[:, :inputs]
    return Blocks(codes=codes, scales=scales, zeros=zeros, width=width, grid=grid)


def _width(inputs: int, grid: BlockGrid) -> int:
    return grid.block_size or inputs


def _cut(weight: Array, grid: BlockGrid) -> Array:
    """float32 ``[outputs, blocks, width]``, the last block filled up with zeros."""
    outputs, inputs = weight.shape
    width = _width(inputs, grid)
    missing = -inputs % width
    padded = np.pad(weight, ((0, 0), (0, missing))) if missing else weight
    return padded.astype(np.float32, copy=False).reshape(outputs, -1, width)


def _encode(blocks: Array, scales: Array, zeros: Array, *, levels: int) -> Array:
    """The nearest codes, as float32 of the shape of ``blocks``."""
    codes = blocks / scales[..., None]
    np.rint(codes, out=codes)
    codes += zeros[..., None]
    return np.clip(codes, 0, levels, out=codes)


def _restore(codes: Array, scales: Array, zeros: Array) -> Array:
    restored: Array = (codes - zeros[..., None].astype(np.float32)) * scales[..., None]
    return restored


def _extremes(blocks: Array) -> tuple[Array, Array]:
    """Lowest and highest weight of each block; zero is always within."""
    return np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)


def _range_grid(low: Array, high: Array, grid: BlockGrid) -> tuple[Array, Array]:
    """Scale and zero point that just hold ``[low, high]``."""
    if grid.symmetric:
        zeros = np.full(low.shape, grid.middle, dtype=np.uint8)
        return _positive(np.maximum(high / (grid.middle - 1), -low / grid.middle)), zeros
    scales = _positive(high / grid.levels - low / grid.levels)
    return scales, np.clip(np.rint(-low / scales), 0, grid.levels).astype(np.uint8)


def _positive(scales: Array) -> Array:
    """Scales of blocks that hold nothing but zeros become 1."""
    return np.where(scales < np.finfo(np.float32).tiny, 1, scales).astype(np.float32)


def _fit(
    blocks: Array, grid: BlockGrid, *, steps: int, importance: Array | None = None
) -> tuple[Array, Array]:
    """Scales and zero points of the range, among ``steps`` of them, with the least error.

    The error is the sum of squares, weighted by ``importance`` of shape ``[1, blocks, width]``: the
    root mean square of the activations. Their mean square, the exact cost of an error in the
    calibration data, leaves less on other data.
    """
    low, high = _extremes(blocks)
    scales, zeros = _range_grid(low, high, grid)
    if steps <= 1:
        return scales, zeros
    least = np.full(low.shape, np.inf, dtype=np.float32)
    best = scales.copy(), zeros.copy()
    for share in np.linspace(1, _NARROWEST, steps, dtype=np.float32):
        scales, zeros = _range_grid(low * share, high * share, grid)
        error = _restore(_encode(blocks, scales, zeros, levels=grid.levels), scales, zeros)
        error -= blocks
        np.square(error, out=error)
        if importance is not None:
            error *= importance
        _keep_better(best, (scales, zeros), least, error.sum(axis=-1))
    return best


def _keep_better(
    best: tuple[Array, Array], found: tuple[Array, Array], least: Array, error: Array
) -> None:
    """Take over, in place, the blocks of ``found`` whose error is below the ``least`` so far."""
    better = error < least
    least[better] = error[better]
    for kept, new in zip(best, found, strict=True):
        kept[better] = new[better]


def _split(blocks: Array, grid: BlockGrid, *, settings: HalfQuadratic) -> tuple[Array, Array]:
    """The half-quadratic iteration: codes, shrunken errors, then the grid that fits the rest."""
    scales, zeros = _range_grid(*_extremes(blocks), grid)
    least = np.full(scales.shape, np.inf, dtype=np.float32)
    best = scales.copy(), zeros.copy()
    strength = settings.strength
    for _ in range(settings.iterations):
        codes = _encode(blocks, scales, zeros, levels=grid.levels)
        errors = (blocks - _restore(codes, scales, zeros)) / scales[..., None]
        missed = (np.abs(errors) * scales[..., None]) ** settings.norm
        _keep_better(best, (scales, zeros), least, missed.sum(axis=-1))
        kept = _shrink(errors, norm=settings.norm, strength=strength) * scales[..., None]
        scales, zeros = _least_squares_grid(codes, blocks - kept, (scales, zeros), grid)
        strength *= settings.growth
    return best


def _least_squares_grid(
    codes: Array, target: Array, present: tuple[Array, Array], grid: BlockGrid
) -> tuple[Array, Array]:
    """Scale and zero point with the least squared error between ``target`` and fixed codes.

    The regression line of target on codes gives both; the zero point is then rounded to a code,
    and the scale fitted once more to what that left.
    """
    scales, zeros = present
    if not grid.symmetric:
        mean_code, mean = codes.mean(axis=-1), target.mean(axis=-1)
        steep = _slope(codes - mean_code[..., None], target - mean[..., None], scales)
        zeros = np.clip(np.rint(mean_code - mean / steep), 0, grid.levels).astype(np.uint8)
    return _slope(codes - zeros[..., None].astype(np.float32), target, scales), zeros


def _shrink(errors: Array, *, norm: float, strength: float) -> Array:
    """The proximal operator of ``|e| ** p``, generalised soft-thresholding."""
    size = np.abs(errors)
    tiny = np.finfo(np.float32).tiny
    kept: Array = np.sign(errors) * np.maximum(
        size - np.maximum(size, tiny) ** (norm - 1) / strength, 0
    )
    return kept


def _slope(codes: Array, target: Array, otherwise: Array) -> Array:
    """Least-squares factor from ``codes`` to ``target``; ``otherwise`` where it is no scale."""
    power = np.square(codes).sum(axis=-1)
    product = (codes * target).sum(axis=-1)
    usable = (power > 0) & (product > np.finfo(np.float32).tiny * np.maximum(power, 1))
    slope: Array = np.divide(product, power, out=otherwise.copy(), where=usable)
    return slope


def _inverse_factor(hessian: Array, *, damping: float) -> Array:
    """Upper Cholesky factor of the inverse of the damped Hessian, float64.

    Inputs that were never active get the mean of the diagonal: they are rounded to nearest.
    """
    diagonal = np.diag(hessian)
    mean = float(diagonal.mean()) or 1.0
    damped = hessian + np.diag(np.where(diagonal == 0, mean, damping * mean))
    try:
        lower = np.linalg.cholesky(np.linalg.inv(damped))
    except np.linalg.LinAlgError:
        if damping >= _LARGEST_DAMPING:
            raise
        return _inverse_factor(hessian, damping=max(damping * 10, 1e-6))
    upper: Array = np.ascontiguousarray(lower.T)
    return upper


def _round_in_turn(
    weight: Array,
    factor: Array,
    grids: tuple[Array, Array],
    *,
    levels: int,
    settings: Gptq,
) -> Array:
    """Codes of ``weight``, whose columns are in the order of rounding.

    ``settings.columns`` of them are rounded before their errors reach the columns further right, in
    one product instead of many (section 3.2 of the paper).
    """
    free = np.ascontiguousarray(weight.T, dtype=np.float64)
    codes = np.empty(free.shape, dtype=np.uint8)
    for start in range(0, len(free), settings.columns):
        end = min(start + settings.columns, len(free))
        errors = np.empty((end - start, free.shape[1]))
        for i in range(start, end):
            scale, zero = grids[0][i].astype(np.float64), grids[1][i]
            code = np.clip(np.rint(free[i] / scale) + zero, 0, levels)
            error = (free[i] - (code - zero) * scale) / factor[i, i]
            free[i + 1 : end] -= np.outer(factor[i, i + 1 : end], error)
            codes[i], errors[i - start] = code, error
        free[end:] -= factor[start:end, end:].T @ errors
    return codes.T
