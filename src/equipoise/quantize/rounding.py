"""Rounding weights so that their errors cancel on the data, not each to its nearest integer.

The columns of a weight are rounded one after another; what each rounding changes in the layer's
output is made up for, as far as the data allows, by the columns that are still to come. This is
GPTQ (Frantar et al., arXiv 2210.17323, section 3) with its columns in the order of activation
power. The inputs are taken as they come back from their own grid, so that one solves for the
product that the device computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from equipoise.quantize.grids import Grid
from equipoise.quantize.layers import Layer
from equipoise.spec import Array

_BLOCK: Final = 32
_SMALL: Final = 64
_LEAST: Final = 1e-12
_LEAST_POSITIONS: Final = 512
_ENOUGH: Final = 512
"""Positions that are multiplied at once."""


@dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """How to round.

    Attributes:
        damping: Share of the mean diagonal that is added to the second moments: how little the data
            is trusted in directions that it hardly shows.
        positions: About so many positions count for each input of a layer, from all samples
            together, and no fewer than five hundred.
        samples: About so many samples are taken, evenly spread.
    """

    damping: float = 0.01
    positions: int = 4
    samples: int = 32

    def most(self, layer: Layer) -> int:
        """Most positions of one sample that count for ``layer``."""
        inputs = math.prod(layer.shape) // layer.channels
        return -(-max(_LEAST_POSITIONS, self.positions * inputs) // self.samples)


class SecondMoments:
    """Mean of what a layer reads, and ``X^T X``: float32 ``[groups, inputs, inputs]``.

    Args:
        layer: Whose patches.
        settings: How many positions of one sample are taken, and how much they are trusted.
    """

    def __init__(self, layer: Layer, *, settings: RoundingSettings) -> None:
        self._layer, self._settings = layer, settings
        self._sum: Array = np.zeros((), dtype=np.float32)
        self._total: Array = np.zeros(())
        self._count = 0
        self._waiting: list[Array] = []

    def add(self, activation: Array, *, grid: Grid) -> None:
        """Add one sample: an input of the layer, and the grid that it goes through."""
        patches = self._layer.patches(activation, most=self._settings.most(self._layer))
        self._waiting.append(grid.round(patches))
        if sum(patches.shape[1] for patches in self._waiting) >= _ENOUGH:
            self._flush()

    def _flush(self) -> None:
        """Multiply what has come together: many small products cost more than one."""
        if self._waiting:
            patches = np.ascontiguousarray(np.concatenate(self._waiting, axis=1))
            self._sum = self._sum + patches.transpose(0, 2, 1) @ patches
            self._total = self._total + patches.sum(axis=1, dtype=np.float64)
            self._count += patches.shape[1]
            self._waiting = []

    @property
    def sum(self) -> Array:
        """The sum so far."""
        self._flush()
        return self._sum

    @property
    def mean(self) -> Array:
        """float64 ``[groups, inputs]``: the mean of what was added."""
        self._flush()
        return self._total / max(self._count, 1)

    @property
    def power(self) -> Array:
        """``[groups, inputs]``: the mean square of what was added."""
        return np.diagonal(self.sum, axis1=1, axis2=2) / max(self._count, 1)

    @cached_property
    def elimination(self) -> Elimination:
        """What rounding needs of the sum, when all is added; layers that share it share this."""
        return eliminate(self.sum, damping=self._settings.damping)


@dataclass(frozen=True, kw_only=True, eq=False)
class Elimination:
    """In which order columns are rounded, and how errors move to the next ones.

    Attributes:
        order: int64 ``[groups, inputs]``, by falling power.
        upper: float32 ``[groups, inputs, inputs]``, ``U`` with ``inv(H) = U^T U`` in that order.
    """

    order: Array
    upper: Array


def eliminate(moments: Array, *, damping: float) -> Elimination:
    """Order the columns of ``moments`` and factor its damped inverse.

    Args:
        moments: ``[groups, inputs, inputs]``, symmetric and positive semidefinite.
        damping: Share of the mean diagonal that is added to it.
    """
    order = np.argsort(-np.diagonal(moments, axis1=1, axis2=2), axis=1)
    taken = np.take_along_axis(moments, order[:, :, None], axis=1)
    damped = np.take_along_axis(taken, order[:, None, :], axis=2).astype(np.float32)
    index = np.arange(damped.shape[1])
    added = damping * damped[:, index, index].mean(axis=1) + _LEAST
    damped[:, index, index] += added[:, None]
    try:
        upper = _inverse_factor(damped)
    except np.linalg.LinAlgError:  # what float32 cannot tell from singular
        upper = _inverse_factor(damped.astype(np.float64))
    return Elimination(order=order, upper=upper)


def _inverse_factor(damped: Array) -> Array:
    """Upper triangular ``U`` with ``inv(damped) = U^T U``.

    The Cholesky factor of the matrix with rows and columns reversed is, reversed again, an upper
    ``V`` with ``damped = V V^T``; so ``U`` is the inverse of ``V``.
    """
    lower = np.linalg.cholesky(damped[:, ::-1, ::-1])
    return _inverse_upper(np.ascontiguousarray(lower[:, ::-1, ::-1])).astype(np.float32)


def _inverse_upper(upper: Array) -> Array:
    """Inverse of upper triangular matrices, by halves: nearly all of it is products."""
    size = upper.shape[1]
    if size <= _SMALL:
        return np.triu(np.linalg.inv(upper))
    half = size // 2
    inverse = np.zeros_like(upper)
    first, last = _inverse_upper(upper[:, :half, :half]), _inverse_upper(upper[:, half:, half:])
    inverse[:, :half, :half], inverse[:, half:, half:] = first, last
    inverse[:, :half, half:] = -first @ upper[:, :half, half:] @ last
    return inverse


def round_to_moments(rows: Array, elimination: Elimination, *, grid: Grid) -> Array:
    """Integers of ``rows`` whose errors cancel.

    Args:
        rows: float32 weights ``[groups, outputs, inputs]``.
        elimination: Of the second moments of what they are multiplied with.
        grid: Symmetric grid of the weights, one scale per channel or one for all.

    Returns:
        Integers of the grid's type, ``[groups, outputs, inputs]``.
    """
    groups, outputs, inputs = rows.shape
    scale = np.broadcast_to(grid.scale.reshape(-1, 1), (groups * outputs, 1))
    scale = scale.reshape(groups, outputs)
    order, upper = elimination.order, elimination.upper
    left = np.take_along_axis(rows, order[:, None, :], axis=2).astype(np.float32)
    integers = np.empty_like(left)
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        block = slice(begin, end)
        errors = _round_block(
            left[:, :, block], integers[:, :, block], upper[:, block, block], scale=scale, grid=grid
        )
        left[:, :, end:] -= errors @ upper[:, block, end:]
    back = np.argsort(order, axis=1)
    chosen: Array = np.take_along_axis(integers, back[:, None, :], axis=2)
    return chosen.astype(grid.zero_point.dtype)


def _round_block(left: Array, integers: Array, upper: Array, *, scale: Array, grid: Grid) -> Array:
    """Round a block of columns in place; return their scaled errors ``[groups, outputs, n]``."""
    errors = np.empty_like(left)
    for at in range(left.shape[2]):
        wanted = left[:, :, at]
        rounded = np.clip(np.rint(wanted / scale), grid.low, grid.high)
        integers[:, :, at] = rounded
        error = (wanted - rounded * scale) / upper[:, at, at, None]
        errors[:, :, at] = error
        left[:, :, at + 1 :] -= error[:, :, None] * upper[:, None, at, at + 1 :]
    return errors


def share_moments(
    layers: Sequence[Layer], *, settings: RoundingSettings
) -> Mapping[str, SecondMoments]:
    """Layer name -> its second moments; layers that read the same patches share one."""
    shared: dict[tuple[object, ...], SecondMoments] = {}
    found = {}
    for layer in layers:
        key = _patch_key(layer)
        if key not in shared:
            shared[key] = SecondMoments(layer, settings=settings)
        found[layer.name] = shared[key]
    return found


def _patch_key(layer: Layer) -> tuple[object, ...]:
    if layer.operator != "Conv":
        return (layer.input,)
    attributes = tuple(sorted(a.SerializeToString() for a in layer.node.attribute))
    return (layer.input, layer.shape[2:], attributes)
