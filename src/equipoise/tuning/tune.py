"""Find the sweet spot of a trained model on a target, prove it, and pack it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Final

from equipoise import fs
from equipoise.bundle.writer import check_replaceable
from equipoise.cluster.device import detect_device
from equipoise.cluster.runner import open_runner
from equipoise.compress.cutting import Pruning
from equipoise.compression.compression import Compression
from equipoise.compression.models import Workplace
from equipoise.compression.publishing import CHECKPOINTS
from equipoise.compression.steps import prune
from equipoise.errors import (
    AccuracyError,
    MissingExtraError,
    NotMetError,
    RecipeError,
)
from equipoise.jobs import FREE_BYTES, make_pipeline
from equipoise.pack import pack
from equipoise.pipeline import Job, Pipeline
from equipoise.quantize.plans import NodeFact
from equipoise.recipe import Recipe
from equipoise.report.words import limit_words
from equipoise.report.write import write_report
from equipoise.runtimes.registry import BUILDERS, builder
from equipoise.search.budget import Budget
from equipoise.search.journal import Journal
from equipoise.search.nodes import facts_of
from equipoise.search.result import Repeat, TuneResult
from equipoise.search.search import Found, SearchSettings, Watcher, search
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
from equipoise.tuning.account import VERSIONS, Searched, repeat_of, result_of
from equipoise.tuning.config import TuneConfig, check_config, needs_training, other_targets
from equipoise.tuning.recipes import Recipes, recipes_for

JOURNALS: Final = "search"
"""Folder of the cache with what was tried: one file for each question."""

_TRIALS: Final = 16
"""Where neither a time nor a number is given: the starts, and nearly as many again."""


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
    check_config(config)
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
        replace(config, for_training=needs_training(config)), runner=runner, machine=machine
    )
    _require_measurable(pipeline.job, also=other_targets(config))
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
        self._targets = {name: get_target(name, machine=machine) for name in other_targets(config)}
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
                self._recipes.space,
                self._lab,
                settings=self._settings(seed=self._config.seed),
                journal=journal,
                watcher=self._watcher,
            )

    @cached_property
    def _recipes(self) -> Recipes:
        return recipes_for(self._config, pipeline=self._pipeline, lab=self._lab)

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
        config, space = self._config, self._recipes.space
        parts = {
            "job": by_content(self._pipeline.job),
            "goal": by_content(config.goal),
            "space": by_content([space.recipe(point) for point in space.points()]),
            "recipe": by_content(config.recipe),
            "also": by_content(self._targets),
            "code": code_sha256(),
            "packages": versions_of(VERSIONS),
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
        searched = Searched(
            found=found,
            recipes=self._recipes,
            lab=self._lab,
            pipeline=self._pipeline,
            nodes=self._nodes(found),
            repeats=self._repeats() if found.interrupted is None else (),
        )
        return result_of(searched, self._config)

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
                self._recipes.space,
                StageLab(self._pipeline, pipeline_of=self.pipeline_of, series=number),
                settings=self._settings(seed=self._config.seed + number),
                watcher=self._watcher,
            )
            found.append(repeat_of(again))
        return tuple(found)


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
