"""Make an engine for ONNX Runtime: the ONNX file itself, proved to load.

The graph as ONNX Runtime rewrites it is not saved as the engine: above the extended level it holds
kernels of the CPU it was made on, and below it loads no faster than the file it was made from.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, onnxio
from equipoise.errors import IncompatibleError, SourceError
from equipoise.runtimes.base import package_availability
from equipoise.runtimes.onnxruntime.providers import CPU, place, wanted_providers
from equipoise.runtimes.onnxruntime.session import open_inference_session, session_options
from equipoise.runtimes.protocol import (
    Availability,
    BuildSettings,
    EngineRecord,
    SessionSettings,
)

ENGINE_FILE: Final = "engine.onnx"
_INTEGER_MARKS: Final = ("QLinear", "Integer", "QGemm", "QAttention", "DynamicQuantize", "NBits")
_LAYERS: Final = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What runs: counts of operators, and what to say of them."""

    kernels: dict[str, int]
    notes: tuple[str, ...] = ()
    loaded: bool = True


class OnnxRuntimeBuilder:
    """See :class:`equipoise.runtimes.protocol.Builder`."""

    def availability(self) -> Availability:
        """Whether onnxruntime is installed."""
        return package_availability(
            "onnxruntime", version=lambda: str(extras.require("onnxruntime").__version__)
        )

    def build(
        self,
        model: Path,
        output: Path,
        *,
        settings: SessionSettings,
        options: BuildSettings | None = None,  # noqa: ARG002
    ) -> EngineRecord:
        """Copy ``model`` to ``output/engine.onnx`` and load it.

        It is loaded on the CPU alone where a provider that ``settings`` name is not here.

        Raises:
            SourceError: ONNX Runtime refuses the model.
            UsageError: ``settings`` name no execution provider.
            IncompatibleError: A provider that is here does not take the whole model.
        """
        run = _run(model, settings=settings)
        onnxio.copy_model(model, output / ENGINE_FILE)
        return EngineRecord(
            file=ENGINE_FILE,
            size_bytes=fs.tree_size_bytes(output),
            kernels=run.kernels,
            notes=run.notes,
            loaded=run.loaded,
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


def _run(model: Path, *, settings: SessionSettings) -> _Run:
    wanted = wanted_providers(settings.providers)
    if [each.name for each in wanted] == [CPU]:
        graph = _rewritten_graph(model, settings=settings)
        as_written = settings.optimize == "none"
        return _Run(kernels=_operators(graph), notes=() if as_written else _notes(graph))
    try:
        place(wanted, options=session_options(settings))
    except IncompatibleError as error:
        graph = _rewritten_graph(model, settings=settings)
        note = f"loaded on the CPU alone: {error.message}"
        return _Run(kernels=_operators(graph), notes=(note,), loaded=False)
    return _placed(model, settings=settings)


def _placed(model: Path, *, settings: SessionSettings) -> _Run:
    """Operators by the provider that took them: ``Conv QNNExecutionProvider``."""
    options = session_options(settings)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = open_inference_session(model, options=options, providers=settings.providers)
    taken: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        taken[part.ep_name] += len(part.get_nodes())
        kernels.update(f"{node.op_type} {part.ep_name}" for node in part.get_nodes())
    shares = ", ".join(f"{name} {count}" for name, count in sorted(taken.items()))
    notes = (f"nodes by execution provider: {shares}",)
    return _Run(kernels=dict(sorted(kernels.items())), notes=notes)


def rewritten_operators(model: Path, *, settings: SessionSettings) -> dict[str, int]:
    """Operator type -> count in the graph as ONNX Runtime rewrites it for this machine's CPU."""
    return _operators(_rewritten_graph(model, settings=settings))


def _rewritten_graph(model: Path, *, settings: SessionSettings) -> Any:
    onnx: Any = extras.require("onnx")
    with fs.scratch_directory() as folder:
        options = session_options(settings)
        options.optimized_model_filepath = str(folder / ENGINE_FILE)
        open_inference_session(model, options=options)
        return onnx.load(folder / ENGINE_FILE, load_external_data=False).graph


def _operators(graph: Any) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def _notes(graph: Any) -> tuple[str, ...]:
    kernels = _operators(graph)
    quantized = kernels.get("QuantizeLinear", 0)
    integer = sum(n for op, n in kernels.items() if any(mark in op for mark in _INTEGER_MARKS))
    if quantized and not integer:
        general = f"{quantized} QuantizeLinear nodes, but no operator runs in integers"
        return (general, *_float_layers(graph))
    return _float_layers(graph)


def _float_layers(graph: Any) -> tuple[str, ...]:
    """Layers whose input and weight are stored as integers, and that run in float even so."""
    made = {name: node for node in graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    reads = [
        [made[name] for name in node.input[:2] if name in made]
        for node in graph.node
        if node.op_type in _LAYERS
    ]
    floats = [pair for pair in reads if [node.op_type for node in pair] == ["DequantizeLinear"] * 2]
    if not floats:
        return ()
    note = f"{len(floats)} layers of integers run in float"
    if any(_is_signed(pair[0], types) for pair in floats):
        note += (
            "; on x86, ONNX Runtime keeps int8 activations in float where several nodes read them:"
            " quantise activations to uint8"
        )
    return (note,)


def _is_signed(dequantize: Any, types: dict[str, int]) -> bool:
    signed: int = extras.require("onnx").TensorProto.INT8
    return len(dequantize.input) > 2 and types.get(dequantize.input[2]) == signed


BUILDER: Final = OnnxRuntimeBuilder()
