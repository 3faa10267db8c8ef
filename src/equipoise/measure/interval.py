"""A measured value with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measured value with its 95 % interval, in the unit of the value."""

    value: float
    low: float
    high: float
