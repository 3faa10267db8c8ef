"""What the training stage takes and gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from equipoise.compress.history import Evaluation
from equipoise.compress.settings import TrainSettings
from equipoise.sources.source import Source
from equipoise.stages import NOT_IN_KEY


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, how.

    Attributes:
        student: The model that learns.
        teacher: The model that it learns from; None for none.
        data: Directory with ``training``, ``validation`` and, where the data is labelled,
            ``training_labels`` and ``validation_labels``.
        names: Names of the inputs, in order.
        metric: Decides which state of the student is kept; on unlabelled data ``cosine``, which
            compares with the teacher.
        label_names: Class names in index order; may be empty.
        settings: How to train.
        processes: Processes on this machine.
        threads: Threads of each; the usable cores divided between them when None.
        checkpoints: Directory of checkpoints. Every config has a directory of its own in it.
        ranges: File of the ranges of modules to simulate the quantisation of; None for float.
    """

    student: Source
    teacher: Source | None
    data: Path
    names: tuple[str, ...]
    metric: str
    label_names: tuple[str, ...]
    settings: TrainSettings
    processes: int = 1
    threads: int | None = None
    checkpoints: Path = field(metadata=NOT_IN_KEY)
    ranges: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """How training went; the best student is in ``model``.

    Attributes:
        settings: How it was trained.
        samples: Training samples.
        steps: Optimiser steps.
        epochs: Passes over the samples.
        losses: Of every step, weighted over the parts.
        parts: Of every step, by part of the objective, not weighted.
        evaluations: On the validation samples; the first before training.
        before_metric: Before training.
        best_metric: Of the state that is kept.
        best_step: The step after which it was.
        last_metric: At the end.
        simulated: Whether the metrics are of a model whose quantisation is simulated.
        seconds: All in all, of interrupted runs too.
        step_seconds: Median time of a step.
        stopped: Whether all steps were done, or the metric did not get better any more.
        resumed_at_step: Step of the checkpoint that this run went on from; 0 when it began.
        processes: How many trained.
    """

    settings: TrainSettings
    samples: int
    steps: int
    epochs: float
    losses: tuple[float, ...]
    parts: dict[str, tuple[float, ...]]
    evaluations: tuple[Evaluation, ...]
    before_metric: float
    best_metric: float
    best_step: int
    last_metric: float
    simulated: bool
    seconds: float
    step_seconds: float
    stopped: Literal["finished", "early"]
    resumed_at_step: int
    processes: int
