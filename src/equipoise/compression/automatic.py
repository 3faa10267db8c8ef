"""How far to prune where nobody says it, by the time that there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from equipoise.compress.cutting import Pruning
from equipoise.compress.settings import Objective, TrainSettings
from equipoise.compress.trainee import TRAINABLE
from equipoise.pipeline import Pipeline

SPEEDUPS: Final = (1.6, 1.3, 2.5)
"""The first often keeps the metric, also of a transformer; what it shows decides on the others."""

_SHARE: Final = 0.3
"""Of the budget that the training after one cut may take. A second cut, where the first is not fast
enough, takes about as much again."""

_STEP_SHARE: Final = 0.25
"""Of the last training that follows the one cut."""

_PASSES: Final = 4
"""Of one training sample: the student forward, twice as much backward, and the teacher."""

_EPOCHS: Final = (3.0, 2.0, 1.0, 0.5, 0.25)


@dataclass(frozen=True, kw_only=True)
class Automatic:
    """Goals to prune to, and why these.

    Attributes:
        prunings: May be empty.
        reason: In words.
    """

    prunings: tuple[Pruning, ...] = ()
    reason: str


def automatic_prunings(
    pipeline: Pipeline,
    *,
    budget_s: float,
    latency_ms: float,
    max_drop: float,
    recovery: TrainSettings,
) -> Automatic:
    """Goals for the model of ``pipeline``.

    Args:
        pipeline: With training samples where there are any.
        budget_s: For the whole search.
        latency_ms: Of one inference of the float engine, with the threads of the job: training,
            which takes all cores, is estimated by it.
        max_drop: Of the metric.
        recovery: How a pruned model is trained; at most so many epochs.
    """
    source, samples = pipeline.job.source, pipeline.data.record.training_samples
    if source.kind not in TRAINABLE:
        return Automatic(reason=f"a source of kind {source.kind!r} cannot be pruned")
    if not samples:
        return Automatic(
            reason="no pruned model is tried: the data has no training part, and --train names none"
        )
    job = pipeline.job
    epoch_s = samples * _PASSES * latency_ms / 1000 * min(job.threads / job.machine.cores, 1.0)
    epochs = _affordable(_SHARE * budget_s / (1 + _STEP_SHARE), epoch_s=epoch_s)
    if epochs is None:
        return Automatic(
            reason=f"no pruned model is tried: an epoch of {samples} samples takes about"
            f" {epoch_s:.0f} s, too long for a budget of {budget_s:g} s"
        )
    epochs = min(epochs, recovery.epochs)
    pruning = Pruning(
        max_drop=max_drop,
        steps=1,
        step_epochs=_STEP_SHARE * epochs,
        recovery=replace(recovery, epochs=epochs, objective=_objective(pipeline, recovery)),
    )
    return Automatic(
        prunings=tuple(replace(pruning, speedup=speedup) for speedup in SPEEDUPS),
        reason=f"pruned models are trained for {epochs:g} epochs, as the budget allows",
    )


def _objective(pipeline: Pipeline, recovery: TrainSettings) -> Objective:
    """Without labels the teacher alone says what is right."""
    labelled = (pipeline.data.files / "training_labels").exists()
    return recovery.objective if labelled else replace(recovery.objective, task=0.0)


def _affordable(seconds: float, *, epoch_s: float) -> float | None:
    return next((epochs for epochs in _EPOCHS if epochs * epoch_s <= seconds), None)
