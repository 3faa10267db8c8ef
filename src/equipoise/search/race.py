"""One trial: the cheapest step first, and an end as soon as a recipe can no longer win.

build ──size──▶ few rounds ──latency──▶ few samples ──metric──▶ memory ──▶ all rounds, all samples
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from equipoise.measure.interval import Interval, paired_drop
from equipoise.recipe import Recipe
from equipoise.search.goal import Goal, Limit, Limited
from equipoise.search.lab import Built, Lab, Scored, Task, Timed, Weighed
from equipoise.search.result import Measurement, Sketch, Verdict

_FEW_SHARE: Final = 0.25
_LEAST_FEW: Final = 100
"""Fewer samples settle nothing, and are soon run whole."""

_CERTAIN: Final = 0.999
"""Confidence for giving up early: one good recipe in a thousand may be lost so."""

_SIZE_TIE: Final = 0.01


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A recipe that was measured to the end."""

    recipe: Recipe
    built: Built
    timed: Timed
    scored: Scored
    weighed: Weighed


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A recipe whose trial was over before.

    Attributes:
        recipe: Which.
        verdict: How it ended.
        reason: Why, in words.
        sketch: What had been measured.
        over: The limit that it breaks for certain.
        twin: The recipe that has made the same engine before.
        notes: What the stages noticed.
        kept_db: See :class:`~equipoise.search.lab.Built`.
    """

    recipe: Recipe
    verdict: Verdict
    reason: str
    sketch: Sketch = field(default_factory=Sketch)
    over: Limit | None = None
    twin: str = ""
    notes: tuple[str, ...] = ()
    kept_db: float | None = None


def race(
    recipe: Recipe, lab: Lab, *, goal: Goal, rival: Measurement | None = None
) -> Finished | Ended:
    """Try ``recipe``.

    Args:
        recipe: What to try.
        lab: Where.
        goal: What is asked for.
        rival: The best recipe that keeps all limits so far; None lets this one run to its end.

    Raises:
        EquipoiseError: A stage failed.
    """
    built = lab.build(recipe)
    if built.twin:  # measuring it again would tell nothing
        reason = f"it makes the same engine as {built.twin}"
        return Ended(
            recipe=recipe,
            verdict="not applicable",
            reason=reason,
            twin=built.twin,
            kept_db=built.kept_db,
        )
    heats = _Heats(recipe, lab, goal=goal, built=built)
    ended = heats.size() or (heats.qualify(rival) if rival is not None else None)
    if ended is not None:
        return ended
    weighed = lab.weigh(recipe)
    return heats.memory(weighed) or Finished(
        recipe=recipe,
        built=built,
        timed=lab.time(recipe),
        scored=lab.score(recipe),
        weighed=weighed,
    )


class _Heats:
    """The steps after which a trial may be over; each gives None where it is not."""

    def __init__(self, recipe: Recipe, lab: Lab, *, goal: Goal, built: Built) -> None:
        self._recipe, self._lab, self._goal, self._built = recipe, lab, goal, built
        self._sketch = Sketch(size_bytes=built.size_bytes)

    def size(self) -> Ended | None:
        """Does it fit on disk?"""
        found = self._built.size_bytes
        over = _over("size", self._goal.max_size_bytes, found)
        return self._refused(over, f"takes {found / 1e6:.2f} MB on disk") if over else None

    def memory(self, weighed: Weighed) -> Ended | None:
        """Does it fit into memory?"""
        found = weighed.peak_memory_bytes
        over = _over("memory", self._goal.max_memory_bytes, found)
        return self._refused(over, f"takes {found / 1e6:.1f} MB of memory") if over else None

    def qualify(self, rival: Measurement) -> Ended | None:
        """Few rounds and few samples: may it still win?"""
        quick = self._lab.time(self._recipe, quick=True)
        self._sketch = Sketch(
            size_bytes=self._built.size_bytes, speedup=quick.speedup, latency_ms=quick.latency_ms
        )
        over = _over("latency", self._goal.max_latency_ms, quick.latency_ms.low)
        if over:
            return self._refused(over, f"takes at least {quick.latency_ms.low:.3f} ms")
        if self._is_dominated(quick, rival):
            ratio = quick.speedup.value
            smaller = " and no smaller" if "size" in self._goal.minimise else ""
            reason = f"slower than the best so far ({ratio:.2f}x float){smaller}"
            return self._ended("outraced", reason)
        return self._few_samples()

    def _is_dominated(self, quick: Timed, rival: Measurement) -> bool:
        """Whether it is certainly slower than the rival, and no better in what else counts."""
        if "latency" not in self._goal.minimise or self._goal.minimise[0] == "memory":
            return False
        smaller = self._built.size_bytes < rival.size_bytes * (1 - _SIZE_TIE)
        may_be_smaller = smaller and "size" in self._goal.minimise
        return quick.speedup.high < rival.speedup.low and not may_be_smaller

    def _few_samples(self) -> Ended | None:
        task, allowed = self._lab.task, self._goal.max_drop
        count = int(len(task.reference) * _FEW_SHARE)
        if allowed is None or count < _LEAST_FEW:
            return None
        scored = self._lab.score(self._recipe, samples=count)
        drop = _drop(scored, task, count=count)
        metric = float(task.value(scored.statistics.sum(0)))
        self._sketch = replace(self._sketch, metric=metric)
        lost = drop.low > allowed
        over = Limit(quantity="drop", allowed=allowed, found=drop.high)
        words = f"drops by {drop.value:.4f} on the first {count} samples"
        return self._refused(over, words) if lost else None

    def _refused(self, over: Limit, words: str) -> Ended:
        unit = {"size": 1e6, "memory": 1e6}.get(over.quantity, 1.0)
        name = {"size": " MB", "memory": " MB", "latency": " ms"}.get(over.quantity, "")
        return self._ended("refused", f"{words}; allowed {over.allowed / unit:g}{name}", over=over)

    def _ended(self, verdict: Verdict, reason: str, *, over: Limit | None = None) -> Ended:
        return Ended(
            recipe=self._recipe,
            verdict=verdict,
            reason=reason,
            sketch=self._sketch,
            over=over,
            notes=self._built.notes,
            kept_db=self._built.kept_db,
        )


def _over(quantity: Limited, allowed: float | None, found: float) -> Limit | None:
    """The limit, if ``found`` breaks it."""
    if allowed is None or found <= allowed:
        return None
    return Limit(quantity=quantity, allowed=allowed, found=found)


def _drop(scored: Scored, task: Task, *, count: int) -> Interval:
    return paired_drop(
        task.reference[:count],
        scored.statistics,
        task.value,
        discrete=task.discrete,
        confidence=_CERTAIN,
    )
