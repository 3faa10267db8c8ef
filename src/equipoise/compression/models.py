"""What happens to a model on its way, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equipoise.compress.train import TrainRecord
from equipoise.measure.interval import Interval, Values
from equipoise.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where training runs.

    Attributes:
        checkpoints: Directory of checkpoints; a run that was stopped goes on from them.
        processes: Processes on this machine.
        threads: Threads per process; the usable cores between them when None.
    """

    checkpoints: Path
    processes: int = 1
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model after training.

    Attributes:
        source: The model.
        metric: The best on the validation samples, which is the model's.
        record: What the loop says.
    """

    source: Source
    metric: float
    record: TrainRecord


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model right after a cut.

    Attributes:
        source: The model.
        parameters: That are left.
        loss_before: Mean loss of the task on validation samples before; None without labels.
        loss_after: The same of what is left.
        notes: What the stage noticed.
    """

    source: Source
    parameters: int
    loss_before: float | None
    loss_after: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SourceEngine:
    """The target's float engine of a source.

    Attributes:
        source: The model.
        label: What it is called.
        file: The engine.
        model: The ONNX file that it is built from.
        size_bytes: Of the engine.
        nodes: That the runtime runs.
        parameters: Of the model.
        multiply_accumulates: Of one inference at batch 1 and the default sizes.
    """

    source: Source
    label: str
    file: Path
    model: Path
    size_bytes: int
    nodes: int
    parameters: int
    multiply_accumulates: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """The metric of a model on samples.

    Attributes:
        statistics: float64 [samples, k], as the metric has them.
        metric: Its value with its interval.
        report: Per-class table, where the metric has one.
    """

    statistics: Values
    metric: Interval
    report: str
