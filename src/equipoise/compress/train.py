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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, record
from equipoise.compress.checkpoints import Checkpoints, read_tensors
from equipoise.compress.distributed import Assembled, accelerator, assemble, launched_world
from equipoise.compress.evaluation import Validator
from equipoise.compress.history import Standing
from equipoise.compress.launch import launch, threads_each
from equipoise.compress.loop import Loop
from equipoise.compress.optimization import check_settings
from equipoise.compress.train_config import TrainConfig, TrainRecord
from equipoise.compress.trainee import Trainee, check_sources, reference_of, samples_of, trainee_of
from equipoise.data.metrics import get_metric
from equipoise.errors import BackendError, UsageError
from equipoise.sources.saving import save_source
from equipoise.sources.torch_model import load_module
from equipoise.stages import by_content

__all__ = ["OnEvaluation", "RankConfig", "TrainConfig", "TrainRecord", "train", "train_rank"]

OnEvaluation = Callable[[int, float], None]
"""Called with the step and the metric after each evaluation."""

_MODEL: Final = "model"


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """What one of several processes is to do.

    Attributes:
        config: The whole.
        rendezvous: File through which they find each other.
    """

    config: TrainConfig
    rendezvous: Path


def train(
    config: TrainConfig, *, output: Path, on_evaluation: OnEvaluation | None = None
) -> TrainRecord:
    """Train, and leave the best student as the source ``output/model``.

    Args:
        config: What to train, on what, how.
        output: Existing directory.
        on_evaluation: Hears of evaluations, in the process that trains: at once, or of all of them
            in the end where processes were launched. An exception of it ends the run, and the
            checkpoints stay.

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
        return _train(config, output=output, on_evaluation=on_evaluation)
    with fs.scratch_directory() as folder:
        text = _launched(config, rendezvous=folder / "rendezvous", output=output)
    found = record.loads(TrainRecord, text, where="result.json", error=BackendError)
    if on_evaluation is not None:
        for evaluation in found.evaluations:
            on_evaluation(evaluation.step, evaluation.metric)
    return found


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
    check_sources(config)
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
    # Through JSON, as it reaches other processes: an integer there may be a float here.
    same = record.from_json(TrainConfig, record.to_json(replace(config, processes=1, threads=None)))
    digest = hashlib.sha256(json.dumps(by_content(same), sort_keys=True).encode())
    return config.checkpoints / digest.hexdigest()[:16]


def _train(
    config: TrainConfig,
    *,
    output: Path,
    rendezvous: Path | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> TrainRecord:
    torch = extras.require("torch")
    if config.threads is not None or rendezvous is not None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads_each(config.threads, processes=local))
    directory = _own_directory(config)
    with (
        accelerator(config.settings, rendezvous=rendezvous) as accelerate,
        _alone(directory, accelerate=accelerate) as checkpoints,
        trainee_of(config, device=accelerate.device) as trainee,
    ):
        assembled = assemble(
            trainee.objectives,
            names=config.names,
            settings=config.settings,
            accelerator=accelerate,
        )
        loop = _loop(config, trainee, assembled=assembled, checkpoints=checkpoints)
        standing = loop.run(on_evaluation=on_evaluation)
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


def _loop(
    config: TrainConfig, trainee: Trainee, *, assembled: Assembled, checkpoints: Checkpoints
) -> Loop:
    settings = config.settings
    validation = samples_of(config, "validation")
    validator = Validator(
        validation,
        metric=get_metric(config.metric, labels=config.label_names),
        batch_size=max(settings.batch_size // (assembled.world * settings.accumulate), 1),
        rank=assembled.rank,
        world=assembled.world,
        device=assembled.accelerator.device,
        reference=reference_of(config, trainee.teacher, labelled=validation.labelled),
    )
    return Loop(
        assembled,
        settings=settings,
        samples=trainee.samples,
        validator=validator,
        checkpoints=checkpoints,
    )


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
