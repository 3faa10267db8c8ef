"""The quantise stage: float ONNX in, int8 ONNX out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, onnxio
from equipoise.content import NOT_IN_KEY
from equipoise.data.store import Rows
from equipoise.errors import AccuracyError, ParityError, RecipeError, SourceError
from equipoise.parity.compare import require_finite
from equipoise.quantize.halves import Halves, convert_to_half
from equipoise.quantize.nodes import FloatNode
from equipoise.quantize.profiling import (
    DESIGNS,
    ProfileRecord,
    timer_here,
    timer_of,
    write_question,
)
from equipoise.quantize.ranges import Bounds, data_sha256, load_ranges
from equipoise.quantize.schemes import DynamicInt8, Quantization, StaticInt8
from equipoise.quantize.sparing import Spared, Sparing, is_enough, spare, timed_samples
from equipoise.quantize.static import Calibrated, Prepared, prepare_static
from equipoise.quantize.statistics import read_statistics
from equipoise.quantize.sweeps import Judge, Score, score_of
from equipoise.quantize.treatment import Treatment
from equipoise.quantize.weighing import Timer
from equipoise.quantize.weight_only import WeightOnly, block_tables, has_tables, quantize_blocks
from equipoise.quantize.weights import quantize_weights
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.targets.profile import Int8Scheme

MODEL_FILE: Final = "model.onnx"
_PER_CHANNEL_OPSET: Final = 13
_JUDGED_SAMPLES: Final = 16
_KERNEL_DB: Final = 3.0
"""Kernels may round otherwise than the graph says; twice the noise is another matter."""

_INTEGER_OPERATORS: Final = frozenset(
    {
        "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger",
        "MatMulNBits", "QLinearConv", "QLinearMatMul", "QuantizeLinear",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What to quantise and how.

    Attributes:
        model: Float ONNX file.
        quantization: How.
        scheme: How the target wants its integers.
        samples: Directory of calibration inputs; the result is run on some of them.
        statistics: Directory that ``calibrate`` wrote; needed by static quantisation alone.
        ranges: Ranges that were chosen before, for this model and these samples; they go before
            those of the statistics.
        threads: Threads per operator.
        apart: Where nodes have to be timed, leave that to a stage of its own, and write what it has
            to run.
        profile: What that stage found.
    """

    model: Path
    quantization: Quantization
    scheme: Int8Scheme
    samples: Path
    statistics: Path | None = None
    ranges: Path | None = None
    threads: int = 1
    apart: bool = field(default=False, metadata=NOT_IN_KEY)
    profile: ProfileRecord | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizeRecord:
    """What became of the model.

    Attributes:
        file: Name of the ONNX file in the output directory; empty where nodes have to be timed
            first, and then :data:`~equipoise.quantize.profiling.DESIGNS` lies there.
        notes: What a user should know, in words.
        float_nodes: Nodes left in float on purpose, with the reason.
        treatments: What was done about activations with unlike channels.
        quantized: Operator type -> count of what now reads int8.
        sqnr_db: Signal to noise of the worst output on calibration samples, as the graph is
            written; None when nothing is lost.
        optimized_sqnr_db: The same as the runtime runs it with all its optimisations.
        simulated: Whether both were simulated in float, because the runtime has no kernels for the
            type on this machine.
        kept_db: What a static scheme compared with its ``min_sqnr_db``: the same with the rounding
            of activations and weights alone. Asking for anything between the two makes the same
            model. None for other schemes.
    """

    file: str
    notes: tuple[str, ...]
    float_nodes: tuple[FloatNode, ...]
    treatments: tuple[Treatment, ...]
    quantized: dict[str, int]
    sqnr_db: float | None
    optimized_sqnr_db: float | None
    simulated: bool = False
    kept_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Made:
    model: Any
    notes: tuple[str, ...] = ()
    float_nodes: tuple[FloatNode, ...] = ()
    treatments: tuple[Treatment, ...] = ()
    simulated: Score | None = None
    kept_db: float | None = None


def quantize(config: QuantizeConfig, *, output: Path) -> QuantizeRecord:
    """Quantise ``config.model`` into ``output``.

    Raises:
        SourceError: The model is no ONNX file, is quantised already, or its opset cannot be raised.
        RecipeError: Nothing in it can be quantised so, or a static scheme has no statistics.
        IntegrityError: The ranges belong to another model or to other data.
        AccuracyError: Nothing of it can be quantised within the accuracy that was asked for.
        ParityError: The runtime makes something else of the result than it says.
    """
    model = _prepared(onnxio.load_model(config.model), config)
    _check_float(model, config.model)
    _check_tables(model, config.quantization)
    judge = _judge(model, config)
    before = Counter(node.op_type for node in model.graph.node)
    made = _apply(model, config, judge=judge)
    if isinstance(made, Prepared):
        write_question(made, output / DESIGNS, feeds=timed_samples(judge))
        return _to_be_timed(made)
    after = Counter(node.op_type for node in made.model.graph.node)
    added = {op: n - before[op] for op, n in sorted(after.items()) if n > before[op]}
    if after == before:
        raise RecipeError(
            f"nothing in the model can be quantised by the scheme {config.quantization.kind!r}",
            hint="Its operators have no constant weights, or are not in the scheme's list.",
        )
    onnxio.save_model(made.model, output / MODEL_FILE)
    simulated = made.simulated
    scores = (simulated,) * 2 if simulated else _verified(output / MODEL_FILE, judge=judge)
    return QuantizeRecord(
        file=MODEL_FILE,
        notes=(*made.notes, *_kernel_notes(scores)),
        float_nodes=made.float_nodes,
        treatments=made.treatments,
        quantized=added,
        sqnr_db=scores[0].sqnr_db,
        optimized_sqnr_db=scores[1].sqnr_db,
        simulated=simulated is not None,
        kept_db=made.kept_db,
    )


def _to_be_timed(prepared: Prepared) -> QuantizeRecord:
    return QuantizeRecord(
        file="",
        notes=(),
        float_nodes=prepared.kept,
        treatments=prepared.treatments,
        quantized={},
        sqnr_db=None,
        optimized_sqnr_db=None,
    )


def _check_float(model: Any, path: Path) -> None:
    found = sorted({node.op_type for node in model.graph.node} & _INTEGER_OPERATORS)
    if found:
        raise SourceError(
            f"{path} is quantised already: it has {', '.join(found)}",
            hint="Give the float model that it was made from.",
        )


def _check_tables(model: Any, quantization: Quantization) -> None:
    """Raises RecipeError where tables are to be stored in blocks and there are none."""
    if not isinstance(quantization, DynamicInt8 | StaticInt8 | WeightOnly):
        return
    if quantization.tables == "blocks" and not has_tables(model):
        raise RecipeError(
            "the model has no table that can be stored in blocks",
            hint="A table is a constant float matrix whose rows a Gather picks.",
        )


def _judge(model: Any, config: QuantizeConfig) -> Judge:
    """The float model's outputs on some calibration samples, spread over all."""
    rows = Rows(config.samples)
    feeds = [rows[i] for i in range(0, len(rows), max(1, len(rows) // _JUDGED_SAMPLES))]
    feeds = feeds[:_JUDGED_SAMPLES]
    with fs.scratch_directory() as folder:
        onnxio.save_model(model, folder / "float.onnx")
        settings = SessionSettings(threads=config.threads)
        with session_opener("onnxruntime")(folder / "float.onnx", settings=settings) as session:
            references = [session.run(dict(one)) for one in feeds]
    for index, outputs in enumerate(references):
        require_finite(outputs, sample=index, what=str(config.model))
    return Judge(feeds=feeds, references=references, threads=config.threads)


def _verified(path: Path, *, judge: Judge) -> tuple[Score, Score]:
    """Run the file with no optimisation and with all, and compare both with the float model.

    Raises:
        ParityError: With optimisation the outputs are far from what the graph says.
    """
    scores = []
    for level in ("none", "all"):
        settings = SessionSettings(threads=judge.threads, optimize=level)
        with session_opener("onnxruntime")(path, settings=settings) as session:
            scores.append(judge.compare(session.run))
    written, optimized = scores
    if optimized.sqnr_db is not None and optimized.sqnr_db < 0 < (written.sqnr_db or 1.0):
        raise ParityError(
            f"as written the quantised model keeps {_db(written)}, as the runtime optimises it"
            f" {_db(optimized)}: its kernels compute something else",
            hint="Run `equipoise diagnose` on both files; report the runtime and the CPU.",
        )
    return written, optimized


def _kernel_notes(scores: tuple[Score, Score]) -> tuple[str, ...]:
    written, optimized = scores
    if optimized.sqnr_db is None or (written.sqnr_db or 400.0) - optimized.sqnr_db < _KERNEL_DB:
        return ()
    kept = f"as written the outputs keep {_db(written)}"
    return (f"{kept}; with the runtime's optimised kernels {_db(optimized)}",)


def _db(score: Score) -> str:
    return "everything" if score.sqnr_db is None else f"{score.sqnr_db:.1f} dB"


def _apply(model: Any, config: QuantizeConfig, *, judge: Judge) -> _Made | Prepared:
    if isinstance(config.quantization, DynamicInt8):
        return _dynamic(model, scheme=config.quantization)
    if isinstance(config.quantization, StaticInt8):
        return _static(model, config, settings=config.quantization, judge=judge)
    if isinstance(config.quantization, WeightOnly):
        return _blocks(model, config, scheme=config.quantization)
    if isinstance(config.quantization, Halves):
        return _halves(model, config, settings=config.quantization)
    count = quantize_weights(model)
    note = f"{count} weight tensors stored as int8 and computed in float"
    return _Made(model=model, notes=(note,))


def _dynamic(model: Any, *, scheme: DynamicInt8) -> _Made:
    made = quantize_dynamic(model, scheme=scheme)
    return _Made(model=made, notes=_blocked_tables(made) if scheme.tables == "blocks" else ())


def _blocked_tables(model: Any) -> tuple[str, ...]:
    """Store the tables of ``model`` in blocks of 4 bits, and say so."""
    told = block_tables(model, WeightOnly())
    return (f"{len(told)} tables stored in blocks of 4-bit integers",)


def _blocks(model: Any, config: QuantizeConfig, *, scheme: WeightOnly) -> _Made:
    stored, told = quantize_blocks(model, scheme, rows=Rows(config.samples))
    note = f"{len(told.weights)} weights stored in blocks of {scheme.grid.bits}-bit integers"
    return _Made(model=stored, notes=(note, *_kept_notes(told.kept)), float_nodes=told.kept)


def _halves(model: Any, config: QuantizeConfig, *, settings: Halves) -> _Made:
    converted, told = convert_to_half(model, settings, rows=Rows(config.samples))
    notes = [f"{told.half_nodes} nodes compute in {settings.dtype}; {told.casts} casts"]
    if told.emulated:
        notes.append(f"this runtime has no kernels for {settings.dtype}: its rounding is simulated")
    return _Made(
        model=converted,
        notes=(*notes, *_kept_notes(told.float_nodes)),
        float_nodes=told.float_nodes,
        simulated=score_of(told.outputs) if told.emulated else None,
    )


def prepare_to_weigh(config: QuantizeConfig) -> tuple[Prepared, Judge]:
    """The model of ``config`` ready for static int8, and what quantised forms are compared with.

    Raises:
        SourceError: The model is no ONNX file, is quantised already, or its opset cannot be raised.
        RecipeError: The scheme is not static, has no statistics, or finds nothing to act on.
        IntegrityError: The ranges belong to another model or to other data.
    """
    if not isinstance(config.quantization, StaticInt8):
        raise RecipeError(
            f"nodes are weighed for static int8, not for {config.quantization.kind!r}",
            hint="Give a StaticInt8 scheme and the statistics of a calibration.",
        )
    model = _prepared(onnxio.load_model(config.model), config)
    _check_float(model, config.model)
    judge = _judge(model, config)
    prepared = _prepared_static(model, config, settings=config.quantization)
    if not prepared.placement.nodes:
        raise RecipeError("nothing in the model can run in integers: there is nothing to weigh")
    return prepared, judge


def _prepared_static(model: Any, config: QuantizeConfig, *, settings: StaticInt8) -> Prepared:
    if config.statistics is None:
        raise RecipeError("a static scheme needs calibrated ranges: give calibration data")
    calibrated = Calibrated(
        statistics=read_statistics(config.statistics).tensors,
        rows=Rows(config.samples),
        ranges=_given_ranges(config),
        threads=config.threads,
    )
    return prepare_static(model, calibrated, scheme=config.scheme, settings=settings)


def _static(
    model: Any, config: QuantizeConfig, *, settings: StaticInt8, judge: Judge
) -> _Made | Prepared:
    prepared = _prepared_static(model, config, settings=settings)
    least_db = settings.min_sqnr_db
    asks = config.apart and config.profile is None
    if asks and not is_enough(prepared, judge=judge, min_sqnr_db=least_db):
        return prepared
    asked = Sparing(min_sqnr_db=least_db, budget_s=settings.budget_s, timer=_timer(config))
    spared = spare(prepared, judge=judge, asked=asked)
    left = _INTEGER_OPERATORS & {node.op_type for node in spared.model.graph.node}
    if prepared.placement.nodes and not left:
        raise AccuracyError(
            f"nothing can run in integers and keep {settings.min_sqnr_db:g} dB of the outputs",
            hint="Ask for less with --min-sqnr, or take --scheme blocks --bits 8.",
        )
    notes = _static_notes(prepared, spared)
    if settings.tables == "blocks":
        notes += _blocked_tables(spared.model)
    elif settings.tables == "int8" and config.scheme.tables:
        # A table is only ever looked up: int8 rows cost nothing and are a quarter of the size.
        quantize_weights(spared.model, operators=frozenset({"Gather"}))
    return _Made(
        model=spared.model,
        notes=notes,
        float_nodes=(*spared.nodes, *prepared.kept),
        treatments=prepared.treatments,
        kept_db=spared.sqnr_db,
    )


def _timer(config: QuantizeConfig) -> Timer:
    if config.profile is None:
        return timer_here(threads=config.threads)
    return timer_of(config.profile, threads=config.threads)


def _given_ranges(config: QuantizeConfig) -> Mapping[str, Bounds]:
    if config.ranges is None:
        return {}
    model, data = fs.sha256_file(config.model), data_sha256(config.samples)
    return load_ranges(config.ranges, model_sha256=model, data_sha256=data).ranges


def _static_notes(prepared: Prepared, spared: Spared) -> tuple[str, ...]:
    treated = prepared.treatments
    smoothed = sum(t.alpha > 0 for t in treated)
    split = sum(t.outliers > 0 for t in treated)
    notes = []
    if smoothed or split:
        notes.append(
            f"of {len(treated)} activations of products {smoothed} are smoothed and {split} keep"
            " a few outlier channels in float"
        )
    if spared.nodes:
        named = ", ".join(node.name for node in spared.nodes[:3])
        more = ", ..." if len(spared.nodes) > 3 else ""
        notes.append(f"{len(spared.nodes)} nodes left in float for accuracy ({named}{more})")
    return (*notes, *_kept_notes(prepared.kept), *prepared.notes, *spared.notes)


def _kept_notes(nodes: Sequence[FloatNode]) -> tuple[str, ...]:
    """One note per reason, with the operators that it kept in float."""
    by_reason: dict[str, Counter[str]] = {}
    for node in nodes:
        reason = "a mask constant" if "mask constant" in node.reason else node.reason
        by_reason.setdefault(reason, Counter())[node.operator] += 1
    return tuple(
        f"left in float: {', '.join(f'{n} {op}' for op, n in counts.most_common())} ({reason})"
        for reason, counts in by_reason.items()
    )


def quantize_dynamic(model: Any, *, scheme: DynamicInt8) -> Any:
    """ONNX Runtime's dynamic quantisation; convolutions take uint8, the only type it can run."""
    quantization = extras.require("onnxruntime.quantization")
    by_tables = {"Gather"} if scheme.tables != "int8" else set()
    operators = [operator for operator in scheme.operators if operator not in by_tables]
    has_convolution = "Conv" in scheme.operators and any(
        node.op_type == "Conv" for node in model.graph.node
    )
    weight = quantization.QuantType.QUInt8 if has_convolution else quantization.QuantType.QInt8
    with fs.scratch_directory() as folder:
        quantization.quantize_dynamic(
            model,
            folder / MODEL_FILE,
            op_types_to_quantize=operators,
            per_channel=not has_convolution,
            reduce_range=scheme.reduce_range,
            weight_type=weight,
            extra_options={"DefaultTensorType": extras.require("onnx").TensorProto.FLOAT},
        )
        return extras.require("onnx").load(folder / MODEL_FILE)


def _prepared(model: Any, config: QuantizeConfig) -> Any:
    """The model with named nodes, inferred shapes, and an opset that has the Q/DQ it needs."""
    static = isinstance(config.quantization, StaticInt8)
    model = onnxio.raise_opset(model, config.scheme.least_opset if static else _PER_CHANNEL_OPSET)
    onnxio.name_nodes(model)
    return extras.require("onnx").shape_inference.infer_shapes(model)
