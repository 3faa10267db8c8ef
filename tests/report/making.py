"""Results of a search as it might have gone, made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from equipoise.compress.cutting import Pruning
from equipoise.measure.interval import Interval
from equipoise.parity.compare import OutputParity
from equipoise.quantize.plans import NodeFact
from equipoise.quantize.schemes import DynamicInt8, StaticInt8, WeightOnlyInt8
from equipoise.recipe import Recipe
from equipoise.search.goal import Goal, Limit
from equipoise.search.result import (
    Candidate,
    Measurement,
    Price,
    Sketch,
    TuneResult,
)
from equipoise.targets.machine import Machine

FLOAT_MS = 8.12
FLOAT_BYTES = 90_380_000
REFERENCE = 0.9312
REPORT = "              precision    recall  f1-score   support\n         PER     0.9612    0.9590"
MACHINE = Machine(
    cpu="Example CPU @ 2.60GHz",
    architecture="x86_64",
    cores=2,
    flags=("avx2", "fma", "f16c"),
    memory_bytes=8_200_000_000,
    system="Linux 6.8.0",
)


def around(value: float, share: float = 0.02) -> Interval:
    """A value with an interval of ``share`` of it to both sides."""
    low, high = sorted((value * (1 - share), value * (1 + share)))
    return Interval(value=value, low=low, high=high)


def measurement(
    *, ratio: float, drop: float, size: float, memory: float = 0.6, **changes: Any
) -> Measurement:
    """An engine that takes ``ratio`` of float's latency, and so on."""
    metric = REFERENCE - drop
    made = Measurement(
        metric=Interval(value=metric, low=metric - 0.008, high=metric + 0.008),
        metric_bound=metric - 0.006,
        drop=Interval(value=drop, low=drop - 0.003, high=drop + 0.0034),
        latency_ms=around(FLOAT_MS * ratio),
        speedup=around(1 / ratio, 0.025),
        size_bytes=int(FLOAT_BYTES * size),
        peak_memory_bytes=int(310e6 * memory),
        load_ms=84.0,
        first_ms=12.5,
        build_s=3.4,
        parity=(
            OutputParity(
                name="logits", max_abs=0.21, max_rel=0.1, excess=0.2, scale=9.1, sqnr_db=None,
                cosine=0.9991, least_cosine=0.99, top1_agreement=0.994,
            ),
        ),
        kernels={"MatMulInteger": 37, "LayerNormalization": 13},
    )  # fmt: skip
    return replace(made, **changes)


def candidate(name: str, *, at: float = 0.0, took: float = 20.0, **changes: Any) -> Candidate:
    """A candidate that was accepted and not measured, if nothing else is said."""
    made = Candidate(
        recipe=Recipe(name=name, summary="What was done."),
        verdict="accepted",
        reason="keeps the metric",
        began_s=at,
        seconds=took,
    )
    return replace(made, **changes)


CANDIDATES = (
    candidate(
        "float32", at=0.0, took=31.0, verdict="baseline",
        reason="what every other candidate is compared with",
        measurement=measurement(ratio=1.0, drop=0.0, size=1.0, memory=1.0), on_front=True,
    ),
    candidate(
        "int8-weights", at=31.0, took=18.0,
        recipe=Recipe(
            name="int8-weights", summary="Weights stored as int8 per channel, computed in float.",
            quantization=WeightOnlyInt8(),
        ),
        measurement=measurement(ratio=1.02, drop=0.0004, size=0.26), on_front=True,
    ),
    candidate(
        "int8-dynamic", at=49.0, took=22.0,
        recipe=Recipe(
            name="int8-dynamic", summary="Activations quantised in every run.",
            quantization=DynamicInt8(reduce_range=True),
        ),
        measurement=measurement(ratio=0.61, drop=0.0021, size=0.262), on_front=True,
        notes=("left in float: 3 Softmax",), metric_report=REPORT,
    ),
    candidate(
        "int8-static", at=71.0, took=64.0,
        recipe=Recipe(
            name="int8-static", summary="Ranges from calibration data.", quantization=StaticInt8()
        ),
        measurement=measurement(ratio=0.52, drop=0.0044, size=0.258), on_front=True,
        metric_report=REPORT, notes=("4 nodes went back to float",),
    ),
    candidate(
        "int8-static-fused", at=135.0, took=41.0, verdict="refused",
        reason="drops by 0.0102, but up to 0.0136 cannot be ruled out at 95 %; allowed 0.01",
        measurement=measurement(ratio=0.47, drop=0.0102, size=0.257), origin="model",
    ),
    candidate(
        "int8-static-tables", at=176.0, took=39.0, origin="model",
        measurement=measurement(ratio=0.55, drop=0.0040, size=0.251), on_front=True,
    ),
    candidate(
        "int8-static-minmax", at=215.0, took=33.0, verdict="refused", origin="model",
        reason="collapsed: the metric falls by 0.690 to 0.241",
        measurement=measurement(ratio=0.51, drop=0.69, size=0.258),
    ),
    candidate(
        "pruned-2x", at=248.0, took=410.0, origin="optuna", verdict="outraced",
        reason="cannot become the best any more: 0.71 of float's latency at least",
        recipe=Recipe(name="pruned-2x", summary="Pruned and trained.", pruning=Pruning()),
        sketch=Sketch(
            size_bytes=52_000_000, speedup=around(1.33, 0.05), latency_ms=around(6.1, 0.05),
            metric=0.917,
        ),
    ),
    candidate(
        "int4-weights", at=658.0, took=5.0, origin="optuna", verdict="failed",
        reason="MatMulNBits is not implemented for this shape",
    ),
    candidate(
        "float32-fused", at=663.0, took=1.0, verdict="not applicable", reason="no block to fuse",
    ),
)  # fmt: skip

NODES = (
    NodeFact(
        name="/embeddings/Gather", operator="Gather", precision="int8", sqnr_db=44.2,
        float_ms=0.031, integer_ms=0.034,
    ),
    NodeFact(
        name="/encoder/0/query/MatMul", operator="MatMul", precision="int8", sqnr_db=38.1,
        float_ms=0.412, integer_ms=0.171,
    ),
    NodeFact(
        name="/encoder/0/Softmax", operator="Softmax", precision="float32", float_ms=0.102,
        reason="the runtime has no integer form of Softmax",
    ),
    NodeFact(
        name="/encoder/0/output/MatMul", operator="MatMul", precision="float32", sqnr_db=9.4,
        float_ms=0.398, integer_ms=0.166,
        reason="alone in integers it brings the worst output to 9.4 dB; 20 dB are asked for",
    ),
    NodeFact(name="/encoder/0/Add", operator="Add", precision="float32", reason="in another node"),
    NodeFact(
        name="/classifier/Gemm", operator="Gemm", precision="int8", sqnr_db=51.0, float_ms=0.052,
        integer_ms=0.029,
    ),
)  # fmt: skip

RESULT = TuneResult(
    source="models/minilm-conll",
    data="conll:data/conll2003",
    target="cpu",
    metric="entity-f1",
    goal=Goal(),
    threads=1,
    reference_metric=Interval(value=REFERENCE, low=0.9229, high=0.9391),
    reference_report=REPORT,
    reference_name="PyTorch",
    evaluation_samples=3453,
    calibration_samples=128,
    candidates=CANDIDATES,
    chosen="int8-static",
    chosen_reason="int8-static is the fastest candidate that keeps the metric",
    prices=(
        Price(
            limit=Limit(quantity="drop", allowed=0.01, found=0.0136),
            candidate="int8-static-fused",
            cost="latency",
            now=0.52,
            then=0.47,
        ),
    ),
    nodes=NODES,
    points=1152,
    stopped="no recipe that is left is expected to be better",
    seconds=664.0,
    command="equipoise tune models/minilm-conll --data conll:data/conll2003 -o out",
    machine=MACHINE,
    versions={"equipoise": "0.1.0", "onnxruntime": "1.32.0"},
    warnings=("3 labels occur fewer than 10 times",),
    steps=("Prepared the samples.", "Exported.", "Chose int8-static."),
)

INFEASIBLE = replace(
    RESULT,
    goal=Goal(max_latency_ms=2.0, max_size_bytes=8e6),
    chosen="",
    chosen_reason="int8-static comes nearest",
    binding=(
        Limit(quantity="latency", allowed=2.0, found=4.31),
        Limit(quantity="size", allowed=8e6, found=23.3e6),
    ),
    prices=(
        Price(
            limit=Limit(quantity="latency", allowed=2.0, found=4.31),
            candidate="int8-static",
            cost="latency",
            now=None,
            then=0.52,
        ),
    ),
    candidates=tuple(
        replace(c, verdict="refused", reason="too slow, too large", on_front=False)
        if c.verdict == "accepted"
        else c
        for c in CANDIDATES
    ),
    nodes=(),
)


def large(count: int = 60, *, nodes: int = 120) -> TuneResult:
    """A result with many candidates along a curve, and a deep model."""
    more = tuple(_numbered(index) for index in range(count))
    plans = tuple(replace(NODES[i % len(NODES)], name=f"/layer{i}/node") for i in range(nodes))
    return replace(RESULT, candidates=(*CANDIDATES, *more), nodes=plans)


def _numbered(index: int) -> Candidate:
    """Slower ones lose less, with some scatter; every third is refused."""
    ratio = 0.53 + 0.012 * (index % 29)
    drop = 0.006 * math.exp(-6 * (ratio - 0.5)) + 0.0012 * math.sin(index) ** 2
    refused = index % 3 == 0
    return candidate(
        f"mixed-{index:02d}",
        at=664 + 11 * index,
        took=9 + 6 * math.sin(index) ** 2,
        origin="model" if index < 20 else "optuna",
        verdict="refused" if refused else "accepted",
        reason=f"drops by {drop + 0.01:.4f}; allowed 0.01" if refused else "keeps the metric",
        measurement=measurement(
            ratio=ratio - 0.05 * refused,
            drop=drop + 0.01 * refused,
            size=0.26 + 0.2 * (ratio - 0.5),
        ),
    )
