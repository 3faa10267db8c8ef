"""Make an engine for OpenVINO: IR, a graph in ``engine.xml`` with its weights in ``engine.bin``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, onnxio, record
from equipoise.errors import SourceError
from equipoise.runtimes.base import package_availability
from equipoise.runtimes.openvino.core import (
    SPECS,
    Specs,
    compile_model,
    core,
    device_of,
    first_line,
    missing_devices,
    openvino,
    read_ir,
    version,
)
from equipoise.runtimes.protocol import (
    Availability,
    BuildSettings,
    EngineRecord,
    SessionSettings,
)
from equipoise.targets.machine import detect_machine

ENGINE_FILE: Final = "engine.xml"
WEIGHTS_FILE: Final = "engine.bin"
_LAYERS: Final = {"Convolution", "FullyConnected", "GroupConvolution", "MatMul"}
_INTEGERS: Final = {"i8", "u8", "i4", "u4", "i32"}
_SEVEN_BITS: Final = 64


class OpenVinoBuilder:
    """See :class:`equipoise.runtimes.protocol.Builder`."""

    def availability(self) -> Availability:
        """Whether openvino is installed."""
        return package_availability("openvino", version=version)

    def build(
        self,
        model: Path,
        output: Path,
        *,
        settings: SessionSettings,
        options: BuildSettings | None = None,  # noqa: ARG002
    ) -> EngineRecord:
        """Write IR to ``output``, and compile it where the device is here.

        Raises:
            SourceError: OpenVINO cannot convert the model, or the device refuses it.
            UsageError: ``settings`` name what is no device.
        """
        device_of(settings)
        missing, as_written = missing_devices(settings), settings.optimize == "none"
        flags = detect_machine().flags
        with fs.scratch_directory() as folder:
            openvino().save_model(_converted(model), folder / ENGINE_FILE, compress_to_fp16=False)
            kernels = {} if missing else executed(folder / ENGINE_FILE, settings=settings)
            for name in (ENGINE_FILE, WEIGHTS_FILE):
                fs.copy_file(folder / name, output / name)
        return EngineRecord(
            file=ENGINE_FILE,
            size_bytes=fs.tree_size_bytes(output),
            kernels=kernels,
            notes=() if as_written else notes_on(model, kernels=kernels, flags=flags),
            version=version(),
            loaded=not missing,
        )

    def refusals(self, model: Path) -> tuple[str, ...] | None:
        """Nodes that the CPU plugin does not run, or what the conversion says."""
        onnxio.file_specs(model)
        try:
            converted = _converted(model)
        except SourceError as error:
            return (error.message,)
        taken = set(core().query_model(converted, "CPU"))
        nodes = ((n.get_friendly_name(), n.get_type_name()) for n in converted.get_ops())
        return tuple(f"{name}: {kind}" for name, kind in nodes if name not in taken)


def _converted(model: Path) -> Any:
    """The ONNX file as OpenVINO sees it, with its specs in it."""
    inputs, outputs = onnxio.file_specs(model)
    try:
        converted = core().read_model(model)
    except Exception as error:  # RuntimeError, but nothing promises that
        raise SourceError(
            f"OpenVINO {version()} cannot convert {model}: {first_line(error)}"
        ) from error
    converted.set_rt_info(record.dumps(Specs(inputs=inputs, outputs=outputs)), SPECS)
    return converted


def executed(engine: Path, *, settings: SessionSettings) -> dict[str, int]:
    """``Convolution u8`` -> count of the kernels that run: type, and type of numbers."""
    compiled = compile_model(read_ir(engine), settings=settings, where=engine)
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, precision = (_text(info, key) for key in ("layerType", "runtimePrecision"))
        if kind and kind not in {"Input", "Output", "Const", "Parameter", "Result"}:
            found[f"{kind} {precision}".strip()] += 1
    return dict(sorted(found.items()))


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def notes_on(model: Path, *, kernels: dict[str, int], flags: tuple[str, ...]) -> tuple[str, ...]:
    """What to know of a quantised model on a CPU with ``flags``; nothing of a float model."""
    quantized, full = _quantized(model)
    if not quantized or not kernels:
        return ()
    notes = []
    floats = {
        name: count
        for name, count in kernels.items()
        if name.partition(" ")[0] in _LAYERS and name.partition(" ")[2] not in _INTEGERS
    }
    if floats:
        words = ", ".join(f"{count} {name}" for name, count in floats.items())
        notes.append(f"layers of a quantised model that run in float: {words}")
    if full and "avx2" in flags and not any("vnni" in flag for flag in flags):
        notes.append(
            "this CPU has no VNNI: OpenVINO adds int8 products in 16 bits, which overflow where"
            " weights use all eight bits; a CPU with VNNI gives other numbers"
        )
    return tuple(notes)


def _quantized(model: Path) -> tuple[bool, bool]:
    """Whether activations are quantised, and whether weights go beyond seven bits."""
    numpy_helper: Any = extras.require("onnx.numpy_helper")
    graph = onnxio.load_model(model).graph
    quantized = any(node.op_type == "QuantizeLinear" for node in graph.node)
    signed = extras.require("onnx").TensorProto.INT8
    weights = (numpy_helper.to_array(t) for t in graph.initializer if t.data_type == signed)
    return quantized, any(
        abs(int(w.min())) > _SEVEN_BITS or w.max() > _SEVEN_BITS for w in weights if w.size
    )


BUILDER: Final = OpenVinoBuilder()
