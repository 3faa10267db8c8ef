"""What to do to a model, as data: a point in the search space."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.quantize.schemes import Quantization


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to make an engine from the exported model.

    Attributes:
        name: Short unique name for tables: ``int8-static-rr``.
        summary: One sentence that a user understands.
        fused: Apply the transformer fusions before quantisation.
        quantization: How to quantise; None leaves float32.
    """

    name: str
    summary: str
    fused: bool = False
    quantization: Quantization | None = None
