"""``equipoise distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli import options
from equipoise.cli.grouped import grouped
from equipoise.cli.train_options import (
    DataOptions,
    LoopOptions,
    ObjectiveOptions,
    StageOptions,
    StudyOptions,
    job_fields,
    objective_of,
    settings_of,
    study_of,
    train,
)


@grouped
def command(
    teacher: Annotated[str, typer.Argument(help="The model to learn from, as tune takes it.")],
    data: options.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for model/ and results.json.")
    ],
    samples: DataOptions,
    loop: LoopOptions,
    objective: ObjectiveOptions,
    study: StudyOptions,
    stages: StageOptions,
    student: Annotated[
        str | None, typer.Argument(help="The model that learns; or give --layers.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="The student is the teacher with so many layers.")
    ] = None,
    weights: options.Weights = None,
    teacher_weights: Annotated[
        Path | None, typer.Option(help="Weights of the teacher, where it is a factory or of timm.")
    ] = None,
    task: options.Task = "",
) -> None:
    """Train a small model to do what a large one does.

    The student learns from the teacher's logits and, where asked for, from its hidden states,
    attention and feature maps; from labels too, where the data has them. A run that is stopped goes
    on from its last checkpoint when the same command is given again. torchrun and accelerate launch
    run the same command on several machines.
    """
    from equipoise.errors import UsageError
    from equipoise.training import TrainRequest

    if (student is None) == (layers is None):
        raise UsageError("give a student or --layers, one of the two")
    wanted = objective_of(objective, labelled=not samples.unlabelled)
    request = TrainRequest(
        source=student or teacher,
        data=data,
        output=output,
        weights=weights if student else teacher_weights,
        task=task,
        study=study_of(study, output=output),
        processes=loop.processes,
        checkpoints=loop.checkpoints,
        settings=settings_of(loop, objective=wanted),
        teacher=teacher,
        teacher_weights=teacher_weights,
        layers=layers,
        **job_fields(samples, stages),
    )
    train(request, stages=stages)
