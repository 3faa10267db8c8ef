"""What may be cut, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from equipoise.compress.importance import Importance
from equipoise.compress.latency.allocate import Scope

MULTIPLE: Final = 8
"""Channels of a vector register in float32 on AVX2, of a tile on most others."""


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """What to cut.

    Attributes:
        importance: What makes a channel, head or layer important.
        scope: Whether layers compete with each other, or each gives the same share.
        multiple: Widths are multiples of it.
        depth: Whether whole layers may go.
        proposals: Ways to cut that are tried by their loss in each step.
    """

    importance: Importance = "taylor"
    scope: Scope = "global"
    multiple: int = MULTIPLE
    depth: bool = True
    proposals: int = 4
