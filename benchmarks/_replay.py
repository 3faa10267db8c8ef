"""A lab that replays recipes that were all measured."""

from __future__ import annotations

from typing import Final

import numpy as np
from _tables import Table

from equipoise.data.metrics import get_metric
from equipoise.errors import BackendError, RecipeError
from equipoise.measure.interval import Interval
from equipoise.recipe import Recipe
from equipoise.search.lab import Built, Scored, Task, Timed, Weighed

_Z95: Final = 1.959964


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
        return Built(
            size_bytes=entry.size_bytes,
            kernels={},
            twin=twin,
            kept_db=self._table.entries[recipe.name].kept_db,
        )

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
