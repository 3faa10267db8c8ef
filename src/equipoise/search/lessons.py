"""What the model of the space learns from the trials that were made."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.search.choose import measured, relative
from equipoise.search.goal import Goal, Limit, Limited
from equipoise.search.propose import Seen, scaled_excess
from equipoise.search.race import Ended
from equipoise.search.result import Candidate, Measurement, Sketch
from equipoise.search.space import Point
from equipoise.search.trial import Trial
from equipoise.search.verdict import limits


def lessons(
    trials: Sequence[Trial],
    candidates: Sequence[Candidate],
    *,
    goal: Goal,
    baseline: Measurement,
) -> list[Seen]:
    """One per trial of a point of the space; twins have the figures of the first of them.

    Args:
        trials: All so far.
        candidates: The same, judged together.
        goal: What is asked for.
        baseline: The float engine, which costs are relative to.
    """
    judged = {one.recipe.name: one for one in candidates}
    made = {trial.name: trial for trial in trials}
    found = []
    for trial in trials:
        point = trial.proposal.point
        name = twin_of(trial) or trial.name
        if point is None or changes_nothing(trial) or name not in made:
            continue
        found.append(_lesson(point, made[name], judged[name], goal=goal, baseline=baseline))
    return found


def changes_nothing(trial: Trial) -> bool:
    """Whether the recipe finds nothing to act on."""
    return trial.verdict == "not applicable" and not twin_of(trial)


def twin_of(trial: Trial) -> str:
    """The recipe that had made the same engine before; empty where none had."""
    return trial.outcome.twin if isinstance(trial.outcome, Ended) else ""


def limits_of(one: Candidate, goal: Goal) -> tuple[Limit, ...]:
    """How a candidate that was measured stands to every limit."""
    return limits(goal, measured(one), proven=one.verdict == "baseline")


def excesses(found: Sequence[Limit]) -> dict[Limited, float]:
    """Limit -> by how much it is broken."""
    return {
        one.quantity: scaled_excess(one.quantity, allowed=one.allowed, found=one.found)
        for one in found
    }


def _lesson(
    point: Point, trial: Trial, one: Candidate, *, goal: Goal, baseline: Measurement
) -> Seen:
    if one.measurement is not None:
        cost = goal.log_cost(relative(one, baseline=baseline))
        return Seen(point=point, log_cost=cost, excess=excesses(limits_of(one, goal)))
    if not isinstance(trial.outcome, Ended) or one.verdict == "failed":
        return Seen(point=point, failed=True)
    over = trial.outcome.over
    cost_seen = _sketched(one.sketch, goal=goal, baseline=baseline)
    return Seen(point=point, log_cost=cost_seen, excess=excesses([over] if over else []))


def _sketched(sketch: Sketch, *, goal: Goal, baseline: Measurement) -> float | None:
    """The cost of what was not measured to the end; memory is taken to go with size."""
    if sketch.speedup is None or sketch.size_bytes is None:
        return None
    size = sketch.size_bytes / baseline.size_bytes
    return goal.log_cost({"latency": 1 / sketch.speedup.value, "size": size, "memory": size})
