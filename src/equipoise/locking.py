"""Lock what an engine was accepted with, and say later whether it still holds."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from equipoise import onnxio
from equipoise.data.metrics import get_metric
from equipoise.errors import UsageError
from equipoise.locked import (
    Compared,
    Figures,
    Lock,
    LockedLatency,
    compare,
    incomparable,
    latency_gate,
    not_compared,
    read_lock,
)
from equipoise.measure.evaluate import read_statistics
from equipoise.measure.interval import paired_drop
from equipoise.measure.kernels import kernels_of
from equipoise.measure.regression import (
    CHECK_PAIRS,
    LOCK_PAIRS,
    ROUNDS,
    SLOWDOWN,
    ClockName,
    OpeningsConfig,
    clock_for,
    estimate,
    in_children,
    settle,
    watch,
)
from equipoise.pipeline import Pipeline
from equipoise.report.gates import Gate
from equipoise.runtimes.engine import ENGINE_MANIFEST, EngineFile, read_engine_manifest
from equipoise.stages import Observer, content_sha256, versions_of

_UNLABELLED: Final = "cosine"
_VERSIONS: Final = (
    "equipoise", "numpy", "onnx", "onnxruntime", "openvino", "torch", "transformers"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """How the latency is locked and watched.

    Attributes:
        slowdown: The slow-down that has to be seen: 0.05 is 5 %.
        rounds: Interleaved rounds of each opening of a lock; a check takes those of its lock.
        pairs: How often both engines are opened in either order, at first and at most; 16 to 48
            for a lock and 8 to 32 for a check when None.
        any_machine: Compare though the lock is of another CPU or number of threads.
    """

    slowdown: float = SLOWDOWN
    rounds: int = ROUNDS
    pairs: tuple[int, int] | None = None
    any_machine: bool = False


def make_lock(
    engine: EngineFile,
    pipeline: Pipeline,
    *,
    settings: LatencySettings | None = None,
    observer: Observer | None = None,
) -> Lock:
    """Measure what is to be locked.

    Args:
        engine: The engine.
        pipeline: Of its source and data.
        settings: How its latency is measured.
        observer: Hears of the measurement of latency.

    Raises:
        UsageError: The engine is for another runtime than the pipeline's target.
        EquipoiseError: What the stages raise.
    """
    chosen = settings or LatencySettings()
    pipeline = _comparing(pipeline)
    compared, figures = _compared(engine, pipeline), _figures(engine, pipeline)
    clock = clock_for(engine, threads=pipeline.job.threads)
    config = _openings(engine, pipeline, rounds=chosen.rounds, clock=clock)
    with _Watched(observer):
        openings = settle(
            in_children(config), slowdown=chosen.slowdown, pairs=chosen.pairs or LOCK_PAIRS
        )
    ratio = round(math.exp(estimate(openings.log_ratios).mean), 5)
    return Lock(
        compared=compared,
        figures=figures,
        latency=LockedLatency(ratio=ratio, rounds=chosen.rounds, clock=clock, openings=openings),
        machine=pipeline.job.machine,
        versions=_versions(),
    )


def check_locked(
    lock: Path,
    engine: EngineFile,
    pipeline: Pipeline,
    *,
    settings: LatencySettings | None = None,
    observer: Observer | None = None,
) -> tuple[Gate, ...]:
    """Measure anew and compare with what was locked.

    Args:
        lock: File that ``equipoise lock`` wrote.
        engine: The engine now.
        pipeline: Of its source and data.
        settings: How its latency is compared.
        observer: Hears of the measurement of latency.

    Returns:
        A gate for what was compared, the metric, each output, size, kernels and latency.

    Raises:
        InputError: The lock cannot be read.
        IncompatibleError: A later version of equipoise wrote it.
        EquipoiseError: What the stages raise.
    """
    was, chosen = read_lock(lock), settings or LatencySettings()
    pipeline = _comparing(pipeline)
    now = Lock(
        compared=_compared(engine, pipeline),
        figures=_figures(engine, pipeline),
        latency=was.latency,
        machine=pipeline.job.machine,
        versions=_versions(),
    )
    gates = tuple(compare(was, now, limits=_limits(pipeline)))
    reason = incomparable(was, now, any_machine=chosen.any_machine)
    if reason:
        return (*gates, not_compared("latency", reason))
    config = _openings(engine, pipeline, rounds=was.latency.rounds, clock=was.latency.clock)
    with _Watched(observer):
        found, _ = watch(
            was.latency.openings.log_ratios,
            in_children(config),
            slowdown=chosen.slowdown,
            pairs=chosen.pairs or CHECK_PAIRS,
        )
    return (*gates, latency_gate(was, now, found=found, slowdown=chosen.slowdown))


class _Watched:
    """Tells an observer that latency is measured; the stages tell of themselves."""

    _label = "latency"

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer or Observer()

    def __enter__(self) -> None:
        self._observer.started(self._label)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._observer.ended(self._label, cached=False)
        else:
            self._observer.failed(self._label)


def _comparing(pipeline: Pipeline) -> Pipeline:
    """The pipeline with the metric that it can compute: data without labels has the cosine."""
    if pipeline.job.data.labelled:
        return pipeline
    unlabelled = copy.copy(pipeline)  # with the results of the stages that have run
    unlabelled.job = replace(pipeline.job, metric=_UNLABELLED)
    return unlabelled


def _compared(engine: EngineFile, pipeline: Pipeline) -> Compared:
    job = pipeline.job
    if engine.runtime != job.target.runtime:
        raise UsageError(
            f"{engine.file} is an engine of {engine.runtime}; the target {job.target.name!r} runs"
            f" {job.target.runtime}",
            hint="Give the --target that the engine was built for.",
        )
    return Compared(
        source=_from_here(job.source.name),
        data=_from_here(job.data.data),
        samples=pipeline.data.record.evaluation_samples,
        fingerprint=content_sha256(pipeline.evaluation),
        metric=job.metric,
        labelled=job.data.labelled,
        target=job.target.name,
        runtime=engine.runtime,
        threads=job.threads,
    )


def _from_here(name: str) -> str:
    """A path below this directory, without what is above it: the lock is read elsewhere."""
    return name.replace(f"{Path.cwd()}{os.sep}", "")


def _figures(engine: EngineFile, pipeline: Pipeline) -> Figures:
    reference = pipeline.evaluate(None, label=pipeline.reference.record.by)
    evaluated = pipeline.evaluate(engine.file, label=engine.file.name)
    metric = get_metric(pipeline.job.metric, labels=pipeline.data.record.labels)
    statistics = read_statistics(reference.files), read_statistics(evaluated.files)
    return Figures(
        reference_metric=reference.record.value,
        metric=evaluated.record.value,
        drop=paired_drop(*statistics, metric.value, discrete=metric.discrete),
        parity=evaluated.record.parity,
        size_bytes=_size_bytes(engine),
        kernels=kernels_of(engine, threads=pipeline.job.threads),
    )


def _size_bytes(engine: EngineFile) -> int:
    folder = engine.file.parent
    if not (folder / ENGINE_MANIFEST).is_file():
        return onnxio.file_bytes(engine.file)
    return sum((folder / name).stat().st_size for name in read_engine_manifest(folder).files)


def _openings(
    engine: EngineFile, pipeline: Pipeline, *, rounds: int, clock: ClockName
) -> OpeningsConfig:
    return OpeningsConfig(
        engine=engine,
        baseline=EngineFile(file=pipeline.float_model),
        samples=pipeline.evaluation,
        rounds=rounds,
        clock=clock,
        threads=pipeline.job.threads,
    )


def _versions() -> dict[str, str]:
    return {name: v for name, v in versions_of(_VERSIONS).items() if v != "missing"}


def _limits(pipeline: Pipeline) -> dict[str, float]:
    """Output -> the difference from the source that is no more than float arithmetic."""
    return {t.output: t.atol for t in pipeline.exported.record.proof.tolerances}
