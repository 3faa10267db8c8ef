"""What the export stage takes and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.export.proving import Shapes
from equipoise.graph.clean import CleanRecord
from equipoise.parity.proof import ProofRecord, VerifyRecord
from equipoise.sources.source import Source
from equipoise.spec import TensorSpec

PROOF_DIRECTORY: Final = "proof"
"""Beside the model in the output of the stage."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export.

    Attributes:
        source: The trained model.
        samples: Directory of inputs, written by ``data.store``; None lets the model's tokenizer,
            processor or signature make them.
        inputs: Specs of the samples; a name is a dimension that may be dynamic.
        shapes: Which dimensions are dynamic.
        opset: ONNX opset that the target wants.
        max_ir_version: Largest IR version that the target reads.
        exporter: The only exporter to try; all of them in turn when empty.
        release: Leave out the exporter's metadata.
        rung_time_limit_s: Limit for one exporter.
    """

    source: Source
    samples: Path | None = None
    inputs: tuple[TensorSpec, ...] = ()
    shapes: Shapes = field(default_factory=Shapes)
    opset: int = 20
    max_ir_version: int = 13
    exporter: str = ""
    release: bool = False
    rung_time_limit_s: float = 900.0


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """What was exported.

    Attributes:
        exporter: The rung whose file was kept; ``none`` for a source that is ONNX already.
        proof: Where the inputs of the proof and its tolerances come from, and what it ran.
        verified: Specs and versions read back from the file, and its parity at every size.
        cleaned: What the clean-up did.
        preprocessing: What is done to a picture first, where the source says it.
        notes: One line per exporter that was tried, and why it was kept or not.
    """

    exporter: str
    proof: ProofRecord
    verified: VerifyRecord
    cleaned: CleanRecord
    preprocessing: ImagePreprocessing | None
    notes: tuple[str, ...]
