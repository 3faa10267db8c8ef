"""Trials: what was proposed, how it went, and the same as a candidate for people."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from equipoise.errors import EquipoiseError, LockError, OutputError, RecipeError
from equipoise.search.goal import Goal
from equipoise.search.lab import Lab
from equipoise.search.propose import Proposal
from equipoise.search.race import Ended, Finished, race
from equipoise.search.result import Candidate, Measurement, Verdict
from equipoise.search.space import BASELINE
from equipoise.search.verdict import judge

FINISHED: Final = "finished"
"""In the journal: measured to the end. Its verdict depends on the others."""

_NOT_THE_CANDIDATES: Final = (LockError, OutputError)
"""Errors that end the run: they say nothing about the candidate that met them."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A proposal and its outcome.

    Attributes:
        proposal: What was tried.
        outcome: How it went.
        began_s: Seconds after the search began.
        seconds: How long it took.
    """

    proposal: Proposal
    outcome: Finished | Ended
    began_s: float
    seconds: float

    @property
    def name(self) -> str:
        """Of the recipe."""
        return self.proposal.recipe.name

    @property
    def verdict(self) -> str:
        """For the journal."""
        return self.outcome.verdict if isinstance(self.outcome, Ended) else FINISHED

    @property
    def reason(self) -> str:
        """For the journal."""
        return self.outcome.reason if isinstance(self.outcome, Ended) else ""

    @property
    def kept_db(self) -> float | None:
        """See :class:`~equipoise.search.lab.Built`."""
        outcome = self.outcome
        return outcome.kept_db if isinstance(outcome, Ended) else outcome.built.kept_db


def attempt(
    proposal: Proposal, lab: Lab, *, goal: Goal, rival: Measurement | None
) -> Finished | Ended:
    """Try a recipe. What goes wrong in it is its verdict, not the end of the search.

    Raises:
        EquipoiseError: Of the float engine, without which there is nothing to compare with; or one
            that says nothing about the recipe, such as a full disk.
    """
    recipe = proposal.recipe
    if recipe.name == BASELINE:  # what others are compared with is measured whatever it takes
        return race(recipe, lab, goal=Goal(max_drop=None))
    try:
        return race(recipe, lab, goal=goal, rival=rival)
    except _NOT_THE_CANDIDATES:
        raise
    except RecipeError as error:
        return Ended(recipe=recipe, verdict="not applicable", reason=error.message)
    except EquipoiseError as error:
        return Ended(recipe=recipe, verdict="failed", reason=_briefly(error))


def _briefly(error: EquipoiseError) -> str:
    """The first and the last line of a message: a backend's last words can be a whole traceback."""
    lines = [line.strip() for line in error.message.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def candidate(trial: Trial, measurement: Measurement | None, *, goal: Goal) -> Candidate:
    """The trial for people. ``measurement`` is that of one that was measured to the end."""
    found = _candidate(trial.outcome, measurement, goal=goal)
    return replace(
        found, origin=trial.proposal.origin, began_s=trial.began_s, seconds=trial.seconds
    )


def _candidate(
    outcome: Finished | Ended, measurement: Measurement | None, *, goal: Goal
) -> Candidate:
    if isinstance(outcome, Ended):
        return Candidate(
            recipe=outcome.recipe,
            verdict=outcome.verdict,
            reason=outcome.reason,
            sketch=outcome.sketch,
            notes=outcome.notes,
        )
    assert measurement is not None  # noqa: S101  all that finished are in the standing
    verdict, reason = _judged(outcome, measurement, goal=goal)
    return Candidate(
        recipe=outcome.recipe,
        verdict=verdict,
        reason=reason,
        measurement=measurement,
        notes=(*outcome.built.notes, *outcome.timed.notes),
        metric_report=outcome.scored.report,
    )


def _judged(outcome: Finished, measurement: Measurement, *, goal: Goal) -> tuple[Verdict, str]:
    verdict, reason = judge(measurement, recipe=outcome.recipe, goal=goal)
    if outcome.recipe.name == BASELINE:
        return "baseline", "what every other candidate is compared with"
    if verdict == "refused" and outcome.built.notes:
        reason = f"{reason}: {outcome.built.notes[0]}"
    return verdict, reason
