"""Run an engine with the ONNX reference evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from equipoise import extras, onnxio
from equipoise.errors import BackendError, SourceError
from equipoise.runtimes.base import BaseSession
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array, Feeds


class ReferenceSession(BaseSession):
    """An engine opened by ``onnx.reference``."""

    def __init__(self, engine: Path) -> None:
        reference: Any = extras.require("onnx.reference")
        model = onnxio.load_model(engine)
        super().__init__(*onnxio.graph_specs(model))
        try:
            self._evaluator = reference.ReferenceEvaluator(model)
        except Exception as error:  # the evaluator raises what its operators raise
            raise SourceError(f"the reference evaluator cannot load {engine}: {error}") from error

    def _compute(self, feeds: Feeds) -> dict[str, Array]:
        try:
            results = self._evaluator.run(None, dict(feeds))
        except Exception as error:  # as above
            raise BackendError(f"the reference evaluator failed: {error}") from error
        names = (spec.name for spec in self.outputs)
        return dict(zip(names, map(np.asarray, results), strict=True))


def open_session(engine: Path, *, settings: SessionSettings) -> ReferenceSession:  # noqa: ARG001
    """Open ``engine``; it has no settings. Raises SourceError when it is no ONNX model."""
    return ReferenceSession(engine)
