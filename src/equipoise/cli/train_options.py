"""Options of the commands that train: ``distill``, ``finetune`` and ``prune``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.compress.settings import Objective, TrainSettings
    from equipoise.compress.study import StudySettings
    from equipoise.training import TrainRequest


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which samples."""

    train: Annotated[
        str | None,
        typer.Option(
            help="Training data; the training part of --data, or a part of it, if not given."
        ),
    ] = None
    validation: Annotated[
        str | None, typer.Option(help="Data to decide by; a part of the training data by default.")
    ] = None
    training_samples: Annotated[
        int | None, typer.Option(help="Train on so many samples, drawn at random.")
    ] = None
    samples: options.Samples = None
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="The data has no labels: learn from the teacher.")
    ] = False
    metric: Annotated[
        str, typer.Option(help="Task metric; found from the task when not given.")
    ] = ""
    max_length: options.MaxLength = 512
    tokenizer: options.Tokenizer = None
    labels: options.Labels = ""


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How to train."""

    epochs: Annotated[float, typer.Option(help="Passes over the training samples.")] = 3.0
    batch_size: Annotated[int, typer.Option(help="Samples per step, over all processes.")] = 32
    accumulate: Annotated[
        int, typer.Option(help="Parts in which a batch is taken, to save memory.")
    ] = 1
    learning_rate: Annotated[float, typer.Option(help="Largest rate of the schedule.")] = 5e-5
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw"
    weight_decay: Annotated[float, typer.Option(help="Not on biases and norms.")] = 0.01
    schedule: Annotated[
        str, typer.Option(help="After the warm-up: linear, cosine or constant.")
    ] = "linear"
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = (
        0.06
    )
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for none.")] = 1.0
    precision: Annotated[
        str, typer.Option(help="Of the computation: float32, bfloat16 or float16.")
    ] = "float32"
    dropout: Annotated[bool, typer.Option("--dropout", help="Let the model's dropout act.")] = False
    evaluate_every: Annotated[
        float, typer.Option(help="Share of an epoch between evaluations.")
    ] = 1.0
    patience: Annotated[
        int, typer.Option(help="Stop after so many evaluations without a better metric; 0: never.")
    ] = 0
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: at evaluations only.")
    ] = 0
    seed: Annotated[int, typer.Option(help="Of the order of samples.")] = 0
    processes: Annotated[int, typer.Option(help="Processes on this machine.")] = 1
    shard: Annotated[
        bool, typer.Option("--shard", help="Share weights and optimiser between processes (FSDP).")
    ] = False
    checkpoints: Annotated[
        Path | None, typer.Option(help="Directory of checkpoints; inside --output by default.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What to learn from a teacher."""

    temperature: Annotated[float, typer.Option(help="Of both sides' logits.")] = 2.0
    task_weight: Annotated[float, typer.Option(help="Of the loss on labels.")] = 0.5
    logits_weight: Annotated[float, typer.Option(help="Of the teacher's logits.")] = 1.0
    hidden_weight: Annotated[float, typer.Option(help="Of its hidden states.")] = 0.0
    attention_weight: Annotated[float, typer.Option(help="Of its attention maps.")] = 0.0
    features_weight: Annotated[
        float, typer.Option(help="Of its feature maps, for convolutional networks.")
    ] = 0.0


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Where and how stages run."""

    threads: options.Threads = None
    time_limit: Annotated[float, typer.Option(help="Limit for one stage, in seconds.")] = 86400.0
    cache_dir: options.CacheDir = None
    fresh: options.Fresh = False
    quiet: options.Quiet = False
    json: options.Json = False


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Whether and how the settings are searched."""

    trials: Annotated[
        int | None, typer.Option(min=1, help="Search the training settings in so many trials.")
    ] = None
    trial_budget: Annotated[
        str, typer.Option(help="Search them for so long, such as 30m; with --trials, the first.")
    ] = ""
    study: Annotated[
        Path | None, typer.Option(help="SQLite file of the search; inside --output by default.")
    ] = None


def objective_of(given: ObjectiveOptions, *, labelled: bool) -> Objective:
    """The objective that was asked for; without labels there is no loss on them."""
    from equipoise.compress.settings import Objective

    return Objective(
        task=given.task_weight if labelled else 0.0,
        logits=given.logits_weight,
        temperature=given.temperature,
        hidden=given.hidden_weight,
        attention=given.attention_weight,
        features=given.features_weight,
    )


def settings_of(given: LoopOptions, *, objective: Objective) -> TrainSettings:
    """The settings that were asked for. Raises UsageError for one that is out of range."""
    from equipoise import record
    from equipoise.compress.settings import TrainSettings
    from equipoise.errors import UsageError

    names = TrainSettings.__dataclass_fields__
    plain = {name: value for name, value in vars(given).items() if name in names}
    return record.loads(
        TrainSettings,
        record.dumps({**plain, "objective": objective}),
        where="options",
        error=UsageError,
    )


def job_fields(samples: DataOptions, stages: StageOptions) -> dict[str, Any]:
    """Fields of a ``JobConfig`` for training."""
    return {
        "train": samples.train,
        "validation": samples.validation,
        "training_samples": samples.training_samples,
        "samples": samples.samples,
        "labelled": not samples.unlabelled,
        "metric": samples.metric,
        "max_length": samples.max_length,
        "tokenizer": samples.tokenizer,
        "labels": options.names(samples.labels),
        "threads": stages.threads,
        "time_limit_s": stages.time_limit,
        "cache": stages.cache_dir,
        "fresh": stages.fresh,
    }


def study_of(given: StudyOptions, *, output: Path) -> StudySettings | None:
    """The search of settings that was asked for, if any."""
    if given.trials is None and not given.trial_budget:
        return None
    from equipoise.compress.study import StudySettings

    budget = given.trial_budget
    return StudySettings(
        trials=given.trials,
        budget_s=options.seconds(budget, option="--trial-budget") if budget else None,
        storage=given.study or output / "study.db",
    )


def train(request: TrainRequest, *, stages: StageOptions) -> None:
    """Train, and tell what came of it."""
    from equipoise.training import train_model

    with console.progress(quiet=stages.quiet or stages.json) as observer:
        result = train_model(request, observer=observer)
    if result is None:
        return
    if stages.json:
        console.print_json(result)
        return
    from equipoise.report.training import training_table, words_of

    console.out().print(training_table(result))
    console.print_lines(*words_of(result), f"model  {request.output / 'model'}")
