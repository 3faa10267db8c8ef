"""What a search found, as data: the content of ``results.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from equipoise.measure.interval import Interval
from equipoise.parity.compare import OutputParity
from equipoise.quantize.plans import NodeFact
from equipoise.recipe import Recipe
from equipoise.search.goal import Goal, Limit, Quantity
from equipoise.targets.machine import Machine

Verdict = Literal["baseline", "accepted", "refused", "outraced", "failed", "not applicable"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one engine on the target. All values are measured, none estimated.

    Attributes:
        metric: Task metric with its bootstrap interval over evaluation samples.
        metric_bound: What the metric is at least, at the stated confidence and for all candidates
            together.
        drop: Metric of the reference minus metric of the engine, paired over the same samples; its
            upper bound holds for all candidates together.
        latency_ms: Median latency of one inference, milliseconds.
        speedup: Float latency / this latency, median of interleaved rounds.
        size_bytes: Engine on disk.
        peak_memory_bytes: Peak resident memory of a fresh process that loads and runs the engine.
        load_ms: Time to open the engine in a fresh process.
        first_ms: Its first inference there.
        build_s: Time to build it from the ONNX file.
        parity: One entry per output.
        kernels: Operator type -> count after the runtime's own rewriting.
    """

    metric: Interval
    metric_bound: float
    drop: Interval
    latency_ms: Interval
    speedup: Interval
    size_bytes: int
    peak_memory_bytes: int
    load_ms: float
    first_ms: float
    build_s: float
    parity: tuple[OutputParity, ...]
    kernels: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """What was measured of a candidate before its race was over.

    Attributes:
        size_bytes: Engine on disk.
        speedup: Float latency / its latency, in few rounds.
        latency_ms: Of one inference, in those.
        metric: On the first evaluation samples.
    """

    size_bytes: int | None = None
    speedup: Interval | None = None
    latency_ms: Interval | None = None
    metric: float | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe with what became of it.

    Attributes:
        recipe: What was done.
        verdict: ``baseline`` for plain float32; ``accepted`` and ``refused`` by the limits;
            ``outraced`` when it could no longer become the best; ``failed`` when a stage failed;
            ``not applicable`` when the recipe changes nothing.
        reason: The verdict in words.
        measurement: None when not all of it was measured.
        sketch: What is known otherwise.
        notes: What the stages noticed, in words: collapsed ranges, nodes left in float.
        metric_report: Per-class table as text, where the metric has one.
        on_front: Whether no accepted candidate is better in all of latency, size and metric.
        origin: What proposed it: ``start``, ``model``, ``optuna``.
        began_s: Seconds after the search began.
        seconds: How long it took; stages that were done before cost nothing.
    """

    recipe: Recipe
    verdict: Verdict
    reason: str
    measurement: Measurement | None = None
    sketch: Sketch = field(default_factory=Sketch)
    notes: tuple[str, ...] = ()
    metric_report: str = ""
    on_front: bool = False
    origin: str = "start"
    began_s: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Price:
    """What relaxing a limit would buy: a shadow price between two candidates that were measured.

    Attributes:
        limit: The limit, and what the candidate has that would become the best.
        candidate: Its name.
        cost: The cost that falls.
        now: Its value for what was chosen, over that of the float engine; None if nothing was.
        then: The same for the candidate.
    """

    limit: Limit
    candidate: str
    cost: Quantity
    now: float | None
    then: float


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """The outcome of the same search again, with every measurement made anew.

    Attributes:
        chosen: Name of the recipe at the sweet spot; empty when nothing keeps all limits.
        speedup: Its speed over float.
        size_bytes: Its engine on disk.
        trials: Number of recipes tried.
    """

    chosen: str
    speedup: Interval | None
    size_bytes: int | None
    trials: int


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """Everything that a tuning run found.

    Attributes:
        source: The model as the user named it.
        data: The evaluation data as the user named it.
        target: Name of the target profile.
        metric: Name of the metric.
        goal: What was asked for.
        threads: Threads per engine while measuring, where a recipe names no other number.
        reference_metric: Metric of PyTorch (or of the float ONNX source) on the same samples.
        reference_report: Its per-class table, where the metric has one.
        reference_name: ``PyTorch`` or ``float ONNX``.
        evaluation_samples: Number of evaluation samples.
        calibration_samples: Number of calibration samples.
        candidates: All candidates, in the order tried.
        chosen: Name of the recipe at the sweet spot; empty when no engine keeps all limits.
        chosen_reason: Why, in words.
        binding: The limits that the nearest candidate breaks, when nothing is chosen.
        prices: What relaxing each limit would buy.
        nodes: The chosen model, node by node, where it was quantised so.
        points: Number of recipes in the space that was searched.
        stopped: Why the search ended, in words.
        seconds: How long it took, earlier runs of the same search included.
        command: The command that does it again.
        machine: Where it was measured.
        versions: Package -> version.
        warnings: What the user should know about data or model.
        steps: What was done and why, one sentence each, in order.
        repeats: The same search again; empty when it was not repeated.
    """

    source: str
    data: str
    target: str
    metric: str
    goal: Goal
    threads: int
    reference_metric: Interval
    reference_report: str
    reference_name: str
    evaluation_samples: int
    calibration_samples: int
    candidates: tuple[Candidate, ...]
    chosen: str
    chosen_reason: str
    binding: tuple[Limit, ...] = ()
    prices: tuple[Price, ...] = ()
    nodes: tuple[NodeFact, ...] = ()
    points: int = 0
    stopped: str = ""
    seconds: float = 0.0
    command: str = ""
    machine: Machine
    versions: dict[str, str]
    warnings: tuple[str, ...]
    steps: tuple[str, ...]
    repeats: tuple[Repeat, ...] = ()
