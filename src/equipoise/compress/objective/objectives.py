"""Student, teacher and what is minimised, as one module that a training loop runs.

A loop runs one module, and wraps it for several processes. So everything that gets a gradient is
in it: the student, and the projections that are learned beside it. The teacher is not: it is no
parameter, is not saved, and nothing wraps it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from equipoise import extras
from equipoise.compress.objective.divergences import (
    added,
    attention_divergence,
    class_divergence,
    map_divergence,
)
from equipoise.compress.objective.plan import Pairs, Plan, make_plan, pair_name
from equipoise.compress.objective.task_losses import (
    MASK,
    Kind,
    Part,
    Tensor,
    labels_of,
    task_loss,
    value_error,
    vector_error,
)
from equipoise.compress.objective.watched import Run, Watched, device_of
from equipoise.compress.settings import Objective
from equipoise.data.text import IGNORED
from equipoise.errors import RecipeError

PARTS: Final = ("task", "logits", "hidden", "attention", "features")
_SEED: Final = 0
"""Of the projections: every process has to begin with the same ones."""


def build_objectives(  # noqa: PLR0913  what is compared, and what decides how
    student: Any,
    *,
    teacher: Any | None,
    kind: Kind,
    settings: Objective,
    names: Sequence[str],
    batch: Mapping[str, Tensor],
    layers: Pairs | None = None,
) -> Any:
    """The module to train, once it is sure that it can be.

    Its ``forward(batch)`` gives ``{part: (sum, count)}`` for every part of a weight above 0:
    float32 scalars, whatever precision the models run in. Its ``close()`` takes the hooks off.
    Both models have run once on ``batch`` before, without a gradient.

    Args:
        student: The module that learns.
        teacher: The module that it learns from; None when no part needs one.
        kind: What is computed.
        settings: Parts and their weights.
        names: Names of the inputs.
        batch: A real batch: inputs by name and, where there are labels, ``label``.
        layers: Layers of the student and of the teacher to compare; evenly spaced ones when None.

    Raises:
        RecipeError: There is nothing to minimise, a weight is negative, a part needs a teacher and
            there is none, or layers do not exist.
        SourceError: Student and teacher do not fit, and says in what.
        DataError: Labels are missing or do not fit.
    """
    _check_settings(settings, has_teacher=teacher is not None)
    taught = teacher if settings.needs_teacher else None
    opened: list[Watched] = []
    try:
        for role, module in (("student", student), ("teacher", taught)):
            if module is not None:
                opened.append(Watched(module, names=names, role=role, settings=settings))
        plan = make_plan(opened, kind=kind, settings=settings, batch=batch, layers=layers)
    except BaseException:
        for watched in opened:
            watched.close()
        raise
    return _objectives_class()(opened, plan)


def _check_settings(settings: Objective, *, has_teacher: bool) -> None:
    weights = {part: float(getattr(settings, part)) for part in PARTS}
    negative = [part for part, weight in weights.items() if not weight >= 0]
    if negative or not settings.temperature > 0:
        name = negative[0] if negative else "temperature"
        least = "0 or more" if negative else "more than 0"
        raise RecipeError(f"objective: {name} is {getattr(settings, name)}; it has to be {least}")
    if not any(weights.values()):
        raise RecipeError(
            "objective: every part has weight 0, so there is nothing to learn",
            hint=f"Give one of {', '.join(PARTS)} a weight above 0.",
        )
    if settings.needs_teacher and not has_teacher:
        needing = next(part for part in PARTS[1:] if weights[part] > 0)
        raise RecipeError(
            f"objective: {needing} has weight {weights[needing]:g}, and there is no teacher",
            hint="Name a teacher, or set the part to 0.",
        )


def _projection(ours: int, theirs: int, *, seed: int) -> Any:
    """A map from the student's width to the teacher's; nothing where they are equal."""
    torch = extras.require("torch")
    if ours == theirs:
        return torch.nn.Identity()
    projection = torch.nn.Linear(ours, theirs, bias=False)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.orthogonal_(projection.weight, generator=generator)
    return projection


@functools.cache
def _objectives_class() -> Any:
    torch = extras.require("torch")

    class Objectives(torch.nn.Module):  # type: ignore[misc, name-defined]
        """See the module, and :func:`build_objectives`."""

        def __init__(self, watched: Sequence[Watched], plan: Plan) -> None:
            super().__init__()
            student, teacher = watched[0], (watched[1] if len(watched) > 1 else None)
            self.student = student.module
            self.projections = torch.nn.ModuleDict(
                {
                    name: _projection(*pair, seed=_SEED + index)
                    for index, (name, pair) in enumerate(plan.widths.items())
                }
            )
            # Plain objects, so that the teacher is no submodule.
            self._watched, self._teacher, self._plan = student, teacher, plan
            if teacher is not None:
                teacher.module.eval()

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Part]:
            ours = self._watched.run(batch, through=self.student)
            theirs = self._taught(batch)
            device = next(iter(batch.values())).device
            # Losses are small differences of large numbers: no half precision for them.
            with torch.autocast(device_type=device.type, enabled=False):
                return self._parts(ours, theirs, batch)

        def _taught(self, batch: dict[str, Tensor]) -> Run | None:
            if self._teacher is None:
                return None
            device = next(iter(batch.values())).device
            if device_of(self._teacher.module, batch=batch) != device:
                self._teacher.module.to(device)
            with torch.no_grad():
                return self._teacher.run(batch)

        def _parts(
            self, ours: Run, theirs: Run | None, batch: dict[str, Tensor]
        ) -> dict[str, Part]:
            settings, kind = self._plan.settings, self._plan.kind
            parts: dict[str, Part] = {}
            if settings.task > 0:
                parts["task"] = task_loss(kind, outputs=ours.outputs, batch=batch)
            if theirs is None:
                return parts
            if settings.logits > 0:
                parts["logits"] = _outputs_part(ours, theirs, plan=self._plan, batch=batch)
            if settings.hidden > 0:
                parts["hidden"] = self._hidden(ours, theirs, batch)
            if settings.attention > 0:
                parts["attention"] = _attention_part(ours, theirs, plan=self._plan, batch=batch)
            if settings.features > 0:
                pairs = zip(ours.features, theirs.features, strict=True)
                parts["features"] = added([map_divergence(a, b) for a, b in pairs])
            return parts

        def _hidden(self, ours: Run, theirs: Run, batch: dict[str, Tensor]) -> Part:
            found = []
            for i, j in self._plan.hidden:
                projection = self.projections[pair_name(i, j)]
                dtype = getattr(getattr(projection, "weight", None), "dtype", torch.float32)
                state = projection(ours.states[i].to(dtype))
                found.append(
                    vector_error(state.float(), theirs.states[j].float(), mask=batch.get(MASK))
                )
            return added(found)

        def close(self) -> None:
            """Take the hooks off both models, and compute attention as before."""
            self._watched.close()
            if self._teacher is not None:
                self._teacher.close()

        def extra_repr(self) -> str:
            return ", ".join(
                f"{f.name}={getattr(self._plan.settings, f.name)}"
                for f in fields(self._plan.settings)
            )

    return Objectives


def _outputs_part(ours: Run, theirs: Run, *, plan: Plan, batch: Mapping[str, Tensor]) -> Part:
    """The distance of the first outputs."""
    our, their = (next(iter(run.outputs.values())) for run in (ours, theirs))
    if plan.kind == "regression":
        return value_error(our.float(), their.float())
    if plan.kind == "embedding":
        return vector_error(our.float(), their.float(), mask=batch.get(MASK))
    counted = None if plan.kind == "classification" else _counted(plan.kind, our, batch)
    temperature = plan.settings.temperature
    return class_divergence(our, their, temperature=temperature, counted=counted)


def _counted(kind: Kind, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Bool [batch, n]: tokens with a label; without labels, those that are no padding."""
    labels = labels_of(kind, batch=batch)
    if labels is not None:
        return (labels != IGNORED).reshape(output.shape[:-1])
    mask = batch.get(MASK)
    return None if mask is None or mask.shape != output.shape[:-1] else mask != 0


def _attention_part(ours: Run, theirs: Run, *, plan: Plan, batch: Mapping[str, Tensor]) -> Part:
    mask = batch.get(MASK)
    return added(
        [
            attention_divergence(ours.maps[i - 1], theirs.maps[j - 1], mask=mask)
            for i, j in plan.attention
        ]
    )
