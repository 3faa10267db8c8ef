"""The lab that makes and measures engines by the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event, Lock
from time import monotonic
from typing import Final

from equipoise.content import content_sha256
from equipoise.data.metrics import get_metric
from equipoise.errors import ResourceError
from equipoise.measure.evaluate import read_statistics
from equipoise.pipeline import Measuring, Pipeline
from equipoise.recipe import Recipe
from equipoise.search.lab import Built, Scored, Task, Timed, Weighed
from equipoise.search.space import BASELINE

_TAKES: Final = 2
"""Measurements of one recipe in one search: the first, and the one that confirms."""

PipelineOf = Callable[[Recipe], Pipeline]
"""The stages for the model that a recipe exports: as it is, or pruned. Raises RecipeError when
nothing can be cut that pays."""


class StageLab:
    """Recipes as stages; what was done before is looked up.

    Args:
        pipeline: Of the model as it is.
        pipeline_of: That of a recipe.
        series: Number of the search; each has measurements of its own.
    """

    def __init__(self, pipeline: Pipeline, *, pipeline_of: PipelineOf, series: int = 0) -> None:
        self._pipeline, self._pipeline_of, self._series = pipeline, pipeline_of, series
        self._pruning, self._stopped = Lock(), Event()
        built = pipeline.build(pipeline.float_model, label=BASELINE)
        self._baseline = built.files / built.record.file
        metric = get_metric(pipeline.job.metric, labels=pipeline.data.record.labels)
        reference = pipeline.evaluate(None, label=pipeline.reference.record.by)
        self.reference_report = reference.record.report
        self._task = Task(
            reference=read_statistics(reference.files),
            value=metric.value,
            discrete=metric.discrete,
            name=pipeline.job.metric,
        )
        self._engines: dict[str, Path] = {}
        self._first: dict[tuple[str, int | None, str], str] = {}

    def baseline_drop(self) -> float:
        """How much of the metric the float engine loses against the source."""
        found = self._pipeline.evaluate(self._baseline, label=BASELINE)
        reference, value = self._task.reference, self._task.value
        return float(value(reference.sum(0)) - value(read_statistics(found.files).sum(0)))

    def baseline_latency_ms(self) -> float:
        """Median latency of the float engine."""
        float_engine = Recipe(name=BASELINE, summary="")
        self.build(float_engine)
        return self.time(float_engine).latency_ms.value

    @property
    def task(self) -> Task:
        """See Lab."""
        return self._task

    def build(self, recipe: Recipe) -> Built:
        """See Lab."""
        pipeline = self._stages(recipe)
        made = pipeline.make(recipe)
        built = pipeline.build(made.model, label=recipe.name, threads=recipe.threads)
        self._engines[recipe.name] = built.files / built.record.file
        return Built(
            size_bytes=built.record.size_bytes,
            build_s=built.record.build_s,
            kernels=built.record.kernels,
            notes=(*made.notes, *built.record.notes),
            twin=self._twin(recipe),
            kept_db=made.kept_db,
        )

    def time(self, recipe: Recipe, *, quick: bool = False, take: int = 0) -> Timed:
        """See Lab."""
        found = self._stages(recipe).latency(
            self._engines[recipe.name],
            baseline=self._baseline,
            label=recipe.name,
            measuring=Measuring(
                threads=recipe.threads,
                quick=quick,
                baseline_runtime=self._pipeline.job.target.runtime,
                take=self._take(take),
            ),
        )
        return Timed(latency_ms=found.engine_ms, speedup=found.speedup, notes=found.drift.notes)

    def score(self, recipe: Recipe, *, samples: int | None = None) -> Scored:
        """See Lab."""
        found = self._stages(recipe).evaluate(
            self._engines[recipe.name], label=recipe.name, samples=samples
        )
        return Scored(
            statistics=read_statistics(found.files),
            parity=found.record.parity,
            report=found.record.report,
        )

    def limit(self, seconds: float | None) -> None:
        """See Lab."""
        deadline = None if seconds is None else monotonic() + seconds
        self._pipeline.runner.stop_at(deadline)

    def stop(self) -> None:
        """See Lab."""
        self._stopped.set()

    def weigh(self, recipe: Recipe, *, take: int = 0) -> Weighed:
        """See Lab."""
        found = self._stages(recipe).memory(
            self._engines[recipe.name],
            label=recipe.name,
            measuring=Measuring(threads=recipe.threads, take=self._take(take)),
        )
        return Weighed(
            peak_memory_bytes=found.peak_bytes, load_ms=found.load_ms, first_ms=found.first_ms
        )

    def _stages(self, recipe: Recipe) -> Pipeline:
        if self._stopped.is_set():
            raise ResourceError("the search was stopped")
        if recipe.pruning is None:
            return self._pipeline_of(recipe)
        with self._pruning:  # of several trials on one pruned model the first one trains it
            return self._pipeline_of(recipe)

    def _twin(self, recipe: Recipe) -> str:
        """The recipe that has made the same engine before, to be run the same way."""
        key = (content_sha256(self._engines[recipe.name]), recipe.threads, recipe.target)
        first = self._first.setdefault(key, recipe.name)
        return "" if first == recipe.name else first

    def _take(self, take: int) -> int:
        return _TAKES * self._series + take
