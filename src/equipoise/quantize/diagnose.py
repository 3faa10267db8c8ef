"""Why a quantised model is not as good, or not as fast, as it should be."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from equipoise import onnxio
from equipoise.data.metrics import Metric, get_metric
from equipoise.data.store import Rows
from equipoise.errors import DataError, SourceError, UsageError
from equipoise.parity.compare import Comparison, OutputParity
from equipoise.quantize.noise import TensorNoise, by_node, tensor_noise
from equipoise.quantize.observe import observing
from equipoise.quantize.pairs import only, quantized_nodes, with_originals
from equipoise.quantize.rewritten import NodeTime, RewrittenGraph, node_times, rewritten_graph
from equipoise.quantize.saturation import LayerSaturation, saturation, simulating
from equipoise.quantize.statistics import MASK_MAGNITUDE
from equipoise.quantize.sweeps import (
    Damage,
    Judge,
    Score,
    operator_groups,
    rounding_nodes,
    standing_out,
    sweep,
)

Form = Literal["qdq", "qoperator", "dynamic", "float"]

_OPERATOR_SHARE: Final = 0.4
"""Share of the budget for sweeps over types of operators; nodes get the rest."""

_FEW: Final = 4
"""Samples for what costs many passes of the model per sample."""

_INTEGER_MARKS: Final = ("QLinear", "QGemm", "QAttention")
_DYNAMIC_MARKS: Final = ("DynamicQuantize", "Integer", "NBits")
_FORM_WORDS: Final = {
    "qoperator": "has integer operators without Q/DQ pairs (QOperator form)",
    "dynamic": "is quantised dynamically or by block and has no Q/DQ pairs",
}


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """What to compare, and on what.

    Attributes:
        model: Float ONNX file.
        quantized: Its quantised form.
        samples: Directory of inputs, written by ``data.store``.
        labels: Directory of their labels; needed for a metric.
        metric: Name of a metric; empty for none.
        label_names: Names of the classes, in index order; may be empty.
        count: Use the first so many samples.
        budget_s: Time for the sweeps, in seconds; nodes with the noisiest outputs come first.
        runs: Measured runs of each model for the times of nodes.
        threads: Threads per operator.
    """

    model: Path
    quantized: Path
    samples: Path
    labels: Path | None = None
    metric: str = ""
    label_names: tuple[str, ...] = ()
    count: int = 16
    budget_s: float = 60.0
    runs: int = 10
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class SaturationRecord:
    """What 16-bit sums do to the model on AVX2 without VNNI; see ``quantize.saturation``.

    Attributes:
        layers: Layers that can saturate, in graph order.
        samples: Number of samples.
        exact: The quantised model in exact integer arithmetic.
        saturated: The same on AVX2 without VNNI, computed here.
    """

    layers: tuple[LayerSaturation, ...]
    samples: int
    exact: Score
    saturated: Score


@dataclass(frozen=True, kw_only=True)
class DamageRecord:
    """Where the damage comes from.

    Attributes:
        operators: Types of operators, the most damaging first.
        nodes: Nodes, the most damaging first.
        rounding_nodes: Number of quantised nodes that compute, measured or not.
        exclude: Nodes worth leaving in float, the most damaging first.
        excluded: The model as a quantiser makes it without those, run by the runtime; None when
            there are none.
    """

    operators: tuple[Damage, ...]
    nodes: tuple[Damage, ...]
    rounding_nodes: int
    exclude: tuple[str, ...]
    excluded: Score | None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong with a quantised model, and where.

    Attributes:
        model: The float file.
        quantized: The quantised file.
        form: How it is quantised.
        samples: Number of samples.
        outputs: How each output compares with the float one, on this machine.
        metric: Name of the metric; empty for none.
        float_metric: Its value for the float model on these samples.
        score: The quantised model on this machine.
        tensors: Shared tensors, in graph order.
        graph: What the runtime makes of the file.
        times: Time of each node, the costliest first.
        saturation: None without layers that can saturate.
        damage: None without Q/DQ pairs.
        notes: What a user should know, in words.
    """

    model: Path
    quantized: Path
    form: Form
    samples: int
    outputs: tuple[OutputParity, ...]
    metric: str
    float_metric: float | None
    score: Score
    tensors: tuple[TensorNoise, ...]
    graph: RewrittenGraph
    times: tuple[NodeTime, ...]
    saturation: SaturationRecord | None
    damage: DamageRecord | None
    notes: tuple[str, ...]


def diagnose(config: DiagnoseConfig) -> Diagnosis:
    """Compare a float model with its quantised form, and find what does the damage.

    Raises:
        UsageError: A setting out of range, or a metric without labels.
        SourceError: A file is no ONNX model, the first is quantised or the second is not.
        DataError: There are no samples, or labels do not fit the outputs.
        InputError: The samples do not fit a model.
        ParityError: The second model has other outputs than the first.
    """
    _check(config)
    original, quantized = (onnxio.load_model(p) for p in (config.model, config.quantized))
    for model in (original, quantized):
        onnxio.name_nodes(model)
    form = _check_forms(config, original, quantized)
    judge = _judge(config, original)
    whole = with_originals(quantized, original)
    tensors = tensor_noise(original, whole, rows=judge.feeds, threads=config.threads)
    graph = rewritten_graph(config.quantized, threads=config.threads)
    is_qdq = form == "qdq"
    saturated = _saturation(quantized, judge) if is_qdq else None
    damage = None
    if is_qdq:
        damage = _damage(whole, judge=judge, tensors=tensors, budget_s=config.budget_s)
    return Diagnosis(
        model=config.model,
        quantized=config.quantized,
        form=form,
        samples=len(judge.feeds),
        outputs=_outputs(quantized, judge),
        metric=config.metric,
        float_metric=judge.score(original).metric,
        score=judge.score(quantized),
        tensors=tensors,
        graph=graph,
        times=_times(config, judge.feeds),
        saturation=saturated,
        damage=damage,
        notes=tuple(_notes(form, tensors=tensors, graph=graph, damage=damage)),
    )


def _check(config: DiagnoseConfig) -> None:
    for name, value in (("samples", config.count), ("runs", config.runs)):
        if value < 1:
            raise UsageError(f"the number of {name} must be at least 1, not {value}")
    if not config.budget_s > 0:
        raise UsageError(f"the budget must be more than 0 seconds, not {config.budget_s:g}")
    if config.metric and config.labels is None:
        raise UsageError(f"the metric {config.metric!r} needs labels")


def form_of(model: Any) -> Form:
    """How an ``onnx.ModelProto`` is quantised."""
    if quantized_nodes(model):
        return "qdq"
    operators = {node.op_type for node in model.graph.node}
    marks: dict[Form, tuple[str, ...]] = {"qoperator": _INTEGER_MARKS, "dynamic": _DYNAMIC_MARKS}
    for form, words in marks.items():
        if any(word in operator for operator in operators for word in words):
            return form
    return "float"


def _check_forms(config: DiagnoseConfig, original: Any, quantized: Any) -> Form:
    hint = "Give the float model first and its quantised form second."
    if form_of(original) != "float":
        raise SourceError(f"{config.model} is quantised itself ({form_of(original)})", hint=hint)
    form = form_of(quantized)
    if form == "float":
        raise SourceError(f"{config.quantized} has no quantised node", hint=hint)
    return form


def _judge(config: DiagnoseConfig, original: Any) -> Judge:
    rows = Rows(config.samples)
    count = min(config.count, len(rows))
    if not count:
        raise DataError(f"there is no sample in {config.samples}: the data is empty")
    feeds = [rows[index] for index in range(count)]
    names = [value.name for value in original.graph.output]
    with observing(original, names, threads=config.threads) as observe:
        references = [observe(row) for row in feeds]
    return Judge(
        feeds=feeds,
        references=references,
        labels=_labels(config, count),
        metric=_metric(config),
        threads=config.threads,
    )


def _metric(config: DiagnoseConfig) -> Metric | None:
    return get_metric(config.metric, labels=config.label_names) if config.metric else None


def _labels(config: DiagnoseConfig, count: int) -> list[Any]:
    if config.labels is None or not config.metric:
        return []
    rows = Rows(config.labels)
    if len(rows) < count:
        raise DataError(f"there are {len(rows)} labels for {count} samples in {config.labels}")
    return [np.asarray(rows[index]["label"]) for index in range(count)]


def _outputs(quantized: Any, judge: Judge) -> tuple[OutputParity, ...]:
    comparison = Comparison()
    with observing(quantized, judge.references[0], threads=judge.threads) as observe:
        for feeds, wanted in zip(judge.feeds, judge.references, strict=True):
            comparison.add(wanted, observe(feeds))
    return comparison.result()


def _saturation(quantized: Any, judge: Judge) -> SaturationRecord | None:
    few = judge.first(_FEW)
    layers = saturation(quantized, few.feeds, threads=judge.threads)
    if not layers:
        return None
    return SaturationRecord(
        layers=layers,
        samples=len(few.feeds),
        exact=_simulated(quantized, few, saturate=False),
        saturated=_simulated(quantized, few, saturate=True),
    )


def _simulated(quantized: Any, judge: Judge, *, saturate: bool) -> Score:
    with simulating(quantized, saturate=saturate, threads=judge.threads) as run:
        return judge.compare(run)


def _damage(
    quantized: Any, *, judge: Judge, tensors: Iterable[TensorNoise], budget_s: float
) -> DamageRecord:
    noise = by_node(quantized, tensors)
    names = [str(node.name) for node in rounding_nodes(quantized)]
    noisiest = sorted(names, key=lambda name: noise.get(name, np.inf))
    share = _OPERATOR_SHARE * budget_s
    start = time.monotonic()
    operators = sweep(quantized, operator_groups(quantized), judge=judge, budget_s=share)
    left = budget_s - (time.monotonic() - start)
    nodes = sweep(quantized, {name: (name,) for name in noisiest}, judge=judge, budget_s=left)
    exclude = standing_out(nodes, whole=judge.rounding(quantized))
    kept = {str(node.name) for node in quantized_nodes(quantized)} - set(exclude)
    return DamageRecord(
        operators=operators,
        nodes=nodes,
        rounding_nodes=len(names),
        exclude=exclude,
        excluded=judge.score(only(quantized, kept)) if exclude else None,
    )


def _times(config: DiagnoseConfig, feeds: Sequence[Any]) -> tuple[NodeTime, ...]:
    return node_times(
        config.model,
        config.quantized,
        feeds=feeds[:1],
        runs=config.runs,
        threads=config.threads,
    )


def _notes(
    form: Form,
    *,
    tensors: Sequence[TensorNoise],
    graph: RewrittenGraph,
    damage: DamageRecord | None,
) -> Iterable[str]:
    if form != "qdq":
        yield f"the model {_FORM_WORDS[form]}: no node can be taken out of it alone"
    masks = [t.name for t in tensors if max(abs(t.low), abs(t.high)) >= MASK_MAGNITUDE]
    if masks:
        yield f"{len(masks)} tensors hold a mask constant, which is no activation: {masks[0]}, ..."
    if graph.fallbacks:
        named_ones = ", ".join(graph.fallbacks[:3])
        yield f"{len(graph.fallbacks)} layers with int8 data compute in float: {named_ones}, ..."
    if damage is None:
        return
    measured, all_nodes = len(damage.nodes), damage.rounding_nodes
    if measured < all_nodes:
        yield f"the budget was enough for {measured} of {all_nodes} nodes, the noisiest first"
    if not damage.exclude:
        yield "no node stands out: leaving single nodes in float will not help"
