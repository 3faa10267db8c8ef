"""What a bundle says of its parity with the reference: the content of ``parity.json``."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.parity.compare import OutputParity
from equipoise.parity.proof import SizeParity
from equipoise.parity.tolerance import Tolerance


@dataclass(frozen=True, kw_only=True)
class ParityRecord:
    """Parity of an engine, and of the exported float model it was made from.

    Attributes:
        reference: ``PyTorch`` or ``float ONNX``.
        exporter: Which exporter's file was kept.
        samples: Number of real samples that the engine was compared on.
        tolerances: Allowed difference of the exported float model, per output.
        exported: The exported float model against the reference, at every size it was proved at.
        engine: The engine against the reference, batch 1, on all samples.
        engine_batch: The same at another batch.
    """

    reference: str
    exporter: str
    samples: int
    tolerances: tuple[Tolerance, ...]
    exported: tuple[SizeParity, ...]
    engine: tuple[OutputParity, ...]
    engine_batch: tuple[OutputParity, ...]
