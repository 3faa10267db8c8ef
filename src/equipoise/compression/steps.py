"""Prune a model in steps until it is fast enough.

Every step cuts what the measured table of layers says is worth most, trains the rest again, builds
the target's engine and times it beside the original's. A step that does not pay in measured time is
not taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from equipoise.compress.cutting import Pruning
from equipoise.compress.distributed import launched_world
from equipoise.compression.compression import Compression
from equipoise.compression.models import Trained, Workplace
from equipoise.compression.plans import Proposal, planner_of
from equipoise.errors import NotMetError, UsageError
from equipoise.measure.interval import Interval
from equipoise.pipeline import Pipeline
from equipoise.sources.source import Source

ORIGINAL: Final = Interval(value=1.0, low=1.0, high=1.0)
_MORE_STEPS: Final = 3
"""Besides those planned: where the table was too hopeful, or a step did not pay."""

_MARGIN: Final = 1.02
"""The table is right to a few per cent; a goal just missed would cost another step."""

_Verdict = Literal["taken", "does not pay", "too inaccurate"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model beside others on the target.

    Attributes:
        name: What it is called in tables.
        parameters: Of the PyTorch model.
        multiply_accumulates: Of one inference at batch 1.
        size_bytes: Of the float engine.
        latency_ms: Of the float engine, measured.
        speedup: Latency of the original's float engine over this one's, interleaved.
        metric: On the evaluation samples.
        drop: Metric of the original minus this one's, paired.
    """

    name: str
    parameters: int
    multiply_accumulates: int
    size_bytes: int
    latency_ms: float
    speedup: Interval
    metric: Interval
    drop: Interval


@dataclass(frozen=True, kw_only=True)
class PruneStep:
    """One step that was tried.

    Attributes:
        goal: Speed-up that it was to reach over the original.
        cut: What was cut, in words.
        estimated: Speed-up by the table of layers.
        speedup: Speed-up as measured.
        parameters: Left after it.
        loss_before: Loss on validation samples before the cut; None without labels.
        loss_cut: The same right after it.
        metric: On the validation samples, after training.
        drop: Metric of the original there, minus it.
        taken: Whether it was kept.
        reason: Why, in words.
    """

    goal: float
    cut: str
    estimated: float
    speedup: Interval
    parameters: int
    loss_before: float | None
    loss_cut: float | None
    metric: float
    drop: float
    taken: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What pruning came to: the model, and how it got there."""

    source: Source
    steps: tuple[PruneStep, ...]
    stopped: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _State:
    """A model on the way, with its float engine measured beside the original's."""

    source: Source
    speedup: Interval
    metric: float


def prune(
    pipeline: Pipeline, pruning: Pruning, *, teacher: Source | None = None, workplace: Workplace
) -> Pruned:
    """Prune the model of ``pipeline``.

    Args:
        pipeline: With samples for training, and the target that measures.
        pruning: How far, and how.
        teacher: What the pruned model learns from; the model itself as it was when None.
        workplace: Where training runs and keeps its checkpoints.

    Raises:
        UsageError: A goal out of range, or several processes of a launcher.
        SourceError: The model has nothing that can be cut.
        As ``train_model``.
    """
    check_pruning(pruning)
    if launched_world() > 1:
        raise UsageError(
            f"a launcher started {launched_world()} processes, and pruning measures in one",
            hint="Leave out the launcher and give --processes; distill and finetune run under it.",
        )
    return _Pruner(pipeline, pruning, teacher=teacher, workplace=workplace).run()


def check_pruning(pruning: Pruning) -> None:
    """Raises UsageError for a setting out of range."""
    for name, value, least in (
        ("--speedup", pruning.speedup, 1.01),
        ("--steps", pruning.steps, 1),
        ("--max-drop", pruning.max_drop, 0),
        ("--step-epochs", pruning.step_epochs, 0),
    ):
        if value < least:
            raise UsageError(f"{name} is {value}; it must be at least {least}")


class _Pruner:
    """The steps from one model to its pruned form."""

    def __init__(
        self, pipeline: Pipeline, pruning: Pruning, *, teacher: Source | None, workplace: Workplace
    ) -> None:
        self._pruning, self._workplace = pruning, workplace
        self._compression = Compression(pipeline)
        self._original = pipeline.job.source
        self._teacher = teacher or self._original
        self._baseline = self._compression.engine(self._original, label="original")
        latency = self._compression.latency(self._baseline, self._baseline)
        self._planner = planner_of(
            self._compression,
            pruning.cutting,
            baseline=self._baseline,
            latency_ms=latency.engine_ms.value,
        )
        self._metric = self._compression.validation_metric(self._original)
        self._steps: list[PruneStep] = []
        self._notes: list[str] = []

    def run(self) -> Pruned:
        """All steps, the last recovery, and the judgement."""
        state = _State(
            source=self._original,
            speedup=ORIGINAL,
            metric=self._metric,
        )
        state, stopped = self._to_goal(state)
        if state.source is not self._original:
            state = self._recovered(state)
        return Pruned(
            source=state.source,
            steps=tuple(self._steps),
            stopped=stopped,
            notes=tuple(dict.fromkeys(self._notes)),
        )

    def _to_goal(self, state: _State) -> tuple[_State, str]:
        """Steps of the same factor, until the goal is measured or nothing goes on.

        A step that does not pay is tried once more as a larger one: widths that a runtime rounds up
        pay only when enough of them go.
        """
        goal = self._pruning.speedup
        factor = goal ** (1 / self._pruning.steps)
        reach = 1
        for _ in range(self._pruning.steps + _MORE_STEPS):
            if state.speedup.value >= goal:
                return state, "the goal is reached"
            wanted = min(goal, state.speedup.value * factor**reach)
            try:
                after, verdict = self._step(state, goal=wanted)
            except NotMetError as error:
                return state, error.message
            if verdict == "too inaccurate":
                return state, f"one more step would cost more than {self._pruning.max_drop:g}"
            reach = 1 if verdict == "taken" else reach + 1
            state = after if verdict == "taken" else state
        if state.speedup.value >= goal:
            return state, "the goal is reached"
        return state, f"{len(self._steps)} steps did not reach the goal"

    def _step(self, state: _State, *, goal: float) -> tuple[_State, _Verdict]:
        """Cut, train, measure, judge."""
        number = len(self._steps) + 1
        label = f"step {number}"
        proposal = self._planner.propose(
            state.source, goal=goal * _MARGIN, measured=state.speedup.value, label=label
        )
        trained = self._train(
            proposal.cut.source, epochs=self._pruning.step_epochs, label=f"{label}: train"
        )
        after = self._state(trained)
        verdict = self._verdict(state, after)
        if verdict == "too inaccurate":
            trained = self._train(trained.source, epochs=self._epochs, label=f"{label}: recover")
            after = self._state(trained)
            verdict = self._verdict(state, after)
        self._notes += proposal.cut.notes
        self._steps.append(self._told(state, after, proposal, goal=goal, verdict=verdict))
        return after, verdict

    @property
    def _epochs(self) -> float:
        return self._pruning.recovery.epochs

    def _train(self, student: Source, *, epochs: float, label: str) -> Trained:
        return self._compression.recover(
            student,
            teacher=self._teacher,
            settings=replace(self._pruning.recovery, epochs=epochs),
            workplace=self._workplace,
            label=label,
        )

    def _state(self, trained: Trained) -> _State:
        engine = self._compression.engine(trained.source, label="pruned")
        latency = self._compression.latency(engine, self._baseline)
        return _State(
            source=trained.source,
            speedup=latency.speedup,
            metric=trained.metric,
        )

    def _verdict(self, before: _State, after: _State) -> _Verdict:
        if after.speedup.low <= before.speedup.value:
            return "does not pay"
        return "taken" if self._drop(after) <= self._pruning.max_drop else "too inaccurate"

    def _drop(self, state: _State) -> float:
        return self._metric - state.metric

    def _told(
        self,
        before: _State,
        after: _State,
        proposal: Proposal,
        *,
        goal: float,
        verdict: _Verdict,
    ) -> PruneStep:
        reasons = {
            "taken": f"{after.speedup.value / before.speedup.value:.2f}x faster than before it",
            "does not pay": "in measured time it is no faster than before it",
            "too inaccurate": f"drops by {self._drop(after):.4f} on the validation samples;"
            f" allowed {self._pruning.max_drop:g}",
        }
        return PruneStep(
            goal=goal,
            cut=proposal.words,
            estimated=proposal.estimated,
            speedup=after.speedup,
            parameters=proposal.cut.parameters,
            loss_before=proposal.cut.loss_before,
            loss_cut=proposal.cut.loss_after,
            metric=after.metric,
            drop=self._drop(after),
            taken=verdict == "taken",
            reason=reasons[verdict],
        )

    def _recovered(self, state: _State) -> _State:
        """The last training, which keeps the better of before and after it."""
        trained = self._train(state.source, epochs=self._epochs, label="last recovery")
        return replace(state, source=trained.source, metric=trained.metric)


def side_of(source: Source, compression: Compression, *, original: Source, name: str) -> Side:
    """``source`` on the target beside ``original``: latency of float engines, and the metric."""
    engine = compression.engine(source, label=name)
    baseline = compression.engine(original, label="original")
    latency = compression.latency(engine, baseline)
    score = compression.score(source, label=name, reference=original)
    reference = compression.score(original, label="original", reference=original)
    return Side(
        name=name,
        parameters=engine.parameters,
        multiply_accumulates=engine.multiply_accumulates,
        size_bytes=engine.size_bytes,
        latency_ms=latency.engine_ms.value,
        speedup=ORIGINAL if source == original else latency.speedup,
        metric=score.metric,
        drop=compression.drop(reference, score),
    )
