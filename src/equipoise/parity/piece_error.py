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
        unrounded: As ``relative``, with no activation put on a grid: weights alone are rounded.
        unrounded_peak: As ``peak``, likewise.
        explained: As ``relative``: what rounding explains.
        explained_peak: As ``peak``: what rounding explains.
        shape: In words, how the shape differs; empty when it does not.
        failure: Why the piece does not run; empty when it does.
    """

    relative: float = 0.0
    peak: float = 0.0
    unrounded: float = 0.0
    unrounded_peak: float = 0.0
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


class _Sum:
    """Squares and the largest of something."""

    def __init__(self) -> None:
        self.squares = self.largest = 0.0

    def add(self, array: Array) -> None:
        """Add an array of any size."""
        self.squares += float(np.square(array).sum())
        self.largest = max(self.largest, float(np.abs(array).max(initial=0.0)))

    def relative_to(self, signal: _Sum) -> float:
        """Root of the share of squares."""
        return math.sqrt(_share(self.squares, signal.squares))

    def peak_of(self, signal: _Sum) -> float:
        """Share of the largest values."""
        return _share(self.largest, signal.largest)


class PieceMeter:
    """Collects the error of one piece, sample by sample.

    Args:
        bounds: Ends of the grid onto which its value is put next: what lies beyond is cut off there
            and not here.
    """

    def __init__(self, bounds: tuple[Array, Array] | None = None) -> None:
        self._bounds = bounds
        self._signal, self._noise, self._unrounded = _Sum(), _Sum(), _Sum()
        self._rounding, self._own = _Sum(), _Sum()
        self._shape = ""

    def add(self, reference: Array, found: Array) -> None:
        """Add a sample: what the piece should give and what it gives."""
        if reference.shape != found.shape:
            self._shape = f"its shape is {list(found.shape)}, not {list(reference.shape)}"
            return
        wanted, difference = self._difference(reference, found)
        self._signal.add(wanted)
        self._noise.add(difference)

    def add_rounding(self, reference: Array, *, still: Array, noisy: Array) -> None:
        """Add a sample: what the piece gives without rounding, and with noise of its size."""
        if still.shape != noisy.shape or still.shape != reference.shape:
            return
        self._unrounded.add(self._difference(reference, still)[1])
        own, difference = self._difference(still, noisy)
        if np.isfinite(difference).all():
            self._rounding.add(difference)
            self._own.add(own)

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
        # Where zeros alone are right, the noise of what is wrong explains nothing.
        basis = self._signal if self._signal.squares else self._own
        return PieceError(
            relative=self._noise.relative_to(self._signal),
            peak=self._noise.peak_of(self._signal),
            unrounded=self._unrounded.relative_to(self._signal),
            unrounded_peak=self._unrounded.peak_of(self._signal),
            explained=self._rounding.relative_to(basis),
            explained_peak=self._rounding.peak_of(basis),
            shape=self._shape,
        )


def _share(part: float, whole: float) -> float:
    if not part:
        return 0.0
    return part / whole if whole else math.inf
