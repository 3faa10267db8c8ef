"""What a search of training settings is, as data: the space, the limits, and what was found."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from equipoise import record
from equipoise.compress.settings import Objective, TrainSettings
from equipoise.errors import RecipeError

Value = int | float | str
State = Literal["complete", "pruned", "failed", "died"]

_OBJECTIVE: Final = ("task", "logits", "hidden", "attention", "features", "temperature")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two ends.

    Attributes:
        low: Least value.
        high: Largest value.
        log: Whether factors count, not differences.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Space:
    """Which settings are searched, and where; None or empty leaves one as it is.

    Attributes:
        learning_rate: Largest rate of the schedule.
        warmup: Share of all steps.
        weight_decay: As of the optimiser.
        temperature: Of the distillation.
        task: Weight of the task loss.
        logits: Weight of the divergence from the teacher's outputs.
        hidden: Weight of the error of hidden states.
        attention: Weight of the divergence between attention maps.
        features: Weight of the error between feature maps.
        batch_size: The sizes to choose from.
        optimizer: The optimisers to choose from.
    """

    learning_rate: Range | None = None
    warmup: Range | None = None
    weight_decay: Range | None = None
    temperature: Range | None = None
    task: Range | None = None
    logits: Range | None = None
    hidden: Range | None = None
    attention: Range | None = None
    features: Range | None = None
    batch_size: tuple[int, ...] = ()
    optimizer: tuple[Literal["adamw", "sgd"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Median:
    """Stop a trial whose best value so far is below the median of the others at the same step.

    Attributes:
        startup_trials: Trials that run to their end before any is stopped.
        warmup_steps: Steps of a trial before which it is not stopped.
    """

    kind: Literal["median"] = "median"
    startup_trials: int = 3
    warmup_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Hyperband:
    """Successive halving with several rates of stopping (Li et al. 2018, arXiv 1603.06560).

    Attributes:
        reduction_factor: One of so many trials goes on.
        least_steps: Steps that every trial is given.
    """

    kind: Literal["hyperband"] = "hyperband"
    reduction_factor: int = 3
    least_steps: int = 1


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """How to search.

    Attributes:
        storage: SQLite file of the study; made when it is not there.
        space: What is searched; None for :func:`space_around` the settings at hand.
        trials: Most trials in all, earlier runs included; None leaves it to the time.
        budget_s: Seconds of all trials together, earlier runs included; None for no limit. The
            first trial, with the settings at hand, runs in any case.
        seed: Of the proposals.
        pruner: How bad trials are stopped; None lets all run to their end.
        question: What else the values depend on, such as hashes of source and data.
    """

    storage: Path
    space: Space | None = None
    trials: int | None = 20
    budget_s: float | None = None
    seed: int = 0
    pruner: Median | Hyperband | None = field(default_factory=Median)
    question: str = ""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: In the order that they began.
        state: ``pruned`` when it was stopped early; ``died`` when its process did not end it.
        value: Validation metric in the end; of one that was stopped, the last that it reported.
        settings: Name of each searched setting -> its value.
        seconds: That it took; 0 where it died.
        steps: The last step that it reported; -1 for none.
        reason: Why it failed or was stopped; empty otherwise.
    """

    number: int
    state: State
    value: float | None
    settings: dict[str, Value]
    seconds: float
    steps: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a search found.

    Attributes:
        best: The settings with the largest validation metric.
        best_value: Their metric; chosen on it, so that it flatters them.
        base_value: Metric of the settings at hand; None where training with them failed.
        trials: Every trial of the study, earlier runs included.
        seconds: Of all trials together.
        study: Name of the study in its file.
    """

    best: TrainSettings
    best_value: float
    base_value: float | None
    trials: tuple[TrialRecord, ...]
    seconds: float
    study: str


def space_around(base: TrainSettings) -> Space:
    """A space of the usual width around ``base``: what it does not use is not searched."""
    goal = base.objective
    used = [name for name in _OBJECTIVE[:-1] if getattr(goal, name) > 0]
    used = used if len(used) > 1 else []  # one weight alone is a factor of the rate
    weights: dict[str, Any] = {name: _around(getattr(goal, name), 10) for name in used}
    halved = max(1, base.batch_size // 2)
    return Space(
        learning_rate=_around(base.learning_rate, 10),
        warmup=Range(low=0.0, high=max(0.2, base.warmup)),
        weight_decay=_around(base.weight_decay, 30) if base.weight_decay > 0 else None,
        temperature=_around(goal.temperature, 3) if goal.logits > 0 else None,
        batch_size=tuple(sorted({halved, base.batch_size, base.batch_size * 2})),
        **weights,
    )


def _around(value: float, factor: float) -> Range:
    return Range(low=value / factor, high=value * factor, log=True)


def check_study(settings: StudySettings, *, base: TrainSettings) -> None:
    """Raise RecipeError unless there is something to search, a limit, and ``base`` within."""
    if settings.trials is None and settings.budget_s is None:
        raise RecipeError("a search needs a limit: give trials, budget_s, or both")
    if settings.trials is not None and settings.trials < 1:
        raise RecipeError(f"trials is {settings.trials}; allowed is 1 or more")
    if settings.budget_s is not None and not 0 < settings.budget_s < math.inf:
        raise RecipeError(f"budget_s is {settings.budget_s}; allowed is more than 0")
    asked = searched(settings, base=base)
    if not asked:
        raise RecipeError(
            "the space is empty: no setting is searched",
            hint="Name one at least, or take space_around(base).",
        )
    for name, wanted in asked.items():
        _check_one(name, wanted, value=value_of(base, name))


def _check_one(name: str, wanted: Range | tuple[Value, ...], *, value: Value) -> None:
    if isinstance(wanted, tuple):
        if value not in wanted or len(set(wanted)) < len(wanted):
            raise RecipeError(
                f"{name} is {value!r} now, and the choices are {list(wanted)}",
                hint="The choices have to differ and to hold the value at hand.",
            )
        return
    least = 0.0 if not wanted.log else math.ulp(0.0)
    if not least <= wanted.low < wanted.high < math.inf:
        raise RecipeError(
            f"the range of {name} is {wanted.low} to {wanted.high}; allowed is low < high, and low"
            f" {'above' if wanted.log else 'from'} 0",
        )
    if not wanted.low <= float(value) <= wanted.high:
        raise RecipeError(
            f"{name} is {value} now, outside of its range {wanted.low} to {wanted.high}",
            hint="Widen the range or begin from another value: the first trial is the one at hand.",
        )


def searched(
    settings: StudySettings, *, base: TrainSettings
) -> dict[str, Range | tuple[Value, ...]]:
    """Name of each setting that is searched -> its range or choices."""
    space = space_around(base) if settings.space is None else settings.space
    named = {name: getattr(space, name) for name in space.__dataclass_fields__}
    return {name: wanted for name, wanted in named.items() if wanted not in (None, ())}


def value_of(base: TrainSettings, name: str) -> Value:
    """The value that ``base`` has of a setting, its objective included."""
    value: Value = getattr(base.objective if name in _OBJECTIVE else base, name)
    return value


def with_values(base: TrainSettings, values: Mapping[str, Value]) -> TrainSettings:
    """``base`` with other values of some settings, those of its objective included."""
    own = {name: value for name, value in values.items() if name not in _OBJECTIVE}
    goal = {name: value for name, value in values.items() if name in _OBJECTIVE}
    objective = Objective(**{**asdict(base.objective), **goal})
    changed: dict[str, Any] = {**own, "objective": objective}
    return replace(base, **changed)


def study_name(settings: StudySettings, *, base: TrainSettings) -> str:
    """A name that stands for the question: the space, the settings at hand, and what else counts.

    How long and with which pruner a study goes on does not change what its values mean.
    """
    asked = {
        "space": record.to_json(searched(settings, base=base)),
        "base": record.to_json(base),
        "question": settings.question,
    }
    return hashlib.sha256(record.dumps(asked).encode()).hexdigest()[:32]
