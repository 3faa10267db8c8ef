"""Train a model again, beside a teacher or alone: what ``distill`` and ``finetune`` call."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Final

from equipoise import fs
from equipoise.compress.distributed import launched_world
from equipoise.compress.settings import TrainSettings
from equipoise.compress.study import StudySettings
from equipoise.compress.train import TrainConfig, TrainRecord
from equipoise.compression.compression import Compression
from equipoise.compression.publishing import CHECKPOINTS, publish
from equipoise.compression.stages import MODEL
from equipoise.errors import UsageError
from equipoise.jobs import FREE_BYTES, JobConfig, make_pipeline
from equipoise.measure.interval import Interval
from equipoise.pipeline import Pipeline
from equipoise.sources.source import Source, parse_source
from equipoise.stages import Observer, StageResult, versions_of
from equipoise.targets.machine import Machine

_VERSIONS: Final = ("equipoise", "torch", "transformers", "accelerate", "optuna", "numpy")


@dataclass(frozen=True, kw_only=True)
class TrainRequest(JobConfig):
    """What to train, on what, how.

    Attributes:
        output: Directory for ``model/``, ``results.json`` and, while it runs, ``checkpoints/``.
        teacher: Trained model to learn from; empty for none. In the words of ``source``.
        teacher_weights: Its checkpoint, for a factory or a model of timm.
        layers: The student is the teacher with so many of its layers; ``source`` is the teacher.
        settings: How to train.
        quantize_aware: Train with the target's static int8 simulated.
        study: Search the settings first.
        processes: Processes on this machine.
        checkpoints: Directory of checkpoints; ``checkpoints`` in ``output`` when None.
    """

    output: Path
    teacher: str = ""
    teacher_weights: Path | None = None
    layers: int | None = None
    settings: TrainSettings = field(default_factory=TrainSettings)
    quantize_aware: bool = False
    study: StudySettings | None = None
    processes: int = 1
    checkpoints: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What training gave: the content of ``results.json``.

    Attributes:
        source: The student as the user named it.
        teacher: The teacher; empty for none.
        data: The data.
        metric: Name of the metric.
        evaluation_samples: Samples that judge, none of which was trained on.
        teacher_metric: On those samples; None without a teacher.
        before: Metric of the student before training.
        after: The same after it.
        drop: Metric of the teacher, or of the student before where there is none, minus after;
            paired over the samples.
        settings: How it was trained; what the study found, where there was one.
        training: What the loop says.
        machine: Where.
        versions: Package -> version.
        warnings: What the user should know.
    """

    source: str
    teacher: str
    data: str
    metric: str
    evaluation_samples: int
    teacher_metric: Interval | None
    before: Interval
    after: Interval
    drop: Interval
    settings: TrainSettings
    training: TrainRecord
    machine: Machine
    versions: dict[str, str]
    warnings: tuple[str, ...]


def train_model(request: TrainRequest, *, observer: Observer | None = None) -> TrainResult | None:
    """Train; write ``model/`` and ``results.json`` into ``request.output``.

    Under ``torchrun`` or ``accelerate launch`` every process calls this. The first one judges and
    writes; the others give None.

    Raises:
        UsageError: Options that do not go together, or a setting out of range.
        InputError: A model or the data cannot be used; teacher and student do not fit.
        NonFiniteError: The loss is no number any more; the last good checkpoint stays.
        OutputError: The output or the checkpoints cannot be written.
        BackendError: A process died; the same command goes on from the last checkpoint.
    """
    _check(request)
    fs.check_writable(request.output, needed_bytes=FREE_BYTES)
    pipeline = make_pipeline(replace(request, for_training=True), observer=observer)
    trainer = _Trainer(pipeline, request)
    trained = trainer.train()
    if _rank():
        return None
    result = trainer.judge(trained.record, model=trained.files / MODEL)
    publish(result, parse_source(str(trained.files / MODEL)), output=request.output)
    return result


def _check(request: TrainRequest) -> None:
    objective = request.settings.objective
    if request.layers is not None and not request.teacher:
        raise UsageError("--layers makes a student of a teacher, and there is none")
    if objective.needs_teacher and not request.teacher:
        raise UsageError("this objective compares with a teacher, and there is none")
    if request.processes < 1:
        raise UsageError(f"--processes is {request.processes}; it must be at least 1")
    if request.processes > 1 and launched_world() > 1:
        raise UsageError(
            f"--processes {request.processes} under a launcher that started {launched_world()}",
            hint="Leave out --processes, or the launcher.",
        )


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


class _Trainer:
    """Trains the student of a request and judges it."""

    def __init__(self, pipeline: Pipeline, request: TrainRequest) -> None:
        self._pipeline, self._request = pipeline, request
        self._compression = Compression(pipeline)
        self._teacher = _teacher_of(request)

    @cached_property
    def _student(self) -> Source:
        """The source that was named, or the teacher with fewer layers."""
        source = self._pipeline.job.source
        if self._request.layers is None:
            return source
        return self._compression.with_layers(source, self._request.layers)

    def train(self) -> StageResult[TrainRecord]:
        """Search the settings if that was asked for, then train with them."""
        config = self._config()
        if self._request.study is not None:
            found = self._compression.study(config, self._request.study)
            config = replace(config, settings=found.best)
        return self._compression.train(config, label="train")

    def _config(self) -> TrainConfig:
        request, data = self._request, self._pipeline.data
        return TrainConfig(
            student=self._student,
            teacher=self._teacher,
            data=data.files,
            names=self._compression.names,
            metric=self._pipeline.job.metric,
            label_names=data.record.labels,
            settings=request.settings,
            processes=request.processes,
            threads=request.threads,
            checkpoints=request.checkpoints or request.output / CHECKPOINTS,
            ranges=self._compression.ranges() if request.quantize_aware else None,
        )

    def judge(self, trained: TrainRecord, *, model: Path) -> TrainResult:
        """The metric of teacher and student on samples that nobody trained on."""
        compared = self._teacher or self._student
        score = partial(self._compression.score, reference=compared)
        teacher = score(self._teacher, label="teacher") if self._teacher else None
        before = score(self._student, label="before")
        after = score(parse_source(str(model), task=self._student.task), label="after")
        data = self._pipeline.data.record
        return TrainResult(
            source=self._request.source,
            teacher=self._request.teacher,
            data=self._request.data,
            metric=self._pipeline.job.metric,
            evaluation_samples=data.evaluation_samples,
            teacher_metric=teacher.metric if teacher else None,
            before=before.metric,
            after=after.metric,
            drop=self._compression.drop(teacher or before, after),
            settings=trained.settings,
            training=trained,
            machine=self._pipeline.job.machine,
            versions=versions_of(_VERSIONS),
            warnings=data.warnings,
        )


def _teacher_of(request: TrainRequest) -> Source | None:
    if not request.teacher:
        return None
    return parse_source(request.teacher, weights=request.teacher_weights, task=request.task)
