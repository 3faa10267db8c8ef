"""How the candidates stand, judged together: a claim about one depends on how many were tried."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.measure.interval import DrawnDrop, Interval, bounded, draw_drop, metric_interval
from equipoise.search.goal import Goal
from equipoise.search.lab import Task
from equipoise.search.race import Finished
from equipoise.search.result import Measurement
from equipoise.search.space import BASELINE


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """What does not change when another candidate comes."""

    finished: Finished
    metric: Interval
    drop: DrawnDrop
    negated: DrawnDrop


class Standing:
    """The recipes that were measured to the end.

    Args:
        task: What their metric is compared with.
        goal: What is asked for.
    """

    def __init__(self, task: Task, goal: Goal) -> None:
        self._task, self._goal = task, goal
        self._drawn: dict[str, _Drawn] = {}
        self._known: dict[str, Measurement] = {}

    def add(self, finished: Finished) -> None:
        """Enter a recipe, or its newer measurement."""
        statistics, task, seed = finished.scored.statistics, self._task, len(self._drawn)
        drops = [
            draw_drop(reference, statistics, task.value, discrete=task.discrete, seed=seed)
            for reference in (task.reference, None)
        ]
        self._known = {}
        self._drawn[finished.recipe.name] = _Drawn(
            finished=finished,
            metric=metric_interval(statistics, task.value),
            drop=drops[0],
            negated=drops[1],
        )

    def measurements(self) -> dict[str, Measurement]:
        """Name -> what was measured, with bounds of the metric that hold for all together."""
        if not self._known:
            self._known = self._judged()
        return self._known

    def _in_order(self) -> list[_Drawn]:
        """The cheapest first, which are chosen if they pass.

        The float engine, which the others are compared with and which needs no proof, is the last.
        """
        baseline = self._drawn.get(BASELINE)
        if baseline is None:
            return list(self._drawn.values())
        others = [one for one in self._drawn.values() if one is not baseline]
        others.sort(key=lambda one: _cost(one, baseline=baseline.finished, goal=self._goal))
        return [*others, baseline]

    def _judged(self) -> dict[str, Measurement]:
        drawn, goal = self._in_order(), self._goal
        least = None if goal.min_metric is None else -goal.min_metric
        drops = bounded(
            [one.drop for one in drawn], confidence=goal.confidence, allowed=goal.max_drop
        )
        negated = bounded([one.negated for one in drawn], confidence=goal.confidence, allowed=least)
        return {
            one.finished.recipe.name: _measurement(one, drop=drop, metric_bound=-below.high)
            for one, drop, below in zip(drawn, drops, negated, strict=True)
        }


def _cost(one: _Drawn, *, baseline: Finished, goal: Goal) -> float:
    """The one number that guides the search, from costs alone."""
    own = one.finished
    return goal.log_cost(
        {
            "latency": 1 / own.timed.speedup.value,
            "size": own.built.size_bytes / baseline.built.size_bytes,
            "memory": own.weighed.peak_memory_bytes / baseline.weighed.peak_memory_bytes,
        }
    )


def _measurement(one: _Drawn, *, drop: Interval, metric_bound: float) -> Measurement:
    finished = one.finished
    return Measurement(
        metric=one.metric,
        metric_bound=metric_bound,
        drop=drop,
        latency_ms=finished.timed.latency_ms,
        speedup=finished.timed.speedup,
        size_bytes=finished.built.size_bytes,
        peak_memory_bytes=finished.weighed.peak_memory_bytes,
        load_ms=finished.weighed.load_ms,
        first_ms=finished.weighed.first_ms,
        build_s=finished.built.build_s,
        parity=finished.scored.parity,
        kernels=finished.built.kernels,
    )
