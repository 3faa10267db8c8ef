"""The quantise stage: float ONNX in, int8 ONNX out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, onnxio
from equipoise.errors import RecipeError, SourceError
from equipoise.quantize import placement
from equipoise.quantize.calibrate import Ranges, read_ranges
from equipoise.quantize.schemes import DynamicInt8, Quantization, StaticInt8
from equipoise.quantize.static import quantize_static
from equipoise.quantize.weights import quantize_weights

MODEL_FILE: Final = "model.onnx"
_PER_CHANNEL_OPSET: Final = 13
_COLLAPSED_TENSORS_NAMED: Final = 3


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What to quantise and how.

    Attributes:
        model: Float ONNX file.
        ranges: Directory that ``calibrate`` wrote; needed by static schemes alone.
        quantization: The scheme.
        activation: Activation type that the target wants: ``uint8`` or ``int8``.
    """

    model: Path
    quantization: Quantization
    ranges: Path | None = None
    activation: str = "uint8"


@dataclass(frozen=True, kw_only=True)
class QuantizeRecord:
    """What became of the model.

    Attributes:
        file: Name of the ONNX file in the output directory.
        notes: What a user should know, in words.
        float_nodes: Nodes left in float on purpose, with the reason.
        quantized: Operator type -> count of what now reads int8.
    """

    file: str
    notes: tuple[str, ...]
    float_nodes: tuple[placement.FloatNode, ...]
    quantized: dict[str, int]


def quantize(config: QuantizeConfig, *, output: Path) -> QuantizeRecord:
    """Quantise ``config.model`` into ``output``.

    Raises:
        SourceError: The model is no ONNX file, or its opset cannot be raised.
        RecipeError: Nothing in it can be quantised so, or a static scheme has no ranges.
    """
    model = _prepared(onnxio.load_model(config.model))
    before = Counter(node.op_type for node in model.graph.node)
    quantized, float_nodes, notes = _apply(model, config)
    after = Counter(node.op_type for node in quantized.graph.node)
    if after == before:
        raise RecipeError(
            f"nothing in the model can be quantised by the scheme {config.quantization.kind!r}",
            hint="Its operators have no constant weights, or are not in the scheme's list.",
        )
    onnxio.save_model(quantized, output / MODEL_FILE)
    added = {op: n - before[op] for op, n in sorted(after.items()) if n > before[op]}
    return QuantizeRecord(file=MODEL_FILE, notes=notes, float_nodes=float_nodes, quantized=added)


def _apply(
    model: Any, config: QuantizeConfig
) -> tuple[Any, tuple[placement.FloatNode, ...], tuple[str, ...]]:
    if isinstance(config.quantization, DynamicInt8):
        return quantize_dynamic(model, scheme=config.quantization), (), ()
    if isinstance(config.quantization, StaticInt8):
        return _static(model, config, scheme=config.quantization)
    count = quantize_weights(model)
    return model, (), (f"{count} weight tensors stored as int8 and computed in float",)


def _static(
    model: Any, config: QuantizeConfig, *, scheme: StaticInt8
) -> tuple[Any, tuple[placement.FloatNode, ...], tuple[str, ...]]:
    if config.ranges is None:
        raise RecipeError("a static scheme needs calibrated ranges: give calibration data")
    ranges = read_ranges(config.ranges)
    prone = placement.collapse_prone(model, ranges.tensors)
    float_nodes = prone if scheme.guarded else ()
    quantized = quantize_static(
        model,
        ranges.tensors,
        scheme=scheme,
        activation=config.activation,
        float_nodes=tuple(node.name for node in float_nodes),
    )
    if scheme.guarded:
        # Float products and tables still gain from int8 weights: ONNX Runtime has kernels for both.
        quantize_weights(quantized, operators=frozenset({"MatMul", "Gather"}))
    notes = _guard_notes(float_nodes) if scheme.guarded else _collapse_notes(ranges)
    return quantized, float_nodes, notes


def _guard_notes(nodes: tuple[placement.FloatNode, ...]) -> tuple[str, ...]:
    """One note per reason, with the operators it kept in float."""
    by_reason: dict[str, Counter[str]] = {}
    for node in nodes:
        by_reason.setdefault(_kind(node.reason), Counter())[node.operator] += 1
    return tuple(
        f"left in float: {', '.join(f'{n} {op}' for op, n in counts.most_common())} ({reason})"
        for reason, counts in by_reason.items()
    )


def _kind(reason: str) -> str:
    """A reason without its tensor's name and figure, so that equal reasons count together."""
    if reason.endswith("of signal"):
        return f"an input would keep less than {placement.MINIMUM_SQNR_DB:.0f} dB of signal"
    return "a mask constant stretches the range" if "mask constant" in reason else reason


def _collapse_notes(ranges: Ranges) -> tuple[str, ...]:
    masks = [n for n, r in ranges.tensors.items() if placement.is_mask(r)]
    weak = [n for n, r in ranges.tensors.items() if r.count and placement.is_weak(r)]
    notes = []
    for names, why in (
        (masks, "a mask constant was taken as activation range"),
        (weak, f"less than {placement.MINIMUM_SQNR_DB:.0f} dB of signal is left on 8 bits"),
    ):
        if names:
            shown = ", ".join(names[:_COLLAPSED_TENSORS_NAMED])
            notes.append(f"{len(names)} of {len(ranges.tensors)} tensors: {why} ({shown}, ...)")
    return tuple(notes)


def quantize_dynamic(model: Any, *, scheme: DynamicInt8) -> Any:
    """ONNX Runtime's dynamic quantisation; convolutions take uint8, the only type it can run."""
    quantization = extras.require("onnxruntime.quantization")
    has_convolution = "Conv" in scheme.operators and any(
        node.op_type == "Conv" for node in model.graph.node
    )
    weight = quantization.QuantType.QUInt8 if has_convolution else quantization.QuantType.QInt8
    with fs.scratch_directory() as folder:
        quantization.quantize_dynamic(
            model,
            folder / MODEL_FILE,
            op_types_to_quantize=list(scheme.operators),
            per_channel=not has_convolution,
            reduce_range=scheme.reduce_range,
            weight_type=weight,
            extra_options={"DefaultTensorType": extras.require("onnx").TensorProto.FLOAT},
        )
        return extras.require("onnx").load(folder / MODEL_FILE)


def _prepared(model: Any) -> Any:
    """The model with named nodes, inferred shapes, and an opset that has per-channel Q/DQ."""
    onnx = extras.require("onnx")
    opset = next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0)
    if opset < _PER_CHANNEL_OPSET:
        model = _converted(model, opset=opset)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return onnx.shape_inference.infer_shapes(model)


def _converted(model: Any, *, opset: int) -> Any:
    onnx = extras.require("onnx")
    try:
        return onnx.version_converter.convert_version(model, _PER_CHANNEL_OPSET)
    except Exception as error:  # the converter raises bare C++ exceptions
        raise SourceError(
            f"the model has opset {opset}; per-channel int8 needs {_PER_CHANNEL_OPSET},"
            f" and converting it failed: {error}",
            hint="Export the model again with a newer opset.",
        ) from error
