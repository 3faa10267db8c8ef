"""What to tune, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from equipoise.compress.cutting import Pruning
from equipoise.compress.settings import TrainSettings
from equipoise.errors import UsageError
from equipoise.jobs import JobConfig
from equipoise.recipe import Recipe
from equipoise.search.budget import Budget
from equipoise.search.goal import Goal, check_goal


@dataclass(frozen=True, kw_only=True)
class TuneConfig(JobConfig):
    """What to tune, on what data, for what, and how well.

    Attributes:
        output: Directory for ``bundle/``, ``report.html`` and ``results.json``.
        goal: Limits, and what to minimise.
        budget: When to stop; 16 trials where nothing is said.
        recipe: Make this recipe alone, and search nothing.
        also: Other targets of this device, such as ``openvino`` beside ``cpu``: their engines are
            candidates too.
        float_fallback: Put the float engine into the bundle too, for devices that the chosen one
            does not fit.
        prune: Speed-ups to prune to; the pruned models are candidates too. None, with a budget of
            time and training data that is no part of what judges, tries what the budget allows.
        recovery: How they are trained again.
        repeat: Search so many times, with all measurements made anew, to see how stable the choice
            is; the first result is the one that is packed.
        seed: Of what the search draws.
        workers: Trials at once, on this machine or the cluster.
        cluster: Address of a Ray cluster; this machine alone when empty.
        storage: Path or fsspec URL that all nodes of the cluster reach.
        memory_limit_bytes: Resident memory that one stage may take; None for no limit.
        command: What the user typed, for the report.
    """

    output: Path
    goal: Goal = field(default_factory=Goal)
    budget: Budget = field(default_factory=Budget)
    recipe: Recipe | None = None
    also: tuple[str, ...] = ()
    float_fallback: bool = False
    prune: tuple[float, ...] | None = None
    recovery: TrainSettings = field(default_factory=lambda: Pruning().recovery)
    repeat: int = 1
    seed: int = 0
    workers: int | None = None
    cluster: str = ""
    storage: str = ""
    memory_limit_bytes: int | None = None
    command: str = ""


def needs_training(config: TuneConfig) -> bool | None:
    """Whether training samples are needed, not, or taken where they are."""
    pruned = bool(config.prune) or (config.recipe is not None and config.recipe.pruning is not None)
    if pruned or config.for_training:
        return True
    return None if is_automatic(config) else False


def is_automatic(config: TuneConfig) -> bool:
    """Whether pruning is decided by the budget."""
    return config.prune is None and config.recipe is None and config.budget.seconds is not None


def check_config(config: TuneConfig) -> None:
    """Raises UsageError for a setting out of range."""
    check_goal(config.goal)
    for option, value in (("--repeat", config.repeat), ("--trials", config.budget.trials)):
        if value is not None and value < 1:
            raise UsageError(f"{option} is {value}; it must be at least 1")
    if config.budget.seconds is not None and config.budget.seconds <= 0:
        raise UsageError(f"--budget is {config.budget.seconds:g} s; it must be more than 0")


def other_targets(config: TuneConfig) -> tuple[str, ...]:
    """Targets beside the first one: those asked for, and that of a recipe that is named."""
    named = config.recipe.target if config.recipe else ""
    return tuple(dict.fromkeys([*config.also, *([named] if named else [])]))
