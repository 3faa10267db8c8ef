"""The stage that trains a model: alone, beside a teacher, or with its quantisation simulated.

One process trains here. Several on this machine are launched as children; under ``torchrun`` or
``accelerate launch`` this process is one of those launched already, on one machine or many, and
all of them leave the same record and model. On several machines the directory of checkpoints has
to be one that all of them see.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from equipoise import extras, fs, record
from equipoise.compress.batches import Samples
from equipoise.compress.checkpoints import Checkpoints, Evaluation, Standing, read_tensors
from equipoise.compress.distributed import (
    Assembled,
    accelerator,
    assemble,
    launched_world,
    placed,
)
from equipoise.compress.evaluation import Run, Validator
from equipoise.compress.launch import launch, threads_each
from equipoise.compress.loop import Loop
from equipoise.compress.objective.objectives import build_objectives
from equipoise.compress.objective.task_losses import Kind, task_kind
from equipoise.compress.optimization import check_settings
from equipoise.compress.settings import TrainSettings
from equipoise.data.metrics import get_metric
from equipoise.errors import BackendError, DataError, UsageError
from equipoise.sources.saving import save_source
from equipoise.sources.source import Source
from equipoise.sources.torch_model import NamedModule, load_module
from equipoise.spec import Array
from equipoise.stages import NOT_IN_KEY, by_content

_COMPARING: Final = "cosine"
_MODEL: Final = "model"


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


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """What one of several processes is to do.

    Attributes:
        config: The whole.
        rendezvous: File through which they find each other.
    """

    config: TrainConfig
    rendezvous: Path


def train(config: TrainConfig, *, output: Path) -> TrainRecord:
    """Train, and leave the best student as the source ``output/model``.

    Raises:
        UsageError: A setting is out of range, does not go with the others or with the launcher; or
            a checkpoint is of another number of processes.
        RecipeError: There is nothing to learn from.
        DataError: Labels are missing where they are needed, or do not fit.
        SourceError: A model cannot be opened, or student and teacher do not fit.
        NonFiniteError: Training diverged; the last good checkpoint stays.
        OutputError: The checkpoints or the output cannot be written.
        IntegrityError: A checkpoint is damaged.
        BackendError: A process died.
    """
    world = launched_world()
    _check(config, world=world or config.processes)
    fs.check_writable(config.checkpoints)
    if world or config.processes == 1:
        return _train(config, output=output, rendezvous=None)
    with fs.scratch_directory() as folder:
        text = _launched(config, rendezvous=folder / "rendezvous", output=output)
    return record.loads(TrainRecord, text, where="result.json", error=BackendError)


def _launched(config: TrainConfig, *, rendezvous: Path, output: Path) -> str:
    try:
        return launch(
            "equipoise.compress.train:train_rank",
            RankConfig(config=config, rendezvous=rendezvous),
            processes=config.processes,
            threads=threads_each(config.threads, processes=config.processes),
            output=output,
        )
    except BackendError as error:
        last = Checkpoints(_own_directory(config)).last()
        if last is not None and not error.hint:
            error.hint = f"Run the same command again; it goes on from {last}."
        raise


def train_rank(config: RankConfig, *, output: Path) -> TrainRecord:
    """What each launched process does. Raises as :func:`train`."""
    return _train(config.config, output=output, rendezvous=config.rendezvous)


def _check(config: TrainConfig, *, world: int) -> None:
    settings = config.settings
    check_settings(settings)
    if config.processes < 1:
        raise UsageError(f"processes is {config.processes}; it has to be 1 or more")
    if config.processes not in {1, world}:
        raise UsageError(
            f"{config.processes} processes are asked for under a launcher that started {world}",
            hint="Leave out --processes, or the launcher.",
        )
    if settings.batch_size < world * settings.accumulate:
        raise UsageError(
            f"a batch of {settings.batch_size} samples cannot be taken by {world} processes in"
            f" {settings.accumulate} parts each",
            hint=f"Raise batch_size to {world * settings.accumulate} or more.",
        )


def _own_directory(config: TrainConfig) -> Path:
    """The directory of checkpoints of this config, whoever runs it and with how many threads."""
    same = replace(config, processes=1, threads=None)
    digest = hashlib.sha256(json.dumps(by_content(same), sort_keys=True).encode())
    return config.checkpoints / digest.hexdigest()[:16]


def _train(config: TrainConfig, *, output: Path, rendezvous: Path | None) -> TrainRecord:
    torch = extras.require("torch")
    if config.threads is not None or rendezvous is not None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads_each(config.threads, processes=local))
    directory = _own_directory(config)
    with (
        accelerator(config.settings, rendezvous=rendezvous) as accelerate,
        _alone(directory, accelerate=accelerate) as checkpoints,
        _trainee(config, device=accelerate.device) as trainee,
    ):
        assembled = assemble(
            trainee.objectives,
            names=config.names,
            settings=config.settings,
            accelerator=accelerate,
        )
        loop = _loop(config, trainee, assembled=assembled, checkpoints=checkpoints)
        standing = loop.run()
        accelerate.wait_for_everyone()  # the first has to have written what the others read
        if rendezvous is None or accelerate.is_main_process:
            _save(config, checkpoints.best_file(standing), directory=output / _MODEL)
        accelerate.wait_for_everyone()
        return _record(config, loop, standing)


@contextmanager
def _alone(directory: Path, *, accelerate: Any) -> Iterator[Checkpoints]:
    """The checkpoints, for one run at a time; a second of the same config waits and goes on.

    Raises:
        UsageError: The processes have different configs.
    """
    with ExitStack() as stack:
        checkpoints = Checkpoints(directory)
        if accelerate.is_main_process:
            stack.enter_context(fs.locked(directory))
            checkpoints.clean()
        names = extras.require("accelerate.utils").gather_object([directory.name])
        if len(set(names)) > 1:
            raise UsageError(
                f"the processes do not train the same: their configs are {', '.join(names)}",
                hint="Give every process the same command, data and models.",
            )
        yield checkpoints


@dataclass(frozen=True, kw_only=True)
class _Trainee:
    """The modules, and the samples that fit them."""

    objectives: Any
    teacher: Any
    samples: Samples


@contextmanager
def _trainee(config: TrainConfig, *, device: Any) -> Iterator[_Trainee]:
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
            yield _Trainee(objectives=objectives, teacher=teacher, samples=samples)
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
    samples = _samples(config, "training")
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


def _samples(config: TrainConfig, part: str) -> Samples:
    labels = config.data / f"{part}_labels"
    return Samples(
        config.data / part, names=config.names, labels=labels if labels.is_dir() else None
    )


def _loop(
    config: TrainConfig, trainee: _Trainee, *, assembled: Assembled, checkpoints: Checkpoints
) -> Loop:
    settings = config.settings
    validation = _samples(config, "validation")
    validator = Validator(
        validation,
        metric=get_metric(config.metric, labels=config.label_names),
        batch_size=max(settings.batch_size // (assembled.world * settings.accumulate), 1),
        rank=assembled.rank,
        world=assembled.world,
        device=assembled.accelerator.device,
        reference=_reference(config, trainee.teacher, labelled=validation.labelled),
    )
    return Loop(
        assembled,
        settings=settings,
        samples=trainee.samples,
        validator=validator,
        checkpoints=checkpoints,
    )


def _reference(config: TrainConfig, teacher: Any, *, labelled: bool) -> Run | None:
    """What runs the teacher, where the metric compares with it."""
    if config.metric != _COMPARING:
        if labelled:
            return None
        raise DataError(
            f"the metric {config.metric} needs labels, and the validation samples have none",
            hint=f"Give labelled data, or a teacher and the metric {_COMPARING}.",
        )
    if teacher is None:
        raise UsageError(
            f"the metric {_COMPARING} compares with a teacher, and there is none",
            hint="Name a teacher, or choose a metric of the labels.",
        )
    named = NamedModule(teacher, names=config.names, source="the teacher")

    def run(batch: dict[str, Any]) -> Mapping[str, Any]:
        return named.call([batch[name] for name in config.names])

    return run


def _save(config: TrainConfig, best: Path, *, directory: Path) -> None:
    """Write the best student, as a source like the one it began as."""
    module = load_module(config.student)
    module.load_state_dict(read_tensors(best))
    save_source(module, base=config.student, directory=directory)


def _record(config: TrainConfig, loop: Loop, standing: Standing) -> TrainRecord:
    return TrainRecord(
        settings=config.settings,
        samples=loop.samples,
        steps=standing.step,
        epochs=standing.step / loop.per_epoch,
        losses=standing.losses,
        parts=standing.parts,
        evaluations=standing.evaluations,
        before_metric=standing.evaluations[0].metric,
        best_metric=standing.best.metric,
        best_step=standing.best.step,
        last_metric=standing.evaluations[-1].metric,
        simulated=config.ranges is not None,
        seconds=standing.seconds,
        step_seconds=float(np.median(standing.step_seconds)),
        stopped="finished" if standing.step == loop.steps else "early",
        resumed_at_step=loop.resumed_at_step,
        processes=standing.processes,
    )
