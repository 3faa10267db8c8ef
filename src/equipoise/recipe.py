"""What to do to a model, as data: a point in the search space."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.compress.cutting import Pruning
from equipoise.quantize.schemes import Quantization


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to make an engine from the exported model, and to run it.

    Attributes:
        name: Short unique name for tables: ``int8-static-fused``.
        summary: One sentence that a user understands.
        target: Name of the target to build for, where it is another one than the job's: another
            runtime of the same device.
        pruning: How to prune and train before the export; None leaves the model as it is.
        fused: Apply the transformer fusions before quantisation.
        quantization: How to quantise; None leaves float32.
        threads: Threads per operator; those of the job when None.
    """

    name: str
    summary: str
    target: str = ""
    pruning: Pruning | None = None
    fused: bool = False
    quantization: Quantization | None = None
    threads: int | None = None
