"""Where recipes are tried: the seam between the search and what makes and measures engines.

Every answer is measured. The steps are separate so that a race can end after any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from equipoise.measure.interval import Interval, Values
from equipoise.parity.compare import OutputParity
from equipoise.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine on disk.

    Attributes:
        size_bytes: All that it loads.
        build_s: Time to build it from its ONNX file.
        kernels: Operator type -> count after the runtime's own rewriting.
        notes: What the stages noticed, in words.
        twin: Name of the recipe that has made the same engine before; empty if none has.
        kept_db: Signal to noise that static int8 keeps: whatever it is asked to keep between that
            and what it was asked for makes the same engine. None for other schemes.
    """

    size_bytes: int
    build_s: float = 0.0
    kernels: dict[str, int]
    notes: tuple[str, ...] = ()
    twin: str = ""
    kept_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Its latency, interleaved with that of the float engine.

    Attributes:
        latency_ms: Of one inference.
        speedup: Float latency over its own.
        notes: What was noticed about the machine meanwhile.
    """

    latency_ms: Interval
    speedup: Interval
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Its outputs on evaluation samples.

    Attributes:
        statistics: ``[samples, k]`` of the metric, in the order of the samples.
        parity: One entry per output.
        report: Per-class table, where the metric has one.
    """

    statistics: Values
    parity: tuple[OutputParity, ...]
    report: str = ""


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """Opening and running it in a fresh process.

    Attributes:
        peak_memory_bytes: Peak resident memory.
        load_ms: Opening.
        first_ms: The first inference.
    """

    peak_memory_bytes: int
    load_ms: float
    first_ms: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the metric of recipes is compared with.

    Attributes:
        reference: ``[samples, k]`` statistics of the source.
        value: Turns totals ``[..., k]`` into metric values ``[...]``.
        discrete: Whether the metric counts decisions.
        name: Of the metric.
    """

    reference: Values
    value: Callable[[Values], Values]
    discrete: bool
    name: str


class Lab(Protocol):
    """Tries recipes. Each method raises the errors of the stages that it runs.

    A recipe that finds nothing to act on in the model raises RecipeError in ``build``.
    """

    @property
    def task(self) -> Task:
        """What the metric is compared with."""

    def build(self, recipe: Recipe) -> Built:
        """Make the engine."""

    def time(self, recipe: Recipe, *, quick: bool = False, take: int = 0) -> Timed:
        """Measure its latency; in few rounds where ``quick``. Another take is measured anew."""

    def score(self, recipe: Recipe, *, samples: int | None = None) -> Scored:
        """Run it over the first evaluation samples, or over all."""

    def limit(self, seconds: float | None) -> None:
        """Let no step go on for longer than that from now; None lifts it."""

    def stop(self) -> None:
        """Let no further step begin, in whichever thread."""

    def weigh(self, recipe: Recipe, *, take: int = 0) -> Weighed:
        """Its memory and its start. Another take is measured anew."""
