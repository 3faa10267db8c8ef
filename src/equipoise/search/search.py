"""The search: propose, race, judge, until nothing is to be gained or the budget is spent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from equipoise.compress.cutting import Pruning
from equipoise.errors import InterruptedRunError
from equipoise.recipe import Recipe
from equipoise.search.budget import Budget, Clock
from equipoise.search.choose import Relative, choose, pareto_front, relative
from equipoise.search.goal import Goal
from equipoise.search.journal import Entry
from equipoise.search.lab import Lab
from equipoise.search.lessons import changes_nothing, excesses, lessons, limits_of, twin_of
from equipoise.search.propose import Proposal, Proposer, Seen
from equipoise.search.race import Ended, Finished
from equipoise.search.refine import Around, refined
from equipoise.search.result import Candidate, Measurement
from equipoise.search.space import BASELINE, Point, Space
from equipoise.search.standing import Standing
from equipoise.search.trial import Trial, attempt, candidate

_WORTH_A_RACE_S: Final = 3.0
_REFINEMENTS_WITHOUT_GAIN: Final = 4


class Record(Protocol):
    """Where trials are written down; see :class:`~equipoise.search.journal.Journal`."""

    def entries(self) -> Sequence[Entry]:
        """Trials of earlier runs."""

    def begin(self, recipe: Recipe, *, origin: str, began_s: float) -> int:
        """A trial begins; gives its number."""

    def end(self, number: int, *, verdict: str, reason: str, seconds: float) -> None:
        """It has ended."""

    def spent_s(self) -> float:
        """Seconds of all that have ended."""


class Watcher:
    """Hears how a search goes. This one does nothing."""

    def tried(self, candidate: Candidate, *, best: Candidate | None, left_s: float | None) -> None:
        """A trial has ended; the best so far, and the time that is left of the budget."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        candidates: All, in the order tried.
        chosen: The sweet spot; None when no engine keeps all limits.
        reason: Why it was chosen, in words.
        stopped: Why the search ended, in words.
        seconds: How long the trials took, in all runs.
        interrupted: The signal that ended it, if one did.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    reason: str
    stopped: str
    seconds: float
    interrupted: InterruptedRunError | None = None


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How to search.

    Attributes:
        goal: What is asked for.
        budget: When to stop.
        asked: Recipes to try in any case, before all others but the float engine.
        slots: Trials at once.
        seed: Of what is drawn.
        refine: Whether to go on beside the points of the space when none of them promises more.
    """

    goal: Goal = field(default_factory=Goal)
    budget: Budget = field(default_factory=Budget)
    asked: tuple[Recipe, ...] = ()
    slots: int = 1
    seed: int = 0
    refine: bool = False


def search(
    space: Space,
    lab: Lab,
    *,
    settings: SearchSettings | None = None,
    journal: Record | None = None,
    watcher: Watcher | None = None,
) -> Found:
    """Look for the recipe of least cost that keeps all limits.

    The float engine comes first; a signal after it ends the search with the best so far.

    Args:
        space: The recipes.
        lab: Where they are tried.
        settings: What for, and how.
        journal: Where trials are written down.
        watcher: Hears how it goes.

    Raises:
        EquipoiseError: The float engine cannot be made or measured, or nothing can be written.
    """
    return _Search(
        space,
        lab,
        settings=settings or SearchSettings(),
        journal=journal,
        watcher=watcher or Watcher(),
    ).run()


class _Search:
    def __init__(
        self,
        space: Space,
        lab: Lab,
        *,
        settings: SearchSettings,
        journal: Record | None,
        watcher: Watcher,
    ) -> None:
        self._space, self._lab, self._goal = space, lab, settings.goal
        self._asked = [Proposal(recipe=recipe, origin="asked") for recipe in settings.asked]
        self._settings, self._journal, self._watcher = settings, journal, watcher
        self._proposer = Proposer(space)
        self._standing = Standing(lab.task, settings.goal)
        self._trials: list[Trial] = []
        self._earlier = {e.recipe.name: e for e in journal.entries()} if journal else {}
        self._points = {space.recipe(point).name: point for point in space.points()}
        self._clock = Clock(settings.budget, spent_s=journal.spent_s() if journal else 0.0)
        self._stopped = ""
        self._without_gain = 0

    def run(self) -> Found:
        self._enter(self._run(self._proposer.starts[0], None))
        interrupted = None
        try:
            self._go_on()
            self._lab.limit(None)
            self._confirm()
        except InterruptedRunError as signal:
            self._lab.stop()
            interrupted, self._stopped = signal, signal.message
        finally:
            self._lab.limit(None)
        candidates = self.candidates()
        found = choose(candidates, goal=self._goal)
        return Found(
            candidates=tuple(candidates),
            chosen=found[0] if found else None,
            reason=found[1] if found else "",
            stopped=self._stopped,
            seconds=math.fsum(trial.seconds for trial in self._trials),
            interrupted=interrupted,
        )

    # Proposals.

    def _go_on(self) -> None:
        if self._settings.slots == 1:
            while (proposal := self._next([])) is not None:
                self._try_one(proposal)
            return
        pool = ThreadPoolExecutor(self._settings.slots)
        try:
            self._fan_out(pool)
        finally:  # what still runs after a signal is not waited for: the best so far is
            pool.shutdown(wait=False, cancel_futures=True)

    def _fan_out(self, pool: ThreadPoolExecutor) -> None:
        running: dict[Future[Trial], Proposal] = {}
        while True:
            while len(running) < self._settings.slots:
                proposal = self._next(list(running.values()))
                if proposal is None:
                    break
                running[pool.submit(self._run, proposal, self._rival())] = proposal
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                self._enter(done.result())

    def _next(self, running: Sequence[Proposal]) -> Proposal | None:
        """The next proposal, unless the budget is spent or nothing more is to be gained."""
        reason = self._clock.ended(trials=len(self._trials) + len(running))
        if reason:
            self._stopped = reason
            return None
        tried = {trial.name for trial in self._trials} | {p.recipe.name for p in running}
        for proposal in (*self._asked, *self._recorded(), *self._proposer.starts):
            if proposal.recipe.name not in tried and self._proposer.may_apply(proposal.point):
                return proposal
        points = [p.point for p in running if p.point is not None]
        seen, best = self._lessons(), self._best_cost()
        found = self._proposer.next(seen, best=best, pending=points, affordable=self._affordable())
        if found is not None or running:
            return found
        self._stopped = _ended(self._proposer.next(seen, best=best), left_s=self._clock.left_s())
        return self._refined(tried) if self._settings.refine else None

    def _affordable(self) -> Callable[[Point], bool]:
        """Whether the model that a point needs is there, or may be trained within the budget."""
        left_s, took = self._clock.left_s(), dict[Pruning | None, float]()
        for trial in self._trials:
            took.setdefault(trial.proposal.recipe.pruning, trial.seconds)
        trainings = [seconds for pruning, seconds in took.items() if pruning is not None]
        if left_s is None or left_s >= min(trainings, default=0.0):
            return lambda _: True
        return lambda point: self._space.recipe(point).pruning in took

    def _recorded(self) -> Iterator[Proposal]:
        """What earlier runs tried, in their order: with the stages kept it takes no time."""
        for entry in self._earlier.values():
            point = self._points.get(entry.recipe.name)
            yield Proposal(recipe=entry.recipe, origin=entry.origin, point=point)

    def _refined(self, tried: set[str]) -> Proposal | None:
        best = self._best()
        if best is None or self._without_gain >= _REFINEMENTS_WITHOUT_GAIN:
            return None
        around = [
            Around(
                recipe=c.recipe,
                log_costs=tuple(math.log(self._relative(c)[q]) for q in self._goal.minimise),
                excess=tuple(excesses(limits_of(c, self._goal)).values()),
            )
            for c in self.candidates()
            if c.measurement is not None
        ]
        recipe = refined(best.recipe, around, seed=self._settings.seed + len(self._trials))
        if recipe is None or recipe.name in tried:
            return None
        return Proposal(recipe=recipe, origin="optuna")

    # Trials.

    def _try_one(self, proposal: Proposal) -> None:
        self._enter(self._run(proposal, self._rival()))

    def _run(self, proposal: Proposal, rival: Measurement | None) -> Trial:
        recipe = proposal.recipe
        earlier = self._earlier.get(recipe.name)
        if earlier is None or earlier.seconds is None:
            return self._new(proposal, rival)
        if earlier.verdict == "failed":
            outcome: Finished | Ended = Ended(
                recipe=recipe, verdict="failed", reason=earlier.reason
            )
        else:
            outcome = attempt(proposal, self._lab, goal=self._goal, rival=rival)
        return Trial(
            proposal=proposal, outcome=outcome, began_s=earlier.began_s, seconds=earlier.seconds
        )

    def _new(self, proposal: Proposal, rival: Measurement | None) -> Trial:
        """A trial that no earlier run brought to its end."""
        began, began_s, number = time.monotonic(), self._clock.spent_s(), None
        if self._journal is not None:
            number = self._journal.begin(proposal.recipe, origin=proposal.origin, began_s=began_s)
        self._lab.limit(self._clock.left_s())
        outcome = attempt(proposal, self._lab, goal=self._goal, rival=rival)
        trial = Trial(
            proposal=proposal,
            outcome=outcome,
            began_s=began_s,
            seconds=time.monotonic() - began,
        )
        cut_short = self._clock.left_s() == 0 and trial.verdict == "failed"
        if self._journal is not None and number is not None and not cut_short:
            self._journal.end(
                number, verdict=trial.verdict, reason=trial.reason, seconds=trial.seconds
            )
        return trial

    def _enter(self, trial: Trial) -> None:
        before = self._best()
        self._trials.append(trial)
        if isinstance(trial.outcome, Finished):
            self._standing.add(trial.outcome)
        point = trial.proposal.point
        if point is not None:
            self._strike(point, trial)
        best = self._best()
        gained = best is not None and (before is None or best.recipe != before.recipe)
        refinement = trial.proposal.origin == "optuna"
        self._without_gain = 0 if gained else self._without_gain + refinement
        self._watcher.tried(
            next(c for c in self.candidates() if c.recipe.name == trial.name),
            best=best,
            left_s=self._clock.left_s(),
        )

    def _strike(self, point: Point, trial: Trial) -> None:
        """What the trial at ``point`` shows to be impossible, or the same again, is not tried."""
        if changes_nothing(trial):
            self._proposer.exclude(point, applicable=self._applicable())
        if trial.kept_db is not None:
            self._proposer.exclude_same(point, kept_db=trial.kept_db)
            twin = self._points.get(twin_of(trial))
            if twin is not None:
                self._proposer.exclude_alike(point, twin=twin)

    def _applicable(self) -> list[Point]:
        return [
            t.proposal.point
            for t in self._trials
            if t.proposal.point is not None and t.verdict not in {"failed", "not applicable"}
        ]

    # Judgement.

    def candidates(self) -> list[Candidate]:
        """All trials so far, judged together."""
        known = self._standing.measurements()
        found = [candidate(t, known.get(t.name), goal=self._goal) for t in self._trials]
        front = pareto_front(found)
        return [replace(c, on_front=c.recipe.name in front) for c in found]

    def _best(self) -> Candidate | None:
        found = choose(self.candidates(), goal=self._goal) if self._trials else None
        return found[0] if found else None

    def _rival(self) -> Measurement | None:
        """What others have to beat; None where a whole trial costs no more than its heats."""
        best = self._best()
        if best is None or self._evaluation_s() < _WORTH_A_RACE_S:
            return None
        return best.measurement

    def _evaluation_s(self) -> float:
        """Seconds that the float engine takes for all evaluation samples."""
        baseline = self._standing.measurements()[BASELINE]
        return len(self._lab.task.reference) * baseline.latency_ms.value / 1000

    def _best_cost(self) -> float | None:
        best = self._best()
        return None if best is None else self._goal.log_cost(self._relative(best))

    def _relative(self, one: Candidate) -> Relative:
        return relative(one, baseline=self._standing.measurements()[BASELINE])

    def _lessons(self) -> list[Seen]:
        baseline = self._standing.measurements()[BASELINE]
        return lessons(self._trials, self.candidates(), goal=self._goal, baseline=baseline)

    def _confirm(self) -> None:
        """Measure the winner afresh; where it does not stay one, the next, until one does."""
        confirmed: set[str] = {BASELINE}
        while (best := self._best()) is not None and best.recipe.name not in confirmed:
            confirmed.add(best.recipe.name)
            index = next(i for i, t in enumerate(self._trials) if t.name == best.recipe.name)
            trial = self._trials[index]
            assert isinstance(trial.outcome, Finished)  # noqa: S101  it has a measurement
            again = replace(
                trial.outcome,
                timed=self._lab.time(best.recipe, take=1),
                weighed=self._lab.weigh(best.recipe, take=1),
            )
            self._standing.add(again)
            self._trials[index] = replace(trial, outcome=again)


def _ended(unaffordable: Proposal | None, *, left_s: float | None) -> str:
    """Why there is no proposal, where there may be one that there is no time for."""
    if unaffordable is None or left_s is None:
        return (
            "no recipe of the space that is left is expected to be better, and to keep all limits"
        )
    return (
        f"{unaffordable.recipe.name} may be better, and its model cannot be trained in the"
        f" {left_s:.0f} s that are left"
    )
