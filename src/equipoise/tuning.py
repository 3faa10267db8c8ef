"""Find the sweet spot of a trained model on a target, prove it, and pack it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from equipoise import fs
from equipoise.bundle.writer import check_replaceable
from equipoise.compress.cutting import Pruning
from equipoise.compress.settings import TrainSettings
from equipoise.compression.compression import Compression
from equipoise.compression.models import Workplace
from equipoise.compression.publishing import CHECKPOINTS
from equipoise.compression.steps import prune
from equipoise.data.metrics import Metric, get_metric
from equipoise.errors import (
    AccuracyError,
    EquipoiseError,
    LockError,
    OutputError,
    RecipeError,
    UsageError,
)
from equipoise.jobs import FREE_BYTES, JobConfig, make_pipeline
from equipoise.measure.evaluate import read_statistics
from equipoise.measure.interval import metric_interval, paired_drop, smallest_provable_drop
from equipoise.pack import pack
from equipoise.pipeline import Pipeline
from equipoise.recipe import Recipe
from equipoise.report.write import write_report
from equipoise.runtimes.registry import BUILDERS
from equipoise.search.candidates import BASELINE, candidates, pruned
from equipoise.search.choose import choose, pareto_front
from equipoise.search.result import Candidate, Measurement, TuneResult, Verdict
from equipoise.search.verdict import judge
from equipoise.stages import Observer, versions_of
from equipoise.targets.profiles import require_measurable

_VERSIONS: Final = (
    "equipoise", "numpy", "onnx", "onnxruntime", "onnxscript", "torch", "transformers"
)  # fmt: skip
_NOT_THE_CANDIDATES: Final = (LockError, OutputError)
"""Errors that end the run: they say nothing about the candidate that met them."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(JobConfig):
    """What to tune, on what data, for what, and how well.

    Attributes:
        output: Directory for ``bundle/``, ``report.html`` and ``results.json``.
        max_drop: Largest allowed drop of the metric, absolute: 0.01 is one point.
        float_fallback: Put the float engine into the bundle too, for devices that the chosen one
            does not fit.
        prune: Speed-ups to prune to; the pruned models are candidates too.
        recovery: How they are trained again.
    """

    output: Path
    max_drop: float = 0.01
    float_fallback: bool = False
    prune: tuple[float, ...] = ()
    recovery: TrainSettings = field(default_factory=lambda: Pruning().recovery)


def tune(config: TuneConfig, *, observer: Observer | None = None) -> TuneResult:
    """Find the sweet spot; write ``bundle/``, ``report.html`` and ``results.json``.

    Nothing is written to ``config.output`` before all of it is known. A run that is stopped goes on
    from its finished stages when it is called again.

    Raises:
        UsageError: An unknown metric, target or task, or a setting out of range.
        InputError: The model or the data cannot be used.
        ParityError: The exported model does not give the numbers of the source.
        AccuracyError: The float engine itself loses more of the metric than is allowed.
        OutputError: The output directory cannot be written.
    """
    if config.max_drop < 0:
        raise UsageError(f"--max-drop is {config.max_drop}; it must be at least 0")
    for_training = config.for_training or bool(config.prune)
    pipeline = make_pipeline(replace(config, for_training=for_training), observer=observer)
    require_measurable(pipeline.job.target, machine=pipeline.job.machine, runtimes=BUILDERS.names())
    fs.check_writable(config.output, needed_bytes=FREE_BYTES)
    check_replaceable(config.output / "bundle")
    trials = _Trials(pipeline, config)
    result = _search(trials, config)
    chosen = next(c.recipe for c in result.candidates if c.recipe.name == result.chosen)
    with fs.staged_directory(config.output / ".next") as staging:
        pack(
            trials.pipeline_of(chosen),
            result,
            output=staging / "bundle",
            fallback=config.float_fallback,
        )
        write_report(result, output=staging)
    _publish(config.output)
    return result


def _search(trials: _Trials, config: TuneConfig) -> TuneResult:
    pipeline = trials.pipeline
    tried = [trials.attempt(recipe) for recipe in _recipes(pipeline, config)]
    front = pareto_front(tried)
    tried = [replace(c, on_front=c.recipe.name in front) for c in tried]
    chosen, reason = choose(tried)
    data = pipeline.data.record
    return TuneResult(
        source=config.source,
        data=config.data,
        target=config.target,
        metric=pipeline.job.metric,
        max_drop=config.max_drop,
        threads=pipeline.job.threads,
        reference_metric=metric_interval(trials.reference, trials.metric.value),
        reference_report=trials.reference_report,
        reference_name=pipeline.reference.record.by,
        evaluation_samples=data.evaluation_samples,
        calibration_samples=data.calibration_samples,
        candidates=tuple(tried),
        chosen=chosen.recipe.name,
        chosen_reason=reason,
        machine=pipeline.job.machine,
        versions=versions_of(_VERSIONS),
        warnings=(*data.warnings, *_power_warning(trials, config)),
        steps=_steps(pipeline, tried, chosen=chosen, config=config),
    )


def _recipes(pipeline: Pipeline, config: TuneConfig) -> tuple[Recipe, ...]:
    saturates = pipeline.job.target.int8.saturates
    more = [
        recipe
        for speedup in config.prune
        for recipe in pruned(
            Pruning(speedup=speedup, max_drop=config.max_drop, recovery=config.recovery),
            saturates=saturates,
        )
    ]
    return (*candidates(saturates=saturates), *more)


class _Trials:
    """Makes, evaluates and measures candidates against the reference and the float engine."""

    def __init__(self, pipeline: Pipeline, config: TuneConfig) -> None:
        self.pipeline = pipeline
        self._max_drop = config.max_drop
        self._workplace = Workplace(checkpoints=config.output / CHECKPOINTS)
        self._pipelines: dict[Pruning | None, Pipeline] = {None: pipeline}
        self.metric: Metric = get_metric(pipeline.job.metric, labels=pipeline.data.record.labels)
        self._baseline = self._engine(pipeline.float_model, label=BASELINE)
        reference = pipeline.evaluate(None, label=pipeline.reference.record.by)
        self.reference = read_statistics(reference.files)
        self.reference_report = reference.record.report

    def attempt(self, recipe: Recipe) -> Candidate:
        """Try a recipe. What goes wrong in it is its verdict, not the end of the run."""
        try:
            return self._try(recipe)
        except _NOT_THE_CANDIDATES:
            raise
        except RecipeError as error:
            return Candidate(recipe=recipe, verdict="not applicable", reason=error.message)
        except EquipoiseError as error:
            if recipe.name == BASELINE:
                raise
            return Candidate(recipe=recipe, verdict="failed", reason=_briefly(error))

    def pipeline_of(self, recipe: Recipe) -> Pipeline:
        """The stages for the model that ``recipe`` exports: as it is, or pruned.

        Raises:
            RecipeError: Nothing can be cut that pays.
        """
        if recipe.pruning not in self._pipelines:
            self._pipelines[recipe.pruning] = self._pruned(recipe.pruning or Pruning())
        return self._pipelines[recipe.pruning]

    def _pruned(self, pruning: Pruning) -> Pipeline:
        found = prune(self.pipeline, pruning, workplace=self._workplace)
        if found.source == self.pipeline.job.source:
            raise RecipeError(f"no cut was taken: {found.stopped}")
        return Compression(self.pipeline).beside(found.source)

    def _try(self, recipe: Recipe) -> Candidate:
        pipeline = self.pipeline_of(recipe)
        made = pipeline.make(recipe)
        measurement, report, notes = self._measure(made.model, pipeline, label=recipe.name)
        if recipe.name == BASELINE:
            self._require_kept(measurement)
            verdict: Verdict = "baseline"
            reason = "what every other candidate is compared with"
        else:
            verdict, reason = judge(measurement, recipe=recipe, max_drop=self._max_drop)
            if verdict == "refused" and made.notes:
                reason = f"{reason}: {made.notes[0]}"
        return Candidate(
            recipe=recipe,
            verdict=verdict,
            reason=reason,
            measurement=measurement,
            notes=(*made.notes, *notes),
            metric_report=report,
        )

    def _require_kept(self, baseline: Measurement) -> None:
        """Without a float engine that keeps the metric there is nothing to compare with or ship."""
        if baseline.drop.value > self._max_drop:
            raise AccuracyError(
                f"the float engine loses {baseline.drop.value:.4f} of {self.pipeline.job.metric};"
                f" allowed {self._max_drop:g}",
                hint="The export agrees on calibration samples, but not on the evaluation data.",
            )

    def _engine(self, model: Path, *, label: str) -> Path:
        built = self.pipeline.build(model, label=label)
        return built.files / built.record.file

    def _measure(
        self, model: Path, pipeline: Pipeline, *, label: str
    ) -> tuple[Measurement, str, tuple[str, ...]]:
        built = pipeline.build(model, label=label)
        engine = built.files / built.record.file
        evaluated = pipeline.evaluate(engine, label=label)
        memory = pipeline.memory(engine, label=label)
        latency = pipeline.latency(engine, baseline=self._baseline, label=label)
        statistics = read_statistics(evaluated.files)
        value, discrete = self.metric.value, self.metric.discrete
        measurement = Measurement(
            metric=metric_interval(statistics, value),
            drop=paired_drop(self.reference, statistics, value, discrete=discrete),
            latency_ms=latency.engine_ms,
            speedup=latency.speedup,
            size_bytes=built.record.size_bytes,
            peak_memory_bytes=memory.peak_bytes,
            load_ms=memory.load_ms,
            parity=evaluated.record.parity,
            kernels=built.record.kernels,
        )
        return measurement, evaluated.record.report, built.record.notes


def _briefly(error: EquipoiseError) -> str:
    """The first and the last line of a message: a backend's last words can be a whole traceback."""
    lines = [line.strip() for line in error.message.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def _power_warning(trials: _Trials, config: TuneConfig) -> tuple[str, ...]:
    samples = len(trials.reference)
    least = smallest_provable_drop(samples)
    if not trials.metric.discrete or least <= config.max_drop:
        return ()
    words = (
        f"{samples} evaluation samples cannot show a drop below {least:.4f} at 95 % confidence,"
        f" so nothing but float32 can be accepted at --max-drop {config.max_drop:g}"
    )
    return (words,)


def _steps(
    pipeline: Pipeline, tried: list[Candidate], *, chosen: Candidate, config: TuneConfig
) -> tuple[str, ...]:
    exported, data = pipeline.exported.record, pipeline.data.record
    tolerance = ", ".join(f"{t.output} {t.atol:.2g}" for t in exported.proof.tolerances)
    refused = [c.recipe.name for c in tried if c.verdict == "refused"]
    prepared = (
        f"Prepared {data.calibration_samples} calibration and {data.evaluation_samples} evaluation"
        " samples that do not overlap."
    )
    proved = (
        f"Exported with {exported.exporter} to opset {exported.verified.opset}; the outputs agree"
        f" with {pipeline.reference.record.by} at {len(exported.verified.parity)} combinations of"
        f" sizes within {tolerance}."
    )
    measured_words = (
        f"Made and measured {sum(c.measurement is not None for c in tried)} of {len(tried)}"
        f" candidates, each in processes of its own; latency in {config.rounds} interleaved rounds"
        f" against the float engine with {pipeline.job.threads} thread(s)."
    )
    judged = (
        f"Refused for accuracy: {', '.join(refused) or 'none'}. A candidate is accepted when the"
        f" 95 % bound of its paired drop of {pipeline.job.metric} is at most {config.max_drop:g}."
    )
    target = f"Target {config.target}: {pipeline.job.target.int8.reason}."
    return prepared, proved, target, measured_words, judged, f"Chose {chosen.recipe.name}."


def _publish(output: Path) -> None:
    """Move the finished files of ``output/.next`` into place, the bundle first."""
    staging = output / ".next"
    for name in ("bundle", "results.json", "report.html"):
        fs.move_into_place(staging / name, output / name)
    fs.remove(staging)
    fs.remove(output / CHECKPOINTS)
