"""Half precision where the numbers allow it: float16 or bfloat16, decided by real samples.

The float model runs on calibration rows. A node stays in float32 when a tensor of its leaves the
range of the type or loses its signal in it, when a sum inside it does, or when its numbers become
integers; everything else becomes half. Constants that only mean "minus infinity" are made smaller
first, if the outputs stay the same, so that masks do not keep half of the model in float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal

import numpy as np

from equipoise import extras, fs, onnxio
from equipoise.errors import DataError, ParityError
from equipoise.parity.compare import OutputParity, ParityMeter
from equipoise.quantize.half_evidence import (
    Evidence,
    HalfName,
    HalfType,
    gather_evidence,
    half_type,
)
from equipoise.quantize.half_graph import MICROSOFT, FloatGraph, emulated
from equipoise.quantize.layers import write_array
from equipoise.quantize.nodes import FloatNode
from equipoise.quantize.observe import observing
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array, Feeds

_BFLOAT16_OPSET: Final = 22
"""Convolutions and pools take bfloat16 from this opset on."""

_PRODUCTS: Final = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})


@dataclass(frozen=True, kw_only=True)
class Halves:
    """How to convert.

    Attributes:
        dtype: ``float16`` or ``bfloat16``.
        keep_io: Inputs and outputs of the model stay float32.
        headroom: Factor by which activations of unseen samples may exceed those of the rows.
        minimum_sqnr_db: Signal over error, in dB, that a tensor or a sum has to keep. Rounding
            alone leaves about 73 dB in float16 and 55 dB in bfloat16.
        accumulator: What products sum in. ``float32`` is what tensor cores and CPUs do; with
            ``half`` the products with constant weights are judged by their sums as well.
        mask_value: Magnitude that takes the place of mask constants out of range. Its exponential
            is zero and a few of them can be added up within float16.
        mask_sqnr_db: Signal over error, in dB, that the outputs keep with the smaller constants.
        samples: Rows to use at most.
    """

    kind: Literal["half"] = "half"
    dtype: HalfName = "float16"
    keep_io: bool = True
    headroom: float = 2.0
    minimum_sqnr_db: float = 40.0
    accumulator: Literal["float32", "half"] = "float32"
    mask_value: float = 16_384.0
    mask_sqnr_db: float = 80.0
    samples: int = 32


@dataclass(frozen=True, kw_only=True)
class HalfRecord:
    """What became of a model.

    Attributes:
        half_nodes: Number of nodes that compute in half precision.
        float_nodes: Nodes with float tensors that stayed in float32, with the reason.
        casts: Number of casts added.
        masks: Constants that were made smaller.
        outputs: Each output against the float model, on the calibration rows.
        emulated: Whether the outputs are those of a float model that rounds, because ONNX Runtime
            has no kernels for the type on this machine.
    """

    half_nodes: int
    float_nodes: tuple[FloatNode, ...]
    casts: int
    masks: tuple[str, ...]
    outputs: tuple[OutputParity, ...]
    emulated: bool


def convert_to_half(
    model: Any, settings: Halves | None = None, *, rows: Iterable[Feeds]
) -> tuple[Any, HalfRecord]:
    """A copy of ``model`` in half precision, compared with it.

    Args:
        model: Float ``onnx.ModelProto``; it is not changed.
        settings: How.
        rows: Calibration inputs; the first ``settings.samples`` are held in memory.

    Raises:
        DataError: There are no rows.
        InputError: The rows do not fit the model.
        IncompatibleError: Inputs and outputs were to become half and a subgraph reads one.
        SourceError: bfloat16 needs opset 22, and the model cannot be raised to it.
        ParityError: An output of the result is not finite where that of the model is.
    """
    chosen = settings or Halves()
    held = list(islice(iter(rows), chosen.samples))
    if not held:
        raise DataError("half precision is decided by samples, and there are none")
    half = half_type(chosen.dtype)
    converted = _prepared(model, half)
    masks = _shrink_masks(converted, held, half=half, settings=chosen)
    graph = FloatGraph(converted, half, keep_io=chosen.keep_io)
    evidence = gather_evidence(
        converted,
        graph.activations(),
        rows=held,
        half=half,
        products=chosen.accumulator == "half",
    )
    reasons = _reasons(graph, evidence, chosen)
    able = frozenset(name for name, slots in graph.slots.items() if slots and name not in reasons)
    half_nodes = graph.settled(able)
    reasons |= dict.fromkeys(able - half_nodes, "its casts would cost more than it saves")
    casts = graph.rewrite(half_nodes)
    outputs = _compare(model, converted, held, half=half, keep_io=chosen.keep_io)
    return converted, HalfRecord(
        half_nodes=len(half_nodes),
        float_nodes=tuple(_float_nodes(converted, reasons)),
        casts=casts,
        masks=masks,
        outputs=outputs,
        emulated=half.name == "bfloat16",
    )


def _prepared(model: Any, half: HalfType) -> Any:
    """A copy with named nodes, float constants as initializers, and types of vendors' outputs."""
    onnx = extras.require("onnx")
    copy = onnxio.copied(model)
    if half.name == "bfloat16":
        copy = onnxio.raise_opset(copy, _BFLOAT16_OPSET)
    for node in [n for n in copy.graph.node if n.op_type == "Constant"]:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if value is not None:
            write_array(copy, node.output[0], onnx.numpy_helper.to_array(value))
            copy.graph.node.remove(node)
    onnxio.name_nodes(copy)
    _declare_vendors(copy)
    return copy


def _fresh(operator: str, index: int) -> Iterator[str]:
    yield f"{operator}_{index}"
    yield from (f"{operator}_{index}_{again}" for again in range(1 << 16))


def _declare_vendors(model: Any) -> None:
    """Say that ONNX Runtime's operators write what they read, where inference knows no schema."""
    onnx = extras.require("onnx")
    known = {name for name, kind in onnxio.value_types(model).items() if kind}
    vendors = [
        n for n in model.graph.node if n.domain == "com.microsoft" and n.op_type in MICROSOFT
    ]
    for name in [name for node in vendors for name in node.output if name and name not in known]:
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        model.graph.value_info.append(value)


def _shrink_masks(
    model: Any, rows: Sequence[Feeds], *, half: HalfType, settings: Halves
) -> tuple[str, ...]:
    """Replace constants beyond the range of ``half`` by smaller ones, in place.

    All at once if the outputs stay what they are, otherwise one by one.
    """
    found = _oversized(model, half)
    if not found:
        return ()
    wanted = _outputs(model, rows)
    for group in (found, *([one] for one in found if len(found) > 1)):
        before = [(tensor, _bytes(tensor)) for _, tensor in group]
        for _, tensor in group:
            _shrink(tensor, half, value=settings.mask_value)
        if _equal(wanted, _outputs(model, rows), minimum_db=settings.mask_sqnr_db):
            if group is found:
                return tuple(name for name, _ in found)
            continue
        for tensor, content in before:
            tensor.ParseFromString(content)
    return tuple(name for name, tensor in found if not _beyond(tensor, half))


def _bytes(tensor: Any) -> bytes:
    content: bytes = tensor.SerializeToString()
    return content


def _oversized(model: Any, half: HalfType) -> list[tuple[str, Any]]:
    """Float constants, and fillers of ConstantOfShape, with finite values out of range."""
    fillers = [
        (node.output[0], attribute.t)
        for node in model.graph.node
        if node.op_type == "ConstantOfShape"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    constants = list(onnxio.initializers(model).items())
    return [(name, tensor) for name, tensor in constants + fillers if _beyond(tensor, half)]


def _beyond(tensor: Any, half: HalfType) -> bool:
    onnx = extras.require("onnx")
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return False
    array = onnx.numpy_helper.to_array(tensor)
    return bool((np.isfinite(array) & (np.abs(array) > half.largest)).any())


def _shrink(tensor: Any, half: HalfType, *, value: float) -> None:
    onnx = extras.require("onnx")
    array = onnx.numpy_helper.to_array(tensor)
    beyond = np.isfinite(array) & (np.abs(array) > half.largest)
    smaller = np.where(beyond, np.sign(array) * np.float32(value), array).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(smaller, tensor.name))


def _outputs(model: Any, rows: Sequence[Feeds]) -> list[dict[str, Array]]:
    with observing(model, [value.name for value in model.graph.output]) as observe:
        return [observe(feeds) for feeds in rows]


def _equal(
    wanted: list[dict[str, Array]], got: list[dict[str, Array]], *, minimum_db: float
) -> bool:
    return all(
        _close(row[name], other[name], minimum_db=minimum_db)
        for row, other in zip(wanted, got, strict=True)
        for name in row
    )


def _close(wanted: Array, got: Array, *, minimum_db: float) -> bool:
    if wanted.dtype.kind != "f":
        return bool(np.array_equal(wanted, got))
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(got)):
        return False
    signal = float(np.square(wanted[finite], dtype=np.float64).sum())
    error = wanted[finite].astype(np.float64) - got[finite]
    return float(np.square(error).sum()) <= signal * 10 ** (-minimum_db / 10)


def _reasons(graph: FloatGraph, evidence: Evidence, settings: Halves) -> dict[str, str]:
    """Node -> why it stays in float32, for nodes with float tensors."""
    integers = _before_integers(graph)
    reasons = {}
    for node in graph.model.graph.node:
        if not graph.judged(node):
            continue
        reason = _structure_reason(graph, node)
        if not reason and node.name in integers:
            reason = "its numbers become integers, which rounding would change"
        reason = reason or _sum_reason(node.name, evidence, graph.half, settings)
        reason = reason or _tensor_reason(graph, node, evidence, settings)
        if reason:
            reasons[node.name] = reason
    return reasons


def _structure_reason(graph: FloatGraph, node: Any) -> str:
    if any(a.HasField("g") or a.graphs for a in node.attribute):
        return "it has a subgraph"
    return "" if graph.slots[node.name] else f"{node.op_type} has no {graph.half.name} form here"


def _sum_reason(name: str, evidence: Evidence, half: HalfType, settings: Halves) -> str:
    found = evidence.sums.get(name)
    if found is None:
        return ""
    terms = evidence.terms[name]
    if found.overflowed:
        return f"its sum of {terms} terms overflows in {half.name}"
    if found.sqnr_db < settings.minimum_sqnr_db:
        return f"its sum of {terms} terms keeps {found.sqnr_db:.0f} dB of signal in {half.name}"
    return ""


def _tensor_reason(graph: FloatGraph, node: Any, evidence: Evidence, settings: Halves) -> str:
    slots = graph.slots[node.name]
    half = graph.half
    for name in sorted(slots.inputs | slots.outputs) if slots else ():
        found = evidence.tensors.get(name)
        if found is None:
            continue
        room = 1.0 if name in graph.constants else settings.headroom
        if found.overflowed or found.largest * room > half.largest:
            return f"{name} reaches {found.largest:.3g}; {half.name} ends at {half.largest:.3g}"
        if found.sqnr_db < settings.minimum_sqnr_db:
            return f"{name} keeps {max(found.sqnr_db, 0):.0f} dB of signal in {half.name}"
    return ""


def _before_integers(graph: FloatGraph) -> set[str]:
    """Nodes whose floats a Cast turns into integers, back to the nearest products."""
    integers = {
        value
        for name, value in extras.require("onnx").TensorProto.DataType.items()
        if "INT" in name
    }
    waiting = [
        node
        for node in graph.model.graph.node
        if node.op_type == "Cast"
        and any(a.name == "to" and a.i in integers for a in node.attribute)
    ]
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        makers = [graph.maker(name) for name in node.input if name in graph.floats]
        for maker in makers:
            if maker is None or maker.name in found or maker.op_type in _PRODUCTS:
                continue
            found.add(maker.name)
            waiting.append(maker)
    return found


def _float_nodes(converted: Any, reasons: dict[str, str]) -> Iterator[FloatNode]:
    for node in converted.graph.node:
        if node.name in reasons:
            yield FloatNode(name=node.name, operator=node.op_type, reason=reasons[node.name])


def _compare(
    model: Any, converted: Any, rows: Sequence[Feeds], *, half: HalfType, keep_io: bool
) -> tuple[OutputParity, ...]:
    names = [value.name for value in model.graph.output]
    meters = {name: ParityMeter(name) for name in names}
    runs = _runs(converted, rows, half=half, keep_io=keep_io)
    for wanted, got in zip(_outputs(model, rows), runs, strict=True):
        for name in names:
            _require_finite(name, wanted[name], got[name], half)
            meters[name].add(wanted[name], got[name].astype(wanted[name].dtype))
    return tuple(meter.result() for meter in meters.values())


def _require_finite(name: str, wanted: Array, got: Array, half: HalfType) -> None:
    bad = int((np.isfinite(wanted) & ~np.isfinite(got.astype(wanted.dtype))).sum())
    if bad:
        raise ParityError(
            f"{bad} values of output {name!r} are not finite in {half.name}; in float32 they are",
            hint="Give more headroom, more samples, or another type.",
        )


def _runs(
    converted: Any, rows: Sequence[Feeds], *, half: HalfType, keep_io: bool
) -> Iterator[dict[str, Array]]:
    """Outputs of the converted model, or of a float model that rounds as it does."""
    rounding = half.name == "bfloat16"
    settings = SessionSettings(optimize="none" if rounding else "all")
    with fs.scratch_directory() as folder:
        path = folder / "half.onnx"
        onnxio.save_model(emulated(converted, half) if rounding else converted, path)
        with session_opener("onnxruntime")(path, settings=settings) as session:
            for feeds in rows:
                yield session.run(feeds if keep_io or rounding else _as_half(feeds, half))


def _as_half(feeds: Feeds, half: HalfType) -> dict[str, Array]:
    return {
        name: array.astype(half.dtype) if array.dtype == np.float32 else array
        for name, array in feeds.items()
    }
