"""Make an engine for the reference evaluator: the ONNX file itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

from equipoise import extras, fs, onnxio
from equipoise.errors import SourceError
from equipoise.runtimes.base import package_availability
from equipoise.runtimes.protocol import (
    Availability,
    BuildSettings,
    EngineRecord,
    SessionSettings,
)
from equipoise.runtimes.reference.session import open_session

ENGINE_FILE: Final = "engine.onnx"


class ReferenceBuilder:
    """See :class:`equipoise.runtimes.protocol.Builder`."""

    def availability(self) -> Availability:
        """Whether onnx is installed."""
        return package_availability("onnx", version=lambda: str(extras.require("onnx").__version__))

    def build(
        self,
        model: Path,
        output: Path,
        *,
        settings: SessionSettings,
        options: BuildSettings | None = None,  # noqa: ARG002
    ) -> EngineRecord:
        """Copy ``model`` and open it. Raises SourceError when it is no valid ONNX model."""
        open_session(model, settings=settings).close()
        graph = onnxio.load_model(model).graph
        fs.copy_file(model, output / ENGINE_FILE)
        return EngineRecord(
            file=ENGINE_FILE,
            size_bytes=fs.tree_size_bytes(output),
            kernels=dict(Counter(node.op_type for node in graph.node)),
        )

    def refusals(self, model: Path) -> tuple[str, ...] | None:
        """What the evaluator says when it opens the model."""
        onnxio.file_specs(model)
        try:
            open_session(model, settings=SessionSettings()).close()
        except SourceError as error:
            return (error.message,)
        return ()


BUILDER: Final = ReferenceBuilder()
