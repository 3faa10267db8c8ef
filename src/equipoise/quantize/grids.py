"""Integer grids: what a float becomes on a device, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise.spec import Array

INTEGERS: Final = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "uint16": (0, 65535),
    "int16": (-32768, 32767),
}
"""Type -> least and largest integer."""

_SMALLEST_SCALE: Final = 2.0**-60
"""A scale must be a normal float32, and so must its product with another one."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values ``scale * (q - zero_point)`` for integers ``q`` of a type.

    Attributes:
        scale: float32; a scalar, or one per channel.
        zero_point: Integers of the type, of the same shape.
        low: Least ``q`` that is used.
        high: Largest ``q`` that is used.
        axis: Axis of the channels; None for one grid for all.
    """

    scale: Array
    zero_point: Array
    low: int
    high: int
    axis: int | None = None

    @property
    def dtype(self) -> str:
        """Type of the integers."""
        return str(self.zero_point.dtype)

    def quantize(self, values: Array) -> Array:
        """Integers nearest to ``values``, halves to even as ONNX says."""
        scale, zero_point = self._along(values.ndim)
        integers = np.rint(values / scale) + zero_point
        clipped: Array = np.clip(integers, self.low, self.high).astype(self.zero_point.dtype)
        return clipped

    def dequantize(self, integers: Array) -> Array:
        """float32 values of ``integers``."""
        scale, zero_point = self._along(integers.ndim)
        values: Array = (integers.astype(np.float32) - zero_point) * scale
        return values

    def round(self, values: Array) -> Array:
        """``values`` as they come back from the grid."""
        scale, zero_point = self._along(values.ndim)
        steps = np.rint(values / scale)
        np.clip(steps, self.low - zero_point, self.high - zero_point, out=steps)
        return np.multiply(steps, scale, out=steps)

    def _along(self, rank: int) -> tuple[Array, Array]:
        zero_point = self.zero_point.astype(np.float32)
        if self.axis is None:
            return self.scale, zero_point
        shape = [-1 if axis == self.axis else 1 for axis in range(rank)]
        return self.scale.reshape(shape), zero_point.reshape(shape)


def activation_grid(
    low: float, high: float, *, dtype: str, symmetric: bool, power_of_two: bool = False
) -> Grid:
    """The grid of an activation with the range ``low`` to ``high``; zero is always on it.

    Args:
        low: Least value to represent.
        high: Largest value to represent.
        dtype: A type of ``INTEGERS``.
        symmetric: The middle of the type stands for zero, and both sides reach equally far.
        power_of_two: Raise the scale to the next power of two.
    """
    least, most = INTEGERS[dtype]
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        reach = max(-low, high)
        middle = (least + most + 1) // 2
        scale, zero = reach / (most - middle), middle
    else:
        scale = (high - low) / (most - least)
        zero = least
    if power_of_two and scale > 0:
        scale = float(power_of_two_above(np.array(scale)))
    scale = max(scale, _SMALLEST_SCALE)
    if not symmetric:
        zero = int(np.clip(round(least - low / scale), least, most))
    return Grid(
        scale=np.array(scale, dtype=np.float32),
        zero_point=np.array(zero, dtype=dtype),
        low=least,
        high=most,
    )


def power_of_two_above(scale: Array) -> Array:
    """The least power of two that is not below each ``scale``, all of them positive."""
    fraction, exponent = np.frexp(scale)  # scale = fraction * 2**exponent, 0.5 <= fraction < 1
    power: Array = np.ldexp(np.ones_like(fraction), exponent - (fraction == 0.5))
    return power


def weight_grid(
    reach: Array, *, axis: int | None, bits: int = 8, power_of_two: bool = False
) -> Grid:
    """The symmetric int8 grid of weights that reach ``reach`` to either side.

    Args:
        reach: Largest magnitude: a scalar, or one per channel.
        axis: Axis of the channels.
        bits: 8, or 7 for the reduced range of CPUs whose 16-bit sums saturate.
        power_of_two: Raise the scale to the next power of two.
    """
    most = 2 ** (bits - 1) - 1
    scale = np.maximum(np.asarray(reach, dtype=np.float32) / most, np.float32(_SMALLEST_SCALE))
    scale = np.where(np.asarray(reach) == 0, np.float32(1), scale).astype(np.float32)
    if power_of_two:
        scale = power_of_two_above(scale)
    return Grid(
        scale=scale,
        zero_point=np.zeros(scale.shape, dtype=np.int8),
        low=-most,
        high=most,
        axis=axis,
    )
