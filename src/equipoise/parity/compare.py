"""Comparators."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OutputParity:
    """How one output of an engine compares with the reference over all samples.

    Attributes:
        name: Output tensor.
        max_abs: Largest absolute difference.
        scale: Largest absolute value of the reference.
        sqnr_db: 10 log10 of (sum of squared reference / sum of squared difference); None when
            the outputs are equal to the last bit.
        cosine: Mean over samples of the cosine between the flattened outputs.
        top1_agreement: Share of positions on the last axis whose largest entry is the same;
            None when the last axis has one entry.
    """

    name: str
    max_abs: float
    scale: float
    sqnr_db: float | None
    cosine: float
    top1_agreement: float | None
