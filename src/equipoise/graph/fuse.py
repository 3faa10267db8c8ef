"""The fusion stage: attention, skip layer norm and bias GELU as single ONNX Runtime operators.

By onnxscript's ``optimize_for_ort``. On a MiniLM encoder as PyTorch exports it, that fuses all six
attentions and is 2 to 4 % faster than the unfused graph; ``onnxruntime.transformers.optimizer``,
told type and heads, fuses none of them and gains nothing (benchmarks/records/fusions.json).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras, onnxio
from equipoise.errors import SourceError

MODEL_FILE: Final = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class FuseConfig:
    """Attributes: model: Float ONNX file."""

    model: Path


@dataclass(frozen=True, kw_only=True)
class FuseRecord:
    """Attributes: fusions: Fusion -> how often it was made; empty when there is nothing to fuse."""

    fusions: dict[str, int]


def fuse(config: FuseConfig, *, output: Path) -> FuseRecord:
    """Fuse the transformer blocks of ``config.model`` into ``output/model.onnx``.

    Raises:
        SourceError: The model is no ONNX file, or the rewriter cannot take it.
    """
    model = onnxio.load_ir(config.model)
    fusions: Any = extras.require("onnxscript.rewriter.ort_fusions")
    try:
        model, counts = fusions.optimize_for_ort(model)
    except Exception as error:  # a rewriter may raise anything on a graph it does not know
        raise SourceError(f"{config.model}: the fusions failed: {error}") from error
    made = {name: int(count) for name, count in counts.items() if count}
    if made:
        onnxio.save_ir(model, output / MODEL_FILE)
    return FuseRecord(fusions=made)
