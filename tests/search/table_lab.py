"""A lab that reads a table, so that the rules of a search can be tested without engines."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from equipoise.data.metrics import get_metric
from equipoise.errors import RecipeError
from equipoise.measure.interval import Interval
from equipoise.recipe import Recipe
from equipoise.search.lab import Built, Scored, Task, Timed, Weighed

SAMPLES = 800


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a recipe has."""

    speedup: float = 1.0
    size_bytes: int = 1000
    memory_bytes: int = 5000
    lost: int = 0
    """Samples that it decides wrongly and the reference rightly."""
    kept_db: float | None = None
    engine: str = ""
    """What it makes, where others make the same."""


def accuracy(right: np.ndarray) -> np.ndarray:
    return np.stack([right, np.ones_like(right)], axis=1).astype(np.float64)


@dataclass
class TableLab:
    """Answers from ``lookup``, which may raise."""

    lookup: Callable[[Recipe], Line]
    noise: float = 0.01
    calls: Counter = field(default_factory=Counter)
    made: dict[str, str] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        right = np.ones(SAMPLES)
        right[: SAMPLES // 10] = 0
        value = get_metric("accuracy", labels=()).value
        return Task(reference=accuracy(right), value=value, discrete=True, name="accuracy")

    def build(self, recipe: Recipe) -> Built:
        self.calls["build", recipe.name] += 1
        line = self.lookup(recipe)
        first = self.made.setdefault(line.engine or recipe.name, recipe.name)
        return Built(
            size_bytes=line.size_bytes,
            kernels={},
            kept_db=line.kept_db,
            twin="" if first == recipe.name else first,
        )

    def time(self, recipe: Recipe, *, quick: bool = False, take: int = 0) -> Timed:
        kind = "fresh" if take else "quick" if quick else "time"
        self.calls[kind, recipe.name] += 1
        random = np.random.default_rng(zlib.crc32(f"{recipe.name} {kind}".encode()))
        wide = self.noise * (2 if quick else 1)
        found = self.lookup(recipe).speedup * float(np.exp(random.normal(0, wide / 2)))
        return Timed(latency_ms=interval(10 / found, wide), speedup=interval(found, wide))

    def score(self, recipe: Recipe, *, samples: int | None = None) -> Scored:
        self.calls["score" if samples is None else "few", recipe.name] += 1
        statistics = self.task.reference.copy()
        right = np.flatnonzero(statistics[:, 0])
        # Spread over the set, the same ones first for all, as with real models.
        order = np.random.default_rng(0).permutation(right)
        statistics[order[: self.lookup(recipe).lost], 0] = 0
        return Scored(statistics=statistics[:samples], parity=())

    def limit(self, seconds: float | None) -> None:
        """Nothing here takes time."""

    def stop(self) -> None:
        """Nothing here runs on."""

    def weigh(self, recipe: Recipe, *, take: int = 0) -> Weighed:
        self.calls["weigh again" if take else "weigh", recipe.name] += 1
        peak = self.lookup(recipe).memory_bytes
        return Weighed(peak_memory_bytes=peak, load_ms=1.0, first_ms=2.0)


def interval(value: float, wide: float) -> Interval:
    return Interval(value=value, low=value * (1 - wide), high=value * (1 + wide))


def landscape(recipe: Recipe) -> Line:
    """A made-up model: int8 is fast, and keeping less of the outputs is faster and loses more."""
    if recipe.fused:
        raise RecipeError("the graph has no transformer block to fuse")
    kind = "" if recipe.quantization is None else recipe.quantization.kind
    speed = {"": 1.0, "weight-only": 0.97, "dynamic": 1.6, "static": 2.2}.get(kind, 1.2)
    lost = {"": 0, "weight-only": 0, "dynamic": 1, "static": 0}.get(kind, 30)
    if kind == "static":
        kept = recipe.quantization.min_sqnr_db
        speed *= 1.4 - 0.012 * kept
        lost += max(0, round((18 - kept) * 1.5))
        speed *= {"minmax": 1.0, "entropy": 1.03}.get(recipe.quantization.method.kind, 1.01)
        lost += {"minmax": 4}.get(recipe.quantization.method.kind, 0)
    speed *= {1: 0.7}.get(recipe.threads or 2, 1.0)
    return Line(speedup=speed, size_bytes=1000 if not kind else 280, lost=lost)
