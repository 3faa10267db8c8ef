"""Search of training settings with Optuna, in a study on disk that goes on where it was.

Proposals come from TPE, and bad trials are stopped early. The settings at hand are the first trial
and run to their end, so that what comes out is never worse than they are on the validation samples.
All of a study lies in one SQLite file, which SQLite writes itself. A study belongs to one question:
another space, other settings or other data are another study in the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from equipoise import extras
from equipoise.compress.settings import TrainSettings
from equipoise.compress.study_file import open_storage
from equipoise.compress.study_settings import (
    Hyperband,
    Median,
    Range,
    Space,
    State,
    StudyResult,
    StudySettings,
    TrialRecord,
    Value,
    check_study,
    searched,
    space_around,
    study_name,
    value_of,
    with_values,
)
from equipoise.database import database_errors, only_one
from equipoise.errors import NonFiniteError, NotMetError, OutputError, ResourceError

__all__ = [
    "Hyperband", "Median", "Range", "Report", "Space", "StudyResult", "StudySettings",
    "TrialRecord", "search", "space_around", "study_name", "with_values",
]  # fmt: skip

Report = Callable[[int, float], None]
"""``report(step, value)``: the validation metric, larger is better, at a step of training. It ends
the trial by an exception of its own when going on is not worth it; let that through."""

_ATTEMPTS: Final = 3
"""A trial whose process dies each time is given up after so many."""

_STARTUP_TRIALS: Final = 5
"""Trials at random before proposals follow what was seen; TPE's usual 10 are half of a search."""

_SEEDS: Final = 2**32
_BASE, _RETRY_OF, _ATTEMPT, _REASON, _SECONDS = "base", "retry_of", "attempt", "reason", "seconds"
_STATES: Final[dict[str, State]] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


def search(
    settings: StudySettings, *, base: TrainSettings, run: Callable[[TrainSettings, Report], float]
) -> StudyResult:
    """Look for the training settings with the largest validation metric.

    Args:
        settings: How.
        base: The settings at hand; the first trial.
        run: Trains with some settings and gives back the validation metric, larger is better. It
            reports the metric while it trains. A NonFiniteError or ResourceError of it ends its
            trial alone; any other error ends the search, and the trial is run again next time.

    Returns:
        The best of all trials of the study, those of earlier runs included.

    Raises:
        RecipeError: The space is empty or does not hold ``base``, or there is no limit.
        MissingExtraError: Optuna is not installed.
        LockError: Another process works on the file.
        OutputError: The file cannot be written.
        IntegrityError: It is no study, or is damaged.
        IncompatibleError: Another version of Optuna wrote it.
        NotMetError: No trial came to its end.
    """
    check_study(settings, base=base)
    path = settings.storage
    with only_one(path), database_errors(path), _quiet(), open_storage(path) as storage:
        study = _Study(settings, base=base, run=run, storage=storage)
        study.recover()
        study.go_on()
        return study.result()


class _StoppedError(BaseException):
    """Ends a trial from inside of ``run``. No Exception: who swallows those must not swallow it."""

    def __init__(self, reason: str, *, failed: bool) -> None:
        super().__init__(reason)
        self.reason, self.failed = reason, failed


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise _StoppedError(f"the validation metric is {value}", failed=True)
    return float(value)


class _Study:
    def __init__(
        self,
        settings: StudySettings,
        *,
        base: TrainSettings,
        run: Callable[[TrainSettings, Report], float],
        storage: Any,
    ) -> None:
        optuna = extras.require("optuna")
        self._settings, self._base, self._run = settings, base, run
        self._states = optuna.trial.TrialState
        self._name = study_name(settings, base=base)
        self._study = optuna.create_study(
            storage=storage,
            study_name=self._name,
            direction="maximize",
            pruner=_pruner(settings.pruner),
            load_if_exists=True,
        )
        self._distributions = {
            name: _distribution(wanted) for name, wanted in searched(settings, base=base).items()
        }

    # Going on.

    def recover(self) -> None:
        """Enqueue the settings at hand in a new study; in an old one, what died."""
        trials = self._study.get_trials(deepcopy=False)
        if not trials:
            values = {name: value_of(self._base, name) for name in self._distributions}
            self._study.enqueue_trial(values, user_attrs={_BASE: True})
        for trial in trials:
            if trial.state == self._states.RUNNING:
                self._bury(trial)

    def _bury(self, trial: Any) -> None:
        """Let a trial whose process died run again, unless it always dies, and mark it."""
        attempt = int(trial.user_attrs.get(_ATTEMPT, 1))
        # A process may die here too: what is enqueued already is not enqueued again.
        values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if values and attempt < _ATTEMPTS and trial.number not in self._retried():
            kept = {_BASE: True} if trial.user_attrs.get(_BASE) else {}
            again = {_RETRY_OF: trial.number, _ATTEMPT: attempt + 1, **kept}
            self._study.enqueue_trial(values, user_attrs=again)
        self._study.tell(trial.number, state=self._states.FAIL)

    def _retried(self) -> set[int]:
        """Numbers of trials that were enqueued again."""
        trials = self._study.get_trials(deepcopy=False)
        return {int(t.user_attrs[_RETRY_OF]) for t in trials if _RETRY_OF in t.user_attrs}

    def go_on(self) -> None:
        """Run trials until a limit is reached."""
        while self._has_room():
            self._study.sampler = self._sampler()
            self._one(self._study.ask(self._distributions))

    def _counted(self) -> list[Any]:
        """Trials that were ended by themselves; what died is run again and does not count."""
        ended = (self._states.COMPLETE, self._states.PRUNED, self._states.FAIL)
        trials = self._study.get_trials(deepcopy=False, states=ended)
        retried = self._retried()
        return [t for t in trials if _SECONDS in t.user_attrs and t.number not in retried]

    def _has_room(self) -> bool:
        counted = self._counted()
        most, budget_s = self._settings.trials, self._settings.budget_s
        if most is not None and len(counted) >= most:
            return False
        return not counted or budget_s is None or self._spent_s() < budget_s

    def _spent_s(self) -> float:
        return math.fsum(trial.user_attrs.get(_SECONDS, 0.0) for trial in self._counted())

    def _sampler(self) -> Any:
        """A sampler seeded for the next trial alone: a resumed study must not draw the same again.

        Proposals follow from the seed and the trials before, whether in one run or in several.
        """
        text = f"{self._settings.seed} {len(self._counted())}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _SEEDS
        return extras.require("optuna").samplers.TPESampler(
            n_startup_trials=_STARTUP_TRIALS, seed=seed
        )

    # One trial.

    def _one(self, trial: Any) -> None:
        started = time.monotonic()
        report = self._reporter(trial, deadline=self._deadline(trial, started))
        try:
            value = _finite(self._run(with_values(self._base, trial.params), report))
        except _StoppedError as stopped:
            state = self._states.FAIL if stopped.failed else self._states.PRUNED
            self._end(trial, started, state=state, reason=stopped.reason)
        except (NonFiniteError, ResourceError) as error:
            if isinstance(error, OutputError):
                raise
            self._end(trial, started, state=self._states.FAIL, reason=error.message)
        else:
            self._end(trial, started, state=self._states.COMPLETE, value=value)

    def _deadline(self, trial: Any, started: float) -> float:
        """When the trial has to stop; the settings at hand run to their end whatever it takes."""
        if self._settings.budget_s is None or trial.user_attrs.get(_BASE):
            return math.inf
        return started + self._settings.budget_s - self._spent_s()

    def _reporter(self, trial: Any, *, deadline: float) -> Report:
        is_base = bool(trial.user_attrs.get(_BASE))

        def report(step: int, value: float) -> None:
            """Hear of a validation metric; raise what ends the trial when that is better."""
            if not math.isfinite(value):
                raise _StoppedError(f"the metric is {value} at step {step}", failed=True)
            trial.report(float(value), step=step)
            if time.monotonic() >= deadline:
                raise _StoppedError(f"the time was over at step {step}", failed=False)
            if not is_base and trial.should_prune():
                raise _StoppedError(f"worse than others at step {step}", failed=False)

        return report

    def _end(
        self,
        trial: Any,
        started: float,
        *,
        state: Any,
        value: float | None = None,
        reason: str = "",
    ) -> None:
        trial.set_user_attr(_SECONDS, time.monotonic() - started)
        if reason:
            trial.set_user_attr(_REASON, reason)
        self._study.tell(trial, value, state=state)

    # What came of it.

    def result(self) -> StudyResult:
        """The best of all. Raises NotMetError when no trial came to its end."""
        trials = [t for t in self._study.get_trials(deepcopy=False) if t.state.is_finished()]
        done = [t for t in trials if t.state == self._states.COMPLETE]
        if not done:
            reasons = {t.user_attrs.get(_REASON, "the process died") for t in trials}
            raise NotMetError(
                f"none of {len(trials)} trials came to its end: {'; '.join(sorted(reasons))}",
                hint="Begin from settings that train, with a smaller rate or batch.",
            )
        counted = {t.number for t in self._counted()}
        best = max(done, key=lambda t: (t.value, -t.number))
        base = next((t.value for t in done if t.user_attrs.get(_BASE)), None)
        return StudyResult(
            best=with_values(self._base, best.params),
            best_value=best.value,
            base_value=base,
            trials=tuple(self._record(t, died=t.number not in counted) for t in trials),
            seconds=self._spent_s(),
            study=self._name,
        )

    def _record(self, trial: Any, *, died: bool) -> TrialRecord:
        return TrialRecord(
            number=trial.number,
            state="died" if died else _STATES[trial.state.name],
            value=trial.value,
            settings=dict(trial.params),
            seconds=0.0 if died else float(trial.user_attrs[_SECONDS]),
            steps=-1 if trial.last_step is None else trial.last_step,
            reason="its process died" if died else str(trial.user_attrs.get(_REASON, "")),
        )


def _distribution(wanted: Range | tuple[Value, ...]) -> Any:
    distributions = extras.require("optuna.distributions")
    if isinstance(wanted, tuple):
        return distributions.CategoricalDistribution(wanted)
    return distributions.FloatDistribution(wanted.low, wanted.high, log=wanted.log)


def _pruner(settings: Median | Hyperband | None) -> Any:
    pruners = extras.require("optuna").pruners
    if isinstance(settings, Median):
        return pruners.MedianPruner(
            n_startup_trials=settings.startup_trials, n_warmup_steps=settings.warmup_steps
        )
    if isinstance(settings, Hyperband):
        return pruners.HyperbandPruner(
            min_resource=settings.least_steps, reduction_factor=settings.reduction_factor
        )
    return pruners.NopPruner()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says a line per trial otherwise."""
    logging = extras.require("optuna").logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
