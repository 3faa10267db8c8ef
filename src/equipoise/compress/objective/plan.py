"""What of a student is compared with what of its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from equipoise.compress.objective.compatibility import (
    check_inner,
    check_labels,
    check_outputs,
    check_vocabularies,
)
from equipoise.compress.objective.layers import spaced
from equipoise.compress.objective.points import Point, Size
from equipoise.compress.objective.task_losses import LABEL, Kind, Tensor, task_loss
from equipoise.compress.objective.watched import Run, Watched
from equipoise.compress.settings import Objective
from equipoise.errors import RecipeError, SourceError

Pairs = Sequence[tuple[int, int]]
"""Layers of the student and of the teacher that correspond, counted from 1; 0 is the input."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared with what.

    Attributes:
        kind: Of the task.
        settings: Parts and their weights.
        hidden: Hidden states that correspond.
        attention: Attention maps that correspond.
        widths: Widths of the hidden states of the student and of the teacher, by name of the pair.
    """

    kind: Kind
    settings: Objective
    hidden: Pairs = ()
    attention: Pairs = ()
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def make_plan(
    models: Sequence[Watched],
    *,
    kind: Kind,
    settings: Objective,
    batch: Mapping[str, Tensor],
    layers: Pairs | None,
) -> Plan:
    """Run student and teacher once, check that they fit, and find what corresponds.

    Args:
        models: The student, and the teacher if there is one.
        kind: Of the task.
        settings: Parts and their weights.
        batch: A real batch.
        layers: Layers that correspond; evenly spaced ones when None.

    Raises:
        RecipeError: Layers do not exist.
        SourceError: The models do not fit.
        DataError: Labels are missing or do not fit.
    """
    runs = [model.trial(batch) for model in models]
    kind = _kind(kind, output=next(iter(runs[0].outputs.values())), batch=batch)
    if settings.task > 0:
        _check_task(runs[0], kind=kind, batch=batch)
    if len(models) == 1:
        return Plan(kind=kind, settings=settings)
    _check_fit(models, runs, kind=kind, settings=settings, batch=batch)
    ours, theirs = runs
    hidden = _pairs(len(ours.states) - 1, len(theirs.states) - 1, given=layers, first=0)
    return Plan(
        kind=kind,
        settings=settings,
        hidden=hidden,
        attention=_pairs(len(ours.maps), len(theirs.maps), given=layers, first=1),
        widths={
            pair_name(i, j): (ours.states[i].shape[-1], theirs.states[j].shape[-1])
            for i, j in hidden
        },
    )


def _kind(kind: Kind, *, output: Tensor, batch: Mapping[str, Tensor]) -> Kind:
    """Without labels a regressor passes for a classifier of one class, which nothing can teach."""
    single = output.ndim == 2 and output.shape[-1] == 1
    return "regression" if kind == "classification" and single and LABEL not in batch else kind


def pair_name(ours: int, theirs: int) -> str:
    """Name of a pair of layers; a dot in the name of a module is not allowed."""
    return f"{ours}_{theirs}"


def _check_task(ours: Run, *, kind: Kind, batch: Mapping[str, Tensor]) -> None:
    device = next(iter(ours.outputs.values())).device
    there = {name: tensor.to(device) for name, tensor in batch.items()}
    task_loss(kind, outputs=ours.outputs, batch=there)


def _check_fit(
    models: Sequence[Watched],
    runs: Sequence[Run],
    *,
    kind: Kind,
    settings: Objective,
    batch: Mapping[str, Tensor],
) -> None:
    student, teacher = models
    check_vocabularies(student, teacher=teacher, batch=batch)
    if settings.logits > 0:
        check_outputs(runs, kind=kind, student=student, teacher=teacher)
        check_labels(student, teacher=teacher)
    check_inner(runs, student=student, teacher=teacher)
    if settings.features > 0:
        _watch_common_points(student, teacher, batch=batch)


def _watch_common_points(
    student: Watched, teacher: Watched, *, batch: Mapping[str, Tensor]
) -> None:
    ours, theirs = student.find_points(batch), teacher.find_points(batch)
    common = [size for size in ours if size in theirs]
    if not common:
        raise SourceError(
            f"{teacher.name} and {student.name} have no feature maps of one spatial size: they are"
            f" {_sizes(theirs)} and {_sizes(ours)}",
            hint="Set features to 0; hidden and attention compare transformers.",
        )
    student.watch_points([ours[size] for size in common])
    teacher.watch_points([theirs[size] for size in common])


def _sizes(points: Mapping[Size, Point]) -> str:
    return ", ".join(f"{height} x {width}" for height, width in points) or "none"


def _pairs(ours: int, theirs: int, *, given: Pairs | None, first: int) -> Pairs:
    """Which layers are compared. ``first`` is 0 where the input of the first layer is one."""
    if ours < 1:
        return ()
    if given is None:
        spread = list(zip(range(1, ours + 1), spaced(ours, over=theirs), strict=True))
        return spread if first else [(0, 0), *spread]
    for i, j in given:
        if not (0 <= i <= ours and 0 <= j <= theirs):
            raise RecipeError(
                f"objective: layers {i} and {j} do not correspond: the student has 0 to {ours},"
                f" the teacher 0 to {theirs}"
            )
    return [(i, j) for i, j in given if min(i, j) >= first]
