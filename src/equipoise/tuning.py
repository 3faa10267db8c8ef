"""Find the sweet spot of a trained model on a target, prove it, and pack it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Final

from equipoise import fs, onnxio
from equipoise.bundle.writer import check_replaceable
from equipoise.cluster.device import detect_device
from equipoise.cluster.runner import open_runner
from equipoise.compress.cutting import Pruning
from equipoise.compress.settings import TrainSettings
from equipoise.compression.automatic import Automatic, automatic_prunings
from equipoise.compression.compression import Compression
from equipoise.compression.models import Workplace
from equipoise.compression.publishing import CHECKPOINTS
from equipoise.compression.steps import prune
from equipoise.errors import (
    AccuracyError,
    MissingExtraError,
    NotMetError,
    RecipeError,
    UsageError,
)
from equipoise.jobs import FREE_BYTES, JobConfig, make_pipeline
from equipoise.measure.interval import metric_interval, smallest_provable_drop
from equipoise.pack import pack
from equipoise.pipeline import Job, Pipeline
from equipoise.quantize.plans import NodeFact
from equipoise.quantize.weight_only import has_tables
from equipoise.recipe import Recipe
from equipoise.report.words import limit_words
from equipoise.report.write import write_report
from equipoise.runtimes.registry import BUILDERS, builder
from equipoise.search.choose import broken_by, nearest, prices
from equipoise.search.goal import Goal, Limit, check_goal
from equipoise.search.journal import Journal
from equipoise.search.nodes import facts_of
from equipoise.search.result import Repeat, TuneResult
from equipoise.search.search import Budget, Found, SearchSettings, Watcher, search
from equipoise.search.space import (
    BASELINE,
    Space,
    SpaceSettings,
    baseline_alone,
    space_for,
)
from equipoise.search.stages import StageLab
from equipoise.stages import (
    Observer,
    StageRunner,
    by_content,
    code_sha256,
    default_cache,
    versions_of,
)
from equipoise.targets.profiles import get_target, require_measurable

JOURNALS: Final = "search"
"""Folder of the cache with what was tried: one file for each question."""

_VERSIONS: Final = (
    "equipoise", "numpy", "onnx", "onnxruntime", "onnxscript", "torch", "transformers"
)  # fmt: skip
_TRIALS: Final = 16
"""Where neither a time nor a number is given: the starts, and nearly as many again."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(JobConfig):
    """What to tune, on what data, for what, and how well.

    Attributes:
        output: Directory for ``bundle/``, ``report.html`` and ``results.json``.
        goal: Limits, and what to minimise.
        budget: When to stop; 16 trials where nothing is said.
        recipe: Make this recipe alone, and search nothing.
        also: Other targets of this device, such as ``openvino`` beside ``cpu``: their engines are
            candidates too.
        float_fallback: Put the float engine into the bundle too, for devices that the chosen one
            does not fit.
        prune: Speed-ups to prune to; the pruned models are candidates too. None, with a budget of
            time and training data that is no part of what judges, tries what the budget allows.
        recovery: How they are trained again.
        repeat: Search so many times, with all measurements made anew, to see how stable the choice
            is; the first result is the one that is packed.
        seed: Of what the search draws.
        workers: Trials at once, on this machine or the cluster.
        cluster: Address of a Ray cluster; this machine alone when empty.
        storage: Path or fsspec URL that all nodes of the cluster reach.
        memory_limit_bytes: Resident memory that one stage may take; None for no limit.
        command: What the user typed, for the report.
    """

    output: Path
    goal: Goal = field(default_factory=Goal)
    budget: Budget = field(default_factory=Budget)
    recipe: Recipe | None = None
    also: tuple[str, ...] = ()
    float_fallback: bool = False
    prune: tuple[float, ...] | None = None
    recovery: TrainSettings = field(default_factory=lambda: Pruning().recovery)
    repeat: int = 1
    seed: int = 0
    workers: int | None = None
    cluster: str = ""
    storage: str = ""
    memory_limit_bytes: int | None = None
    command: str = ""


def tune(
    config: TuneConfig, *, observer: Observer | None = None, watcher: Watcher | None = None
) -> TuneResult:
    """Find the sweet spot; write ``bundle/``, ``report.html`` and ``results.json``.

    Nothing of these is written before all of it is known. A run that is stopped goes on from its
    journal and its finished stages when it is called again; stopped by a signal after the float
    engine was measured, it writes the best so far first.

    Raises:
        UsageError: An unknown metric, target or task, or a setting out of range.
        InputError: The model or the data cannot be used.
        ParityError: The exported model does not give the numbers of the source.
        AccuracyError: The float engine itself loses more of the metric than is allowed.
        NotMetError: No engine keeps all limits; the report says which bind, and no bundle is
            written.
        OutputError: The output directory cannot be written.
        InterruptedRunError: A signal, after the best so far has been written.
    """
    _check(config)
    with _runner(config, observer) as runner:
        return _tune(config, runner=runner, watcher=watcher)


def _runner(config: TuneConfig, observer: Observer | None) -> AbstractContextManager[StageRunner]:
    return open_runner(
        config.cluster,
        workers=config.workers,
        storage=config.storage,
        target=config.target,
        cache=config.cache or default_cache(),
        observer=observer,
        time_limit_s=config.time_limit_s,
        memory_limit_bytes=config.memory_limit_bytes,
        fresh=config.fresh,
    )


def _tune(config: TuneConfig, *, runner: StageRunner, watcher: Watcher | None) -> TuneResult:
    machine = detect_device(runner, target=config.target) if config.cluster else None
    pipeline = make_pipeline(
        replace(config, for_training=_for_training(config)), runner=runner, machine=machine
    )
    _require_measurable(pipeline.job, also=_others(config))
    fs.check_writable(config.output, needed_bytes=FREE_BYTES)
    check_replaceable(config.output / "bundle")
    run = _Run(pipeline, config, watcher=watcher)
    found = run.search()
    result = run.result(found)
    with fs.staged_directory(config.output / ".next") as staging:
        if found.chosen is not None:
            chosen = run.pipeline_of(found.chosen.recipe)
            pack(chosen, result, output=staging / "bundle", fallback=config.float_fallback)
        write_report(result, output=staging)
    _publish(config.output, with_bundle=found.chosen is not None)
    if found.interrupted is not None:
        raise found.interrupted
    if found.chosen is None:
        raise _not_met(result, config)
    return result


def _for_training(config: TuneConfig) -> bool | None:
    """Whether training samples are needed, not, or taken where they are."""
    pruned = bool(config.prune) or (config.recipe is not None and config.recipe.pruning is not None)
    if pruned or config.for_training:
        return True
    return None if _is_automatic(config) else False


def _is_automatic(config: TuneConfig) -> bool:
    """Whether pruning is decided by the budget."""
    return config.prune is None and config.recipe is None and config.budget.seconds is not None


def _check(config: TuneConfig) -> None:
    check_goal(config.goal)
    for option, value in (("--repeat", config.repeat), ("--trials", config.budget.trials)):
        if value is not None and value < 1:
            raise UsageError(f"{option} is {value}; it must be at least 1")
    if config.budget.seconds is not None and config.budget.seconds <= 0:
        raise UsageError(f"--budget is {config.budget.seconds:g} s; it must be more than 0")


def _others(config: TuneConfig) -> tuple[str, ...]:
    """Targets beside the first one: those asked for, and that of a recipe that is named."""
    named = config.recipe.target if config.recipe else ""
    return tuple(dict.fromkeys([*config.also, *([named] if named else [])]))


def _require_measurable(job: Job, *, also: Sequence[str]) -> None:
    others = [get_target(name, machine=job.machine) for name in also]
    for target in (job.target, *others):
        require_measurable(target, machine=job.machine, runtimes=BUILDERS.names())
        availability = builder(target.runtime).availability()
        if not availability.available:
            raise MissingExtraError(
                f"the target {target.name!r} needs {target.runtime}: {availability.reason}",
                hint=availability.install,
            )


class _Run:
    """One run over a model: its search, and what is told of it."""

    def __init__(self, pipeline: Pipeline, config: TuneConfig, *, watcher: Watcher | None) -> None:
        self._pipeline, self._config = pipeline, config
        self._watcher = watcher
        self._workplace = Workplace(checkpoints=config.output / CHECKPOINTS)
        self._pipelines: dict[Pruning | None, Pipeline] = {None: pipeline}
        machine = pipeline.job.machine
        self._targets = {name: get_target(name, machine=machine) for name in _others(config)}
        self._lab = StageLab(pipeline, pipeline_of=self.pipeline_of)

    # The search.

    def search(self) -> Found:
        """Search, with a journal."""
        self._require_kept()
        cache = self._config.cache or default_cache()
        with Journal(cache / JOURNALS / f"{self._question()}.sqlite") as journal:
            if self._config.fresh:
                journal.clear()
            return search(
                self._space,
                self._lab,
                settings=self._settings(seed=self._config.seed),
                journal=journal,
                watcher=self._watcher,
            )

    @cached_property
    def _space(self) -> Space:
        config, job = self._config, self._pipeline.job
        if config.recipe is not None:
            return baseline_alone(saturates=job.target.int8.saturates)
        automatic = self._automatic
        prunings = automatic.prunings if automatic else self._asked_prunings()
        most = job.machine.cores
        return space_for(
            SpaceSettings(
                saturates=job.target.int8.saturates,
                prunings=tuple(prunings),
                first_pruning=automatic is not None,
                threads=tuple(range(1, most + 1)) if config.threads is None else (),
                targets=config.also,
                tables=job.target.gathers_blocks
                and has_tables(onnxio.load_graph(self._pipeline.float_model)),
            )
        )

    @cached_property
    def _automatic(self) -> Automatic | None:
        config = self._config
        if not _is_automatic(config):
            return None
        assert config.budget.seconds is not None  # noqa: S101  else it would not be automatic
        return automatic_prunings(
            self._pipeline,
            budget_s=config.budget.seconds,
            latency_ms=self._lab.baseline_latency_ms(),
            max_drop=_or_any(config.goal.max_drop),
            recovery=config.recovery,
        )

    def _asked_prunings(self) -> list[Pruning]:
        config = self._config
        allowed = _or_any(config.goal.max_drop)
        return [
            Pruning(speedup=speedup, max_drop=allowed, recovery=config.recovery)
            for speedup in config.prune or ()
        ]

    def _settings(self, *, seed: int) -> SearchSettings:
        budget = self._config.budget
        unlimited = budget.seconds is None and budget.trials is None
        return SearchSettings(
            goal=self._config.goal,
            asked=(self._config.recipe,) if self._config.recipe else (),
            budget=Budget(trials=_TRIALS) if unlimited else budget,
            seed=seed,
            slots=self._pipeline.runner.slots,
            refine=not unlimited,
        )

    def _question(self) -> str:
        """What is searched for, as a hash: everything that changes an answer, and no budget."""
        config = self._config
        parts = {
            "job": by_content(self._pipeline.job),
            "goal": by_content(config.goal),
            "space": by_content([self._space.recipe(point) for point in self._space.points()]),
            "recipe": by_content(config.recipe),
            "also": by_content(self._targets),
            "code": code_sha256(),
            "packages": versions_of(_VERSIONS),
        }
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def pipeline_of(self, recipe: Recipe) -> Pipeline:
        """The stages for the model that ``recipe`` exports: as it is, or pruned.

        Raises:
            RecipeError: Nothing can be cut that pays.
        """
        if recipe.pruning not in self._pipelines:
            self._pipelines[recipe.pruning] = self._pruned(recipe.pruning or Pruning())
        found = self._pipelines[recipe.pruning]
        return found.on(self._targets[recipe.target]) if recipe.target else found

    def _pruned(self, pruning: Pruning) -> Pipeline:
        found = prune(self._pipeline, pruning, workplace=self._workplace)
        if found.source == self._pipeline.job.source:
            raise RecipeError(f"no cut was taken: {found.stopped}")
        return Compression(self._pipeline).beside(found.source)

    def _require_kept(self) -> None:
        """Without a float engine that keeps the metric there is nothing to compare with or ship."""
        allowed, drop = self._config.goal.max_drop, self._lab.baseline_drop()
        if allowed is not None and drop > allowed:
            raise AccuracyError(
                f"the float engine loses {drop:.4f} of {self._pipeline.job.metric};"
                f" allowed {allowed:g}",
                hint="The export agrees on calibration samples, but not on the evaluation data.",
            )

    # What is told.

    def result(self, found: Found) -> TuneResult:
        """All of it, as data."""
        pipeline, config = self._pipeline, self._config
        data, task = pipeline.data.record, self._lab.task
        return TuneResult(
            source=config.source,
            data=config.data,
            target=config.target,
            metric=pipeline.job.metric,
            goal=config.goal,
            threads=pipeline.job.threads,
            reference_metric=metric_interval(task.reference, task.value),
            reference_report=self._lab.reference_report,
            reference_name=pipeline.reference.record.by,
            evaluation_samples=data.evaluation_samples,
            calibration_samples=data.calibration_samples,
            candidates=found.candidates,
            chosen=found.chosen.recipe.name if found.chosen else "",
            chosen_reason=found.reason or _nothing(found, config.goal),
            binding=() if found.chosen else _binding(found, config.goal),
            prices=prices(found.candidates, found.chosen, goal=config.goal),
            nodes=self._nodes(found),
            points=sum(1 for _ in self._space.points()),
            stopped=found.stopped,
            seconds=found.seconds,
            command=config.command,
            machine=pipeline.job.machine,
            versions=versions_of(_VERSIONS),
            warnings=(*data.warnings, *self._power_warning()),
            steps=self._steps(found),
            repeats=self._repeats() if found.interrupted is None else (),
        )

    def _nodes(self, found: Found) -> tuple[NodeFact, ...]:
        recipe = found.chosen.recipe if found.chosen else None
        if recipe is None or found.interrupted is not None:
            return ()
        return facts_of(self.pipeline_of(recipe), recipe)

    def _repeats(self) -> tuple[Repeat, ...]:
        """The same search with every measurement made anew."""
        found = []
        for number in range(1, self._config.repeat):
            again = search(
                self._space,
                StageLab(self._pipeline, pipeline_of=self.pipeline_of, series=number),
                settings=self._settings(seed=self._config.seed + number),
                watcher=self._watcher,
            )
            found.append(_repeat(again))
        return tuple(found)

    def _power_warning(self) -> tuple[str, ...]:
        task, goal = self._lab.task, self._config.goal
        least = smallest_provable_drop(len(task.reference), confidence=goal.confidence)
        if not task.discrete or goal.max_drop is None or least <= goal.max_drop:
            return ()
        words = (
            f"{len(task.reference)} evaluation samples cannot show a drop below {least:.4f} at"
            f" {100 * goal.confidence:g} % confidence, so nothing but float32 can be accepted at"
            f" --max-drop {goal.max_drop:g}"
        )
        return (words,)

    def _steps(self, found: Found) -> tuple[str, ...]:
        pipeline, config = self._pipeline, self._config
        exported, data = pipeline.exported.record, pipeline.data.record
        tolerance = ", ".join(f"{t.output} {t.atol:.2g}" for t in exported.proof.tolerances)
        prepared = (
            f"Prepared {data.calibration_samples} calibration and {data.evaluation_samples}"
            " evaluation samples that do not overlap."
        )
        proved = (
            f"Exported with {exported.exporter} to opset {exported.verified.opset}; the outputs"
            f" agree with {pipeline.reference.record.by} at {len(exported.verified.parity)}"
            f" combinations of sizes within {tolerance}."
        )
        target = f"Target {config.target}: {pipeline.job.target.int8.reason}."
        pruned = (_sentence(self._automatic.reason),) if self._automatic else ()
        return prepared, proved, target, *pruned, *_search_steps(found, config), _last_step(found)


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _search_steps(found: Found, config: TuneConfig) -> tuple[str, ...]:
    whole = sum(c.measurement is not None for c in found.candidates)
    outraced = sum(c.verdict == "outraced" for c in found.candidates)
    refused = [c.recipe.name for c in found.candidates if c.verdict == "refused"]
    measured_words = (
        f"Tried {len(found.candidates)} recipes and measured {whole} to the end, each in processes"
        f" of its own; {outraced} could not win any more after a few rounds. Latency in at least"
        f" {config.rounds} interleaved rounds against the float engine."
    )
    judged = (
        f"Refused: {', '.join(refused) or 'none'}. The bounds of the metric hold at"
        f" {100 * config.goal.confidence:g} % for all candidates together."
    )
    return measured_words, judged, f"Stopped because {found.stopped}."


def _last_step(found: Found) -> str:
    if found.chosen is None:
        return "Chose nothing: no engine keeps all limits."
    compared = found.chosen.recipe.name == BASELINE or found.interrupted is not None
    return f"Chose {found.chosen.recipe.name}{'' if compared else ', which was measured afresh'}."


def _or_any(max_drop: float | None) -> float:
    """A drop for pruning, where any is allowed when there is no limit."""
    return 1.0 if max_drop is None else max_drop


def _repeat(found: Found) -> Repeat:
    chosen = found.chosen
    measured = chosen.measurement if chosen else None
    return Repeat(
        chosen=chosen.recipe.name if chosen else "",
        speedup=measured.speedup if measured else None,
        size_bytes=measured.size_bytes if measured else None,
        trials=len(found.candidates),
    )


def _binding(found: Found, goal: Goal) -> tuple[Limit, ...]:
    near = nearest(found.candidates, goal=goal)
    return broken_by(near, goal=goal) if near else ()


def _nothing(found: Found, goal: Goal) -> str:
    near = nearest(found.candidates, goal=goal)
    return f"no engine keeps all limits; the nearest is {near.recipe.name}" if near else ""


def _not_met(result: TuneResult, config: TuneConfig) -> NotMetError:
    binding = "; ".join(limit_words(limit, metric=result.metric) for limit in result.binding)
    return NotMetError(
        f"no engine keeps all limits; the nearest one has {binding}",
        hint=f"See {config.output / 'report.html'} for what relaxing each limit would buy.",
    )


def _publish(output: Path, *, with_bundle: bool) -> None:
    """Move the finished files of ``output/.next`` into place, the bundle first.

    Where nothing was chosen, the bundle of an earlier run is not left beside results without one.
    """
    staging = output / ".next"
    if not with_bundle:
        fs.remove(output / "bundle")
    for name in (*(["bundle"] if with_bundle else []), "results.json", "report.html"):
        fs.move_into_place(staging / name, output / name)
    fs.remove(staging)
    fs.remove(output / CHECKPOINTS)
