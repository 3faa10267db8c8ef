"""What a search found, as data: the content of ``results.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equipoise.measure.interval import Interval
from equipoise.parity.compare import OutputParity
from equipoise.recipe import Recipe
from equipoise.targets.machine import Machine

Verdict = Literal["baseline", "accepted", "refused", "failed", "not applicable"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one engine on the target. All values are measured, none estimated.

    Attributes:
        metric: Task metric with its bootstrap interval over evaluation samples.
        drop: Metric of the reference minus metric of the engine, paired over the same samples.
        latency_ms: Median latency of one inference, milliseconds.
        speedup: Float latency / this latency, median of interleaved rounds.
        size_bytes: Engine on disk.
        peak_memory_bytes: Peak resident memory of a fresh process that loads and runs the engine.
        load_ms: Time to open the engine in a fresh process.
        parity: One entry per output.
        kernels: Operator type -> count after the runtime's own rewriting.
    """

    metric: Interval
    drop: Interval
    latency_ms: float
    speedup: Interval
    size_bytes: int
    peak_memory_bytes: int
    load_ms: float
    parity: tuple[OutputParity, ...]
    kernels: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe with what became of it.

    Attributes:
        recipe: What was done.
        verdict: ``baseline`` for plain float32; ``accepted`` and ``refused`` by the metric;
            ``failed`` when a stage failed; ``not applicable`` when the recipe changes nothing.
        reason: The verdict in words.
        measurement: None when nothing could be measured.
        notes: What the stages noticed, in words: collapsed ranges, nodes left in float.
        metric_report: Per-class table as text, where the metric has one.
        on_front: Whether no accepted candidate is better in all of latency, size and metric.
    """

    recipe: Recipe
    verdict: Verdict
    reason: str
    measurement: Measurement | None = None
    notes: tuple[str, ...] = ()
    metric_report: str = ""
    on_front: bool = False


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """Everything that a tuning run found.

    Attributes:
        source: The model as the user named it.
        data: The evaluation data as the user named it.
        target: Name of the target profile.
        metric: Name of the metric.
        max_drop: Largest allowed drop of the metric, absolute.
        threads: Threads per engine while measuring.
        reference_metric: Metric of PyTorch (or of the float ONNX source) on the same samples.
        reference_report: Its per-class table, where the metric has one.
        reference_name: ``PyTorch`` or ``float ONNX``.
        evaluation_samples: Number of evaluation samples.
        calibration_samples: Number of calibration samples.
        candidates: All candidates, in the order tried.
        chosen: Name of the recipe at the sweet spot.
        chosen_reason: Why, in words.
        machine: Where it was measured.
        versions: Package -> version.
        warnings: What the user should know about data or model.
        steps: What was done and why, one sentence each, in order.
    """

    source: str
    data: str
    target: str
    metric: str
    max_drop: float
    threads: int
    reference_metric: Interval
    reference_report: str
    reference_name: str
    evaluation_samples: int
    calibration_samples: int
    candidates: tuple[Candidate, ...]
    chosen: str
    chosen_reason: str
    machine: Machine
    versions: dict[str, str]
    warnings: tuple[str, ...]
    steps: tuple[str, ...]
