"""What every command over a model and its data takes, and the pipeline that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from equipoise import fs
from equipoise.data.config import DataConfig
from equipoise.data.metrics import get_metric
from equipoise.data.preprocessing import read_processor
from equipoise.data.readers.base import split_form
from equipoise.errors import UsageError
from equipoise.pipeline import Job, Pipeline
from equipoise.sources.source import Source, parse_source
from equipoise.stages import Observer, StageRunner, default_cache
from equipoise.targets.machine import Machine, detect_machine
from equipoise.targets.profiles import get_target

_METRICS: Final = {
    "token-classification": "entity-f1",
    "causal-lm": "next-token",
    "feature-extraction": "cosine",
    "encoder": "cosine",
    "text-embedding": "cosine",
    "image-embedding": "cosine",
}
"""Task -> its metric; accuracy for others."""

FREE_BYTES: Final = 64 << 20
"""What a place must have left before anything is written to it."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """A model, its data, the device, and where finished stages are kept.

    Attributes:
        source: ``module:package.mod:factory``, ``timm:NAME``, a transformers directory, a ``.pt2``
            program or an ``.onnx`` file.
        data: ``digits``, an ``.npz``, CoNLL or JSONL file, or a directory.
        weights: Checkpoint for a factory or a model of timm.
        task: Head of a transformers model; from its config when empty.
        calibration: Calibration data; a part of ``data`` is set aside when None.
        target: Name of a target profile.
        metric: Name of the task metric; that of the task when empty.
        samples: Evaluate on the first so many samples only.
        calibration_samples: Number of calibration samples.
        max_length: Most tokens per text.
        tokenizer: ``tokenizer.json`` for text data with an ONNX or factory source.
        labels: Class names in index order, for a source that does not know them.
        threads: Threads per operator; all usable cores when None.
        rounds: Interleaved rounds of each latency measurement.
        time_limit_s: Limit for one stage.
        cache: Directory of stage results; the user's cache when None.
        fresh: Run every stage again.
        labelled: Whether the data has to have labels.
        for_training: Prepare training and validation samples too; None where there is a training
            part, or ``train``, alone.
        train: Training data; the training part of ``data``, or a part of it, when None.
        validation: Data to decide by while training; a part of the training data when None.
        training_samples: Train on so many samples only.
    """

    source: str
    data: str
    weights: Path | None = None
    task: str = ""
    calibration: str | None = None
    target: str = "cpu"
    metric: str = ""
    samples: int | None = None
    calibration_samples: int = 128
    max_length: int = 512
    tokenizer: Path | None = None
    labels: tuple[str, ...] = ()
    threads: int | None = None
    rounds: int = 60
    time_limit_s: float = 3600.0
    cache: Path | None = None
    fresh: bool = False
    labelled: bool = True
    for_training: bool | None = False
    train: str | None = None
    validation: str | None = None
    training_samples: int | None = None


def make_pipeline(
    config: JobConfig,
    *,
    observer: Observer | None = None,
    runner: StageRunner | None = None,
    machine: Machine | None = None,
) -> Pipeline:
    """Check what can be checked without work, and set up the stages.

    Args:
        config: The model, its data and the device.
        observer: Hears of progress.
        runner: Runs the stages; one on this machine when None.
        machine: The one that measures; this one when None.

    Raises:
        UsageError: An unknown metric, target or task, or a setting out of range.
        InputError: The model or the data cannot be found.
        OutputError: The cache cannot be written.
    """
    _check_settings(config)
    source = parse_source(config.source, weights=config.weights, task=config.task)
    machine = machine or detect_machine()
    cache = config.cache or default_cache()
    fs.check_writable(cache, needed_bytes=FREE_BYTES)
    runner = runner or StageRunner(
        cache, observer=observer, time_limit_s=config.time_limit_s, fresh=config.fresh
    )
    return Pipeline(_job(config, source=source, machine=machine), runner=runner)


def metric_of(source: Source, *, labelled: bool = True) -> str:
    """The metric of what ``source`` is for. One output of a classifier is a regression.

    Without labels, the cosine between its outputs and those of a reference.
    """
    if not labelled:
        return "cosine"
    if source.task == "sequence-classification" and len(source.labels) == 1:
        return "pearson"
    return _METRICS.get(source.task, "accuracy")


def _job(config: JobConfig, *, source: Source, machine: Machine) -> Job:
    return Job(
        source=source,
        data=_data(config, source=source),
        target=get_target(config.target, machine=machine),
        machine=machine,
        metric=config.metric or metric_of(source, labelled=config.labelled),
        threads=config.threads or machine.cores,
        rounds=config.rounds,
    )


def _data(config: JobConfig, *, source: Source) -> DataConfig:
    return DataConfig(
        data=config.data,
        files=_files(config.data),
        calibration=config.calibration,
        calibration_files=_files(config.calibration),
        task=source.task,
        tokenizer=config.tokenizer or source.tokenizer,
        labels=config.labels or source.labels,
        samples=config.samples,
        calibration_samples=config.calibration_samples,
        max_length=config.max_length,
        labelled=config.labelled,
        preprocessing=read_processor(source.processor) if source.processor else None,
        for_training=config.for_training,
        train=config.train,
        train_files=_files(config.train),
        validation=config.validation,
        validation_files=_files(config.validation),
        training_samples=config.training_samples,
    )


def _files(data: str | None) -> Path | None:
    return split_form(data)[1] if data else None


def _check_settings(config: JobConfig) -> None:
    if config.metric:
        get_metric(config.metric, labels=config.labels or ("",))
    for name, value, least in (
        ("--rounds", config.rounds, 10),
        ("--threads", config.threads, 1),
        ("--samples", config.samples, 1),
        ("--calibration-samples", config.calibration_samples, 1),
        ("--max-length", config.max_length, 2),
        ("--training-samples", config.training_samples, 5),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}; it must be at least {least}")
