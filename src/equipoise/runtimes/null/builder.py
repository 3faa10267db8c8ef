"""Make an engine for the null runtime: the specs of the model as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from equipoise import fs, onnxio
from equipoise.runtimes.null.session import NullEngine
from equipoise.runtimes.protocol import (
    Availability,
    BuildSettings,
    EngineRecord,
    SessionSettings,
)

ENGINE_FILE: Final = "null.json"


class NullBuilder:
    """See :class:`equipoise.runtimes.protocol.Builder`."""

    def availability(self) -> Availability:
        """Always there."""
        return Availability(available=True, version="0")

    def build(
        self,
        model: Path,
        output: Path,
        *,
        settings: SessionSettings,  # noqa: ARG002
        options: BuildSettings | None = None,  # noqa: ARG002
    ) -> EngineRecord:
        """Write the specs of ``model``. Raises SourceError when it is no ONNX model."""
        inputs, outputs = onnxio.graph_specs(onnxio.load_model(model))
        fs.write_json(output / ENGINE_FILE, NullEngine(inputs=inputs, outputs=outputs))
        return EngineRecord(file=ENGINE_FILE, size_bytes=fs.tree_size_bytes(output), kernels={})

    def refusals(self, model: Path) -> tuple[str, ...] | None:
        """Nothing."""
        onnxio.file_specs(model)
        return ()


BUILDER: Final = NullBuilder()
