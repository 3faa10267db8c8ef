"""``equipoise finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli import options
from equipoise.cli.grouped import grouped
from equipoise.cli.train_options import (
    DataOptions,
    LoopOptions,
    StageOptions,
    StudyOptions,
    job_fields,
    settings_of,
    study_of,
    train,
)


@grouped
def command(
    source: options.Source,
    data: options.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for model/ and results.json.")
    ],
    samples: DataOptions,
    loop: LoopOptions,
    study: StudyOptions,
    stages: StageOptions,
    weights: options.Weights = None,
    task: options.Task = "",
    quantize_aware: Annotated[
        bool,
        typer.Option(
            "--quantize-aware", help="Train with the target's static int8 simulated in every step."
        ),
    ] = False,
    target: options.Target = "cpu",
) -> None:
    """Train a model on labelled data, plainly or with its int8 engine simulated.

    --quantize-aware is for a model whose static int8 engine loses too much: it calibrates the
    model, rounds inputs and weights in every step as that engine does, and leaves float weights
    that lose less when they are quantised again.
    """
    from equipoise.compress.settings import Objective
    from equipoise.training import TrainRequest

    request = TrainRequest(
        source=source,
        data=data,
        output=output,
        weights=weights,
        task=task,
        study=study_of(study, output=output),
        processes=loop.processes,
        checkpoints=loop.checkpoints,
        settings=settings_of(loop, objective=Objective()),
        quantize_aware=quantize_aware,
        target=target,
        **job_fields(samples, stages),
    )
    train(request, stages=stages)
