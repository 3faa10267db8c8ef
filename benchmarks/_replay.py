"""Tables of recipes that were all measured, and a lab that replays them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from equipoise import fs, record
from equipoise.data.metrics import get_metric
from equipoise.errors import BackendError, EquipoiseError, RecipeError
from equipoise.measure.interval import Interval
from equipoise.recipe import Recipe
from equipoise.search.lab import Built, Scored, Task, Timed, Weighed
from equipoise.search.space import Space
from equipoise.search.stages import StageLab
from equipoise.spec import Array
from equipoise.targets.machine import Machine, detect_machine

_Z95 = 1.959964
_ENTRIES = "entries"


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


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all entries share."""

    metric: str
    labels: tuple[str, ...]
    machine: Machine
    threads: int


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

    def entry(self, name: str) -> Entry:
        """The figures of a recipe: those of its twin, where it has one."""
        found = self.entries[name]
        return self.entries[found.twin] if found.twin else found


def measure_table(
    space: Space,
    lab: StageLab,
    *,
    labels: tuple[str, ...],
    threads: int,
    say: Callable[[str], None],
) -> Table:
    """Make and measure every recipe of ``space`` once."""
    entries: dict[str, Entry] = {}
    statistics: dict[str, Array] = {"reference": np.asarray(lab.task.reference)}
    recipes = [space.recipe(point) for point in space.points()]
    for number, recipe in enumerate(recipes, 1):
        began = time.monotonic()
        entry, scored = _measured(recipe, lab)
        entries[recipe.name] = replace(entry, seconds=time.monotonic() - began)
        if scored is not None:
            statistics[recipe.name] = np.asarray(scored)
        say(f"{number} of {len(recipes)}: {recipe.name} {entry.failure or entry.speedup}")
    head = Head(metric=lab.task.name, labels=labels, machine=detect_machine(), threads=threads)
    return Table(head=head, entries=entries, statistics=statistics)


def _measured(recipe: Recipe, lab: StageLab) -> tuple[Entry, Array | None]:
    try:
        built = lab.build(recipe)
        if built.twin:
            return Entry(recipe=recipe, twin=built.twin), None
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


class ReplayLab:
    """Answers from a table, with the noise of its latencies drawn anew.

    Args:
        table: All recipes.
        random: Draws.
        resample: Draw the evaluation samples anew too, with replacement: then the table is the
            population, and what holds in it may not show in the draw.
    """

    def __init__(self, table: Table, random: np.random.Generator, *, resample: bool) -> None:
        self._table, self._random = table, random
        count = len(table.statistics["reference"])
        self._rows = random.integers(0, count, size=count) if resample else np.arange(count)
        metric = get_metric(table.head.metric, labels=table.head.labels)
        self._task = Task(
            reference=table.statistics["reference"][self._rows],
            value=metric.value,
            discrete=metric.discrete,
            name=table.head.metric,
        )
        self.tried: set[str] = set()
        self._first: dict[str, str] = {}

    @property
    def task(self) -> Task:
        """See Lab."""
        return self._task

    def build(self, recipe: Recipe) -> Built:
        """See Lab."""
        self.tried.add(recipe.name)
        entry = self._table.entry(recipe.name)
        if entry.failure and not entry.applicable:
            raise RecipeError(entry.failure)
        if entry.failure:
            raise BackendError(entry.failure)
        first = self._first.setdefault(entry.recipe.name, recipe.name)
        twin = "" if first == recipe.name else first
        return Built(size_bytes=entry.size_bytes, kernels={}, twin=twin)

    def time(self, recipe: Recipe, *, quick: bool = False, take: int = 0) -> Timed:  # noqa: ARG002
        """See Lab. In few rounds the interval is twice as wide."""
        entry = self._table.entry(recipe.name)
        assert entry.latency_ms is not None
        assert entry.speedup is not None
        wide = 2.0 if quick else 1.0
        sigma = (entry.speedup.high - entry.speedup.low) / (2 * _Z95 * entry.speedup.value) * wide
        factor = float(np.exp(self._random.normal(0, sigma)))
        return Timed(
            latency_ms=_scaled(entry.latency_ms, 1 / factor, wide),
            speedup=_scaled(entry.speedup, factor, wide),
        )

    def score(self, recipe: Recipe, *, samples: int | None = None) -> Scored:
        """See Lab."""
        statistics = self._table.statistics[self._table.entry(recipe.name).recipe.name][self._rows]
        return Scored(statistics=statistics[:samples], parity=())

    def limit(self, seconds: float | None) -> None:
        """Nothing here takes time."""

    def stop(self) -> None:
        """Nothing here runs on."""

    def weigh(self, recipe: Recipe, *, take: int = 0) -> Weighed:  # noqa: ARG002
        """See Lab."""
        peak = self._table.entry(recipe.name).peak_memory_bytes
        return Weighed(peak_memory_bytes=peak, load_ms=0.0, first_ms=0.0)


def _scaled(interval: Interval, factor: float, wide: float) -> Interval:
    value = interval.value * factor
    return Interval(
        value=value,
        low=value * (1 - wide * (1 - interval.low / interval.value)),
        high=value * (1 + wide * (interval.high / interval.value - 1)),
    )
