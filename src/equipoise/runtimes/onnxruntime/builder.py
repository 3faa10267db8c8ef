"""Make an engine for ONNX Runtime: the ONNX file itself, proved to load.

The graph as ONNX Runtime rewrites it is not saved as the engine: above the extended level it holds
kernels of the CPU it was made on.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, onnxio
from equipoise.errors import SourceError
from equipoise.runtimes.onnxruntime.session import open_inference_session, session_options
from equipoise.runtimes.protocol import (
    Availability,
    BuildSettings,
    EngineRecord,
    SessionSettings,
)

ENGINE_FILE: Final = "engine.onnx"
_INTEGER_MARKS: Final = ("QLinear", "Integer", "QGemm", "QAttention", "DynamicQuantize", "NBits")


class OnnxRuntimeBuilder:
    """See :class:`equipoise.runtimes.protocol.Builder`."""

    def availability(self) -> Availability:
        """Whether onnxruntime is installed."""
        if not extras.installed("onnxruntime"):
            return Availability(
                available=False,
                reason="onnxruntime is not installed",
                install=extras.install_line("ort"),
            )
        return Availability(available=True, version=str(extras.require("onnxruntime").__version__))

    def build(
        self,
        model: Path,
        output: Path,
        *,
        settings: SessionSettings,
        options: BuildSettings | None = None,  # noqa: ARG002
    ) -> EngineRecord:
        """Copy ``model`` to ``output/engine.onnx`` and load it.

        Raises:
            SourceError: ONNX Runtime refuses the model.
        """
        kernels = rewritten_operators(model, settings=settings)
        onnxio.copy_model(model, output / ENGINE_FILE)
        return EngineRecord(
            file=ENGINE_FILE,
            size_bytes=fs.tree_size_bytes(output),
            kernels=kernels,
            notes=_notes(kernels),
        )

    def refusals(self, model: Path) -> tuple[str, ...] | None:
        """What ONNX Runtime says when it opens the model on its CPU provider."""
        onnxio.file_specs(model)
        options = session_options(SessionSettings(optimize="none"))
        try:
            open_inference_session(model, options=options)
        except SourceError as error:
            return (error.message,)
        return ()


def rewritten_operators(model: Path, *, settings: SessionSettings) -> dict[str, int]:
    """Operator type -> count in the graph as ONNX Runtime rewrites it for this machine."""
    onnx: Any = extras.require("onnx")
    with fs.scratch_directory() as folder:
        options = session_options(settings)
        options.optimized_model_filepath = str(folder / ENGINE_FILE)
        open_inference_session(model, options=options)
        graph = onnx.load(folder / ENGINE_FILE, load_external_data=False).graph
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def _notes(kernels: dict[str, int]) -> tuple[str, ...]:
    quantized = kernels.get("QuantizeLinear", 0)
    integer = sum(n for op, n in kernels.items() if any(mark in op for mark in _INTEGER_MARKS))
    if quantized and not integer:
        return (f"{quantized} QuantizeLinear nodes, but no operator runs in integers",)
    return ()


BUILDER: Final = OnnxRuntimeBuilder()
