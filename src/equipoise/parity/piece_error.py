"""How far a piece of a candidate is off, beside what the rounding of its arithmetic explains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise.spec import Array

MASK_MAGNITUDE: Final = 1e9
"""From here on a value is a mask constant, whose exact size says nothing."""

_MASKED: Final = 1e4
"""A mask in half precision is at least as large: 65504 is its largest number."""


@dataclass(frozen=True, kw_only=True)
class PieceError:
    """Error of a piece over all samples.

    Attributes:
        relative: Root of (sum of squared difference / sum of squared reference).
        peak: Largest absolute difference / largest absolute reference.
        explained: As ``relative``: what rounding explains.
        explained_peak: As ``peak``: what rounding explains.
        shape: In words, how the shape differs; empty when it does not.
        failure: Why the piece does not run; empty when it does.
    """

    relative: float = 0.0
    peak: float = 0.0
    explained: float = 0.0
    explained_peak: float = 0.0
    shape: str = ""
    failure: str = ""

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise in dB; None when nothing differs."""
        if not self.relative:
            return None
        return -20 * math.log10(self.relative) if math.isfinite(self.relative) else -400.0


class PieceMeter:
    """Collects the error of one piece, sample by sample.

    Args:
        bounds: Ends of the grid onto which its value is put next: what lies beyond is cut off there
            and not here.
    """

    def __init__(self, bounds: tuple[Array, Array] | None = None) -> None:
        self._bounds = bounds
        self._signal = self._noise = self._rounding = 0.0
        self._scale = self._peak = self._rounding_peak = 0.0
        self._shape = ""

    def add(self, reference: Array, found: Array) -> None:
        """Add a sample: what the piece should give and what it gives."""
        if reference.shape != found.shape:
            self._shape = f"its shape is {list(found.shape)}, not {list(reference.shape)}"
            return
        wanted, difference = self._difference(reference, found)
        self._signal += float(np.square(wanted).sum())
        self._scale = max(self._scale, float(np.abs(wanted).max(initial=0.0)))
        self._noise += float(np.square(difference).sum())
        self._peak = max(self._peak, float(np.abs(difference).max(initial=0.0)))

    def add_rounding(self, still: Array, noisy: Array) -> None:
        """Add a sample: what the piece gives without rounding, and with noise of its size."""
        if still.shape != noisy.shape:
            return
        _, difference = self._difference(still, noisy)
        if np.isfinite(difference).all():
            self._rounding += float(np.square(difference).sum())
            largest = float(np.abs(difference).max(initial=0.0))
            self._rounding_peak = max(self._rounding_peak, largest)

    def _difference(self, reference: Array, found: Array) -> tuple[Array, Array]:
        """Reference and difference as float64, mask constants and what both cut off left out."""
        wanted, given = reference.astype(np.float64), found.astype(np.float64)
        if self._bounds is not None:
            wanted, given = np.clip(wanted, *self._bounds), np.clip(given, *self._bounds)
        masked = ~(np.abs(wanted) < MASK_MAGNITUDE)
        alike = np.sign(wanted) == np.sign(given)
        agreed = (np.isnan(wanted) & np.isnan(given)) | (alike & (np.abs(given) >= _MASKED))
        with np.errstate(invalid="ignore"):
            difference = np.where(masked, np.where(agreed, 0.0, np.inf), given - wanted)
        return np.where(masked, 0.0, wanted), np.where(np.isnan(difference), np.inf, difference)

    def result(self) -> PieceError:
        """The error so far."""
        return PieceError(
            relative=_root(self._noise, self._signal),
            peak=_share(self._peak, self._scale),
            explained=_root(self._rounding, self._signal),
            explained_peak=_share(self._rounding_peak, self._scale),
            shape=self._shape,
        )


def _root(noise: float, signal: float) -> float:
    return math.sqrt(_share(noise, signal))


def _share(part: float, whole: float) -> float:
    if not part:
        return 0.0
    return part / whole if whole else math.inf
