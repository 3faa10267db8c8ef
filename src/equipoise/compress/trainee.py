"""The modules that a training works on, and the samples that fit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise.compress.batches import Samples
from equipoise.compress.distributed import placed
from equipoise.compress.evaluation import Run
from equipoise.compress.objective.objectives import build_objectives
from equipoise.compress.objective.task_losses import Kind, task_kind
from equipoise.compress.train_config import TrainConfig
from equipoise.errors import DataError, SourceError, UsageError
from equipoise.sources.torch_model import NamedModule, load_module
from equipoise.spec import Array

TRAINABLE: Final = ("transformers", "factory", "timm", "derived")
"""Kinds of sources that can be trained and written again."""

COMPARING: Final = "cosine"
"""The metric that compares with a teacher."""


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """The modules, and the samples that fit them."""

    objectives: Any
    teacher: Any
    samples: Samples


def check_sources(config: TrainConfig) -> None:
    """Before anything is opened.

    Raises:
        SourceError: A student that could not be written again, or a teacher without PyTorch.
    """
    student, teacher = config.student, config.teacher
    if student.kind not in TRAINABLE:
        raise SourceError(
            f"{student.name}: a source of kind {student.kind!r} cannot be trained: its computation"
            " is fixed",
            hint="Give the model as module:package.mod:factory with --weights, as a transformers"
            " directory, or as timm:NAME.",
        )
    if teacher is not None and teacher.kind == "onnx":
        raise SourceError(
            f"{teacher.name}: an ONNX file cannot teach here, because PyTorch does not run it",
            hint="Give the model that it was exported from.",
        )


@contextmanager
def trainee_of(config: TrainConfig, *, device: Any) -> Iterator[Trainee]:
    """Open the models, simulate quantisation where that is asked for, and say what is minimised."""
    samples, kind = _samples_and_kind(config)
    student = load_module(config.student)
    teacher = None if config.teacher is None else _frozen(load_module(config.teacher), device)
    with _quantized(student, config.ranges):
        objectives = build_objectives(
            student.to(device),
            teacher=teacher,
            kind=kind,
            settings=config.settings.objective,
            names=config.names,
            batch=placed(samples.batch(_first(samples)), device=device),
        )
        try:
            yield Trainee(objectives=objectives, teacher=teacher, samples=samples)
        finally:
            objectives.close()


def _first(samples: Samples) -> Array:
    """Two samples, to look at shapes."""
    return np.arange(min(len(samples), 2))


def _frozen(module: Any, device: Any) -> Any:
    return module.eval().requires_grad_(requires_grad=False).to(device)


def _quantized(student: Any, ranges: Path | None) -> AbstractContextManager[object]:
    if ranges is None:
        return nullcontext()
    from equipoise.compress.fake_quantize import attach
    from equipoise.sources.module_grids import read_module_ranges

    attached: AbstractContextManager[object] = attach(student, read_module_ranges(ranges))
    return attached


def _samples_and_kind(config: TrainConfig) -> tuple[Samples, Kind]:
    """Training samples and what they teach. Labels that teach something else are left aside."""
    samples = samples_of(config, "training")
    dtype, rank = samples.label_form
    task = config.student.task
    try:
        return samples, task_kind(task, label_dtype=dtype, label_rank=rank)
    except DataError:
        if config.settings.objective.task > 0:
            raise
        inputs = config.data / "training"
        unlabelled = Samples(inputs, names=config.names, labels=None)
        return unlabelled, task_kind(task, label_dtype="", label_rank=0)


def samples_of(config: TrainConfig, part: str) -> Samples:
    """The samples of ``training`` or ``validation``, with labels where there are any.

    Raises:
        DataError: They are missing or not of the form that is needed.
    """
    labels = config.data / f"{part}_labels"
    return Samples(
        config.data / part, names=config.names, labels=labels if labels.is_dir() else None
    )


def reference_of(config: TrainConfig, teacher: Any, *, labelled: bool) -> Run | None:
    """What runs the teacher, where the metric compares with it.

    Raises:
        DataError: The metric needs labels and there are none.
        UsageError: It needs a teacher and there is none.
    """
    if config.metric != COMPARING:
        if labelled:
            return None
        raise DataError(
            f"the metric {config.metric} needs labels, and the validation samples have none",
            hint=f"Give labelled data, or a teacher and the metric {COMPARING}.",
        )
    if teacher is None:
        raise UsageError(
            f"the metric {COMPARING} compares with a teacher, and there is none",
            hint="Name a teacher, or choose a metric of the labels.",
        )
    named = NamedModule(teacher, names=config.names, source="the teacher")

    def run(batch: dict[str, Any]) -> Mapping[str, Any]:
        return named.call([batch[name] for name in config.names])

    return run
