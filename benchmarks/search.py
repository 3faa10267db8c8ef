"""How well the search finds, and how often it claims what is not so.

    python benchmarks/search.py table digits --model WEIGHTS --output TABLE.npz
    python benchmarks/search.py table ner --model DIRECTORY --output TABLE.npz [--pruned DIRECTORY]
        [--samples 600] [--calibration-samples 128]
    python benchmarks/search.py replay TABLE.npz ... --output RECORD.json
        [--seeds 20] [--claims 400]

    python benchmarks/search.py machinery TABLE.npz --model WEIGHTS --output RECORD.json

``table`` makes and measures every recipe of a space once, three quarters of an hour for a
transformer, on an idle machine; ``--pruned`` takes a model that ``equipoise prune`` or ``tune`` has
trained before. ``replay`` reads tables and runs nothing: searches draw the noise of latencies from
their measured intervals.

- Finding: the cost of what is chosen after a tenth of the recipes over that of what is chosen
  after all of them, median of seeds. Beside it Optuna's TPE with the same limit as a constraint,
  and random order; all are judged alike.
- Claims: the table is the population. Each run draws an evaluation set of the same size from it,
  with replacement, searches, and is wrong when what it chose loses more in the population than is
  allowed. So the truth is known; the allowed drop is chosen so that many recipes lie near it.

``machinery`` searches on the digits and tells which share of the time is not in child processes;
and it sleeps through trial times of a table on a Ray cluster of four nodes on this machine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from _machinery import NODES, Overhead, Scaling, TimedLaunch, scaling
from _replay import ReplayLab
from _tables import THREADS, Table, digits, make_table, read_table

from equipoise import extras, fs
from equipoise.jobs import make_pipeline
from equipoise.measure.interval import paired_drop
from equipoise.search.budget import Budget
from equipoise.search.choose import choose
from equipoise.search.goal import Goal
from equipoise.search.journal import Journal
from equipoise.search.propose import Proposal, scaled_excess
from equipoise.search.race import Finished
from equipoise.search.search import SearchSettings, search
from equipoise.search.space import Point, Space, SpaceSettings, space_for
from equipoise.search.stages import StageLab
from equipoise.search.standing import Standing
from equipoise.search.trial import Trial, attempt, candidate
from equipoise.stages import StageRunner, versions_of
from equipoise.targets.machine import Machine, detect_machine

VERSIONS: Final = ("equipoise", "numpy", "onnxruntime", "optuna", "torch")
SHARE: Final = 0.1
DROPS: Final = (0.002, 0.005, 0.01, 0.02)

Method = Callable[[Space, ReplayLab, Goal, int, int], str]
"""Space, lab, goal, number of trials, seed -> name of what was chosen."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One way to search, on one table, with one limit.

    Attributes:
        table: Name of the table.
        method: ``equipoise``, ``tpe`` or ``random``.
        max_drop: Allowed drop.
        recipes: Recipes of the table; some cannot be made of this model, or make the same engine.
        trials: Recipes tried, median of seeds.
        best: What is chosen when all recipes are measured, judged as the search judges.
        best_alone: The cheapest that would pass if it were the only one that was ever tried.
        excess: Cost of the chosen recipe over that of ``best``, less one: median of seeds.
        excesses: The same of every seed.
    """

    table: str
    method: str
    max_drop: float
    recipes: int
    trials: float
    best: str
    best_alone: str
    excess: float
    excesses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Claims:
    """How often a search was wrong.

    Attributes:
        table: Name of the table.
        max_drop: Allowed drop.
        near: Recipes whose true drop lies between the allowed one and twice it.
        runs: Number of searches.
        wrong: Those that chose what truly loses more.
        not_float: Those that chose something else than the float engine.
    """

    table: str
    max_drop: float
    near: int
    runs: int
    wrong: int
    not_float: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """All of it."""

    machine: Machine
    versions: dict[str, str]
    measured_on: dict[str, Machine]
    findings: tuple[Finding, ...]
    claims: tuple[Claims, ...]


# Ways to search.


def by_equipoise(space: Space, lab: ReplayLab, goal: Goal, trials: int, seed: int) -> str:
    """The search of ``equipoise tune``."""
    settings = SearchSettings(goal=goal, budget=Budget(trials=trials), seed=seed)
    found = search(space, lab, settings=settings)
    return found.chosen.recipe.name if found.chosen else ""


def by_random(space: Space, lab: ReplayLab, goal: Goal, trials: int, seed: int) -> str:
    """The float engine, then recipes in random order."""
    points = list(space.points())
    order = np.random.default_rng(seed).permutation(len(points))
    found = [points[i] for i in order if points[i] != points[0]]
    return _judged(space, lab, goal, iter([points[0], *found][:trials]))


def by_tpe(space: Space, lab: ReplayLab, goal: Goal, trials: int, seed: int) -> str:
    """Optuna's TPE with the drop as a constraint, the float engine first."""
    optuna: Any = extras.require("optuna")
    optuna.logging.disable_default_handler()
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    study.enqueue_trial({axis.name: 0 for axis in space.axes})
    run = _Judged(space, lab, goal)
    for _ in range(20 * trials):  # the same recipe again is no trial
        if len(run.trials) >= trials:
            break
        trial = study.ask()
        point = space.canonical(
            tuple(
                trial.suggest_categorical(axis.name, list(range(len(axis.choices))))
                for axis in space.axes
            )
        )
        cost, excess = run.value(point)
        trial.set_constraint("drop", excess)
        study.tell(trial, cost)
    return run.chosen()


def _judged(space: Space, lab: ReplayLab, goal: Goal, points: Iterator[Point]) -> str:
    run = _Judged(space, lab, goal)
    for point in points:
        run.value(point)
    return run.chosen()


class _Judged:
    """Trials without a race, judged as ours are."""

    def __init__(self, space: Space, lab: ReplayLab, goal: Goal) -> None:
        self._space, self._lab, self._goal = space, lab, goal
        self._standing = Standing(lab.task, goal)
        self.trials: dict[Point, Trial] = {}

    def value(self, point: Point) -> tuple[float, float]:
        """Log of the cost and the excess over the allowed drop; large for what fails."""
        if point not in self.trials:
            proposal = Proposal(recipe=self._space.recipe(point), origin="", point=point)
            outcome = attempt(proposal, self._lab, goal=self._goal, rival=None)
            self.trials[point] = Trial(proposal=proposal, outcome=outcome, began_s=0.0, seconds=0.0)
            if isinstance(outcome, Finished):
                self._standing.add(outcome)
        trial = self.trials[point]
        known = self._standing.measurements().get(trial.name)
        if known is None:
            return 1.0, 3.0
        allowed = self._goal.max_drop or 0.0
        return -math.log(known.speedup.value), scaled_excess(
            "drop", allowed=allowed, found=known.drop.high
        )

    def chosen(self) -> str:
        """What is chosen of all trials."""
        known = self._standing.measurements()
        found = [candidate(t, known.get(t.name), goal=self._goal) for t in self.trials.values()]
        best = choose(found, goal=self._goal)
        return best[0].recipe.name if best else ""


METHODS: Final[dict[str, Method]] = {
    "equipoise": by_equipoise, "tpe": by_tpe, "random": by_random
}  # fmt: skip


# The machinery.


@dataclass(frozen=True, kw_only=True)
class MachineryRecord:
    """What the machinery takes, and what four workers bring."""

    machine: Machine
    versions: dict[str, str]
    overhead: Overhead
    scaling: Scaling


def machinery(options: argparse.Namespace) -> None:
    """Measure both, write the record and print it."""
    table = read_table(options.tables[0])
    seconds = sorted(e.seconds for e in table.entries.values() if not e.failure)
    some = seconds[:: max(1, len(seconds) // 40)][:40]
    scale = 60 / sum(some)
    record = MachineryRecord(
        machine=detect_machine(),
        versions=versions_of((*VERSIONS, "ray")),
        overhead=overhead(options),
        scaling=scaling([scale * s for s in some]),
    )
    fs.write_json(options.output, record)
    print(f"overhead {record.overhead.share:.1%}; {NODES} nodes {record.scaling.speedup:.2f}x")


def overhead(options: argparse.Namespace) -> Overhead:
    """Search the digits with an empty cache."""
    config = digits(options)
    with fs.scratch_directory() as folder:
        launch = TimedLaunch(folder)
        pipeline = make_pipeline(config, runner=StageRunner(folder, launch=launch))
        lab = StageLab(pipeline, pipeline_of=lambda _: pipeline)
        space = space_for(
            SpaceSettings(saturates=pipeline.job.target.int8.saturates, threads=THREADS)
        )
        launch.seconds, began = 0.0, time.monotonic()
        with Journal(folder / "journal.sqlite") as journal:
            settings = SearchSettings(goal=Goal(), budget=Budget(trials=24))
            found = search(space, lab, settings=settings, journal=journal)
        whole = time.monotonic() - began
    return Overhead(
        trials=len(found.candidates),
        seconds=whole,
        in_children=launch.seconds,
        share=1 - launch.seconds / whole,
    )


# Finding.


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Searches of one table, to be run in any process.

    Attributes:
        table: The table.
        method: How to search.
        goal: For what.
        resample: Draw an evaluation set for each.
    """

    table: Table
    method: str
    goal: Goal
    resample: bool

    @property
    def trials(self) -> int:
        """Of each search, at most."""
        return math.floor(SHARE * len(self.table.entries))

    def __call__(self, seed: int) -> tuple[str, int]:
        """What the search with this seed chose, and how many recipes it tried."""
        lab = ReplayLab(self.table, np.random.default_rng([7, seed]), resample=self.resample)
        run = METHODS[self.method]
        return run(self.table.space, lab, self.goal, self.trials, seed), len(lab.tried)


def find(
    name: str, table: Table, *, max_drop: float, seeds: int, pool: ProcessPoolExecutor
) -> Iterator[Finding]:
    """All methods with one limit."""
    goal = Goal(max_drop=max_drop, minimise=("latency",))
    best, alone = best_of_all(table, goal), best_alone(table, goal)
    for method in METHODS:
        run = Replay(table=table, method=method, goal=goal, resample=False)
        found = list(pool.map(run, range(seeds)))
        excesses = [cost(table, chosen) / cost(table, best) - 1 for chosen, _ in found]
        yield Finding(
            table=name,
            method=method,
            max_drop=max_drop,
            recipes=len(table.entries),
            trials=float(np.median([tried for _, tried in found])),
            best=best,
            best_alone=alone,
            excess=float(np.median(excesses)),
            excesses=tuple(excesses),
        )


def cost(table: Table, name: str) -> float:
    """Latency over that of the float engine, as the table has it; the float engine's own is 1."""
    speedup = table.entry(name).speedup
    return 1.0 if speedup is None or name == "float32" else 1 / speedup.value


def best_of_all(table: Table, goal: Goal) -> str:
    """What is chosen when every recipe was measured: nobody can find more, but by luck."""
    lab = ReplayLab(table, np.random.default_rng(0), resample=False)
    run = _Judged(table.space, lab, goal)
    for point in table.space.points():
        run.value(point)
    return run.chosen()


def best_alone(table: Table, goal: Goal) -> str:
    """The cheapest recipe whose bound, for it alone, is within the limit."""
    lab = ReplayLab(table, np.random.default_rng(0), resample=False)
    task, allowed = lab.task, goal.max_drop or 0.0
    good = [
        name
        for name, entry in table.entries.items()
        if not entry.failure
        and not entry.twin
        and paired_drop(
            task.reference, table.statistics[name], task.value, discrete=task.discrete
        ).high
        <= allowed
    ]
    return min([*good, "float32"], key=lambda name: cost(table, name))


# Claims.


def true_drops(table: Table) -> dict[str, float]:
    """Name -> what a recipe loses over the whole table."""
    task = ReplayLab(table, np.random.default_rng(0), resample=False).task
    whole = float(task.value(task.reference.sum(0)))
    return {
        name: whole - float(task.value(table.statistics[table.entry(name).recipe.name].sum(0)))
        for name, entry in table.entries.items()
        if not entry.failure
    }


def claim(
    name: str, table: Table, *, max_drop: float, runs: int, pool: ProcessPoolExecutor
) -> Claims:
    """Search ``runs`` evaluation sets drawn from the table."""
    drops = true_drops(table)
    goal = Goal(max_drop=max_drop, minimise=("latency",))
    run = Replay(table=table, method="equipoise", goal=goal, resample=True)
    chosen = [found or "float32" for found, _ in pool.map(run, range(runs), chunksize=10)]
    return Claims(
        table=name,
        max_drop=max_drop,
        near=sum(max_drop < drop <= 2 * max_drop for drop in drops.values()),
        runs=runs,
        wrong=sum(drops[found] > max_drop for found in chosen),
        not_float=sum(found != "float32" for found in chosen),
    )


def hardest(table: Table) -> float:
    """The allowed drop just below the true one of as many fast recipes as there are.

    Where none loses anything no claim can be wrong; then any drop does.
    """
    drops = true_drops(table)
    fast = [drop for name, drop in drops.items() if drop > 0 and cost(table, name) < 0.9]
    counts = {drop: sum(drop <= other <= 2 * drop for other in fast) for drop in fast}
    return max(counts, key=lambda drop: (counts[drop], -drop), default=DROPS[0]) * 0.999


# The whole.


def replay(options: argparse.Namespace) -> None:
    """Read tables, search them, write the record and print it."""
    tables = {path.stem: read_table(path) for path in options.tables}
    with ProcessPoolExecutor() as pool:
        findings = [
            finding
            for name, table in tables.items()
            for max_drop in DROPS
            for finding in find(name, table, max_drop=max_drop, seeds=options.seeds, pool=pool)
        ]
        claims = [
            claim(name, table, max_drop=max_drop, runs=options.claims, pool=pool)
            for name, table in tables.items()
            for max_drop in (hardest(table), 0.01)
        ]
    record = Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        measured_on={name: table.head.machine for name, table in tables.items()},
        findings=tuple(findings),
        claims=tuple(claims),
    )
    fs.write_json(options.output, record)
    for finding in findings:
        print(
            f"{finding.table:10} {finding.max_drop:<6g} {finding.method:10}"
            f" {100 * finding.excess:6.1f} % over {finding.best}"
            f" in {finding.trials:.0f} of {finding.recipes}"
        )
    for found in claims:
        print(
            f"{found.table:10} {found.max_drop:.4f}: {found.wrong} of {found.runs} wrong,"
            f" {found.not_float} not float; {found.near} recipes near the limit"
        )


def main() -> None:
    """Make a table, or replay some."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table")
    table.add_argument("case", choices=("digits", "ner"))
    table.add_argument("--model", type=Path, required=True)
    table.add_argument("--samples", type=int, default=None, help="all when left out")
    table.add_argument("--pruned", type=Path, help="model that was pruned before, to take")
    table.add_argument("--calibration-samples", type=int, default=128)
    table.add_argument("--output", type=Path, required=True)
    again = commands.add_parser("replay")
    again.add_argument("tables", type=Path, nargs="+")
    again.add_argument("--output", type=Path, required=True)
    again.add_argument("--seeds", type=int, default=20)
    again.add_argument("--claims", type=int, default=400)
    costs = commands.add_parser("machinery")
    costs.add_argument("tables", type=Path, nargs=1)
    costs.add_argument("--model", type=Path, required=True)
    costs.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    {"table": make_table, "replay": replay, "machinery": machinery}[options.command](options)


if __name__ == "__main__":
    main()
