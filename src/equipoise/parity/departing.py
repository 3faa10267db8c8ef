"""Which pieces of a candidate depart: what is off by more than its arithmetic explains."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from equipoise.parity.cut import NOISE, CutGraph, Piece
from equipoise.parity.piece_error import PieceError

_FACTOR: Final = 4.0
"""Honest pieces, whatever their arithmetic, have 0.3 to 2.7 times the error that noise of the size
of their rounding makes in them (benchmarks/records/blame.json)."""

_PEAK_FACTOR: Final = 16.0
"""The largest difference of float32 is a few units in the last place, and scatters: up to 6 times
in honest pieces. Of coarser arithmetic it is up to 1.6 times, so ``_FACTOR`` will do."""

_SATURATED: Final = 0.05
"""Calibrators cut off what is rare, and that is more than rounding at a few values. It is a fault
when so much of the signal is lost: 26 dB."""

_UNEXPLAINED: Final = 0.3
"""Integers that are no Q/DQ: how large their steps are is not known. Blocks of 4 bits and dynamic
int8 lose up to 0.22."""

_UNLIKE: Final = 4.0
"""Times the median of like pieces."""

_FILE_SHARE: Final = 0.5
"""What is less than half of the typical rounding in a file is not what spoils it. Quantisers that
correct biases put as much into layers that are exact."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A piece and what it is allowed.

    Attributes:
        piece: The piece.
        error: Its error.
        departs: Whether its error is more than is allowed, or it does not run or fit at all.
        allowed: Largest allowed relative error.
        allowed_peak: Largest allowed peak error; None when peaks are not judged.
        typical: Median relative error of pieces of the same arithmetic that are not exact.
    """

    piece: Piece
    error: PieceError
    departs: bool
    allowed: float
    allowed_peak: float | None
    typical: float


def judge(graph: CutGraph, measured: Sequence[tuple[Piece, PieceError]]) -> list[Judged]:
    """All pieces with what they are allowed, in order."""
    rounding = [e.relative for p, e in measured if p.arithmetic != "float32" and e.relative]
    least = _FILE_SHARE * statistics.median(rounding) if rounding else 0.0
    return [
        _judged(
            piece,
            error,
            typical=_typical(piece, measured),
            least=least,
            saturable=bool(graph.pairs(piece.nodes)),
        )
        for piece, error in measured
    ]


def _typical(piece: Piece, measured: Sequence[tuple[Piece, PieceError]]) -> float:
    alike = [e.relative for p, e in measured if p.arithmetic == piece.arithmetic and e.relative]
    return statistics.median(alike) if alike else 0.0


def _judged(
    piece: Piece, error: PieceError, *, typical: float, least: float, saturable: bool
) -> Judged:
    """Without its grids a piece is judged strictly, with them by whether much is cut off."""
    floor = NOISE.get(piece.arithmetic, NOISE["float32"])
    allowed = max(_FACTOR * max(error.explained, floor), least)
    factor = _PEAK_FACTOR if piece.arithmetic == "float32" else _FACTOR
    peak: float | None = max(factor * max(error.explained_peak, floor), least)
    wrong = error.unrounded > allowed or error.unrounded_peak > (peak or 0.0)
    if piece.arithmetic == "integers":
        allowed, peak = max(allowed, _UNEXPLAINED, _UNLIKE * typical), None
        wrong = error.relative > allowed
    elif saturable and not wrong:
        allowed, peak = max(allowed, _SATURATED), None
        wrong = error.relative > allowed
    return Judged(
        piece=piece,
        error=error,
        departs=wrong or bool(error.failure or error.shape),
        allowed=allowed,
        allowed_peak=peak,
        typical=typical,
    )
