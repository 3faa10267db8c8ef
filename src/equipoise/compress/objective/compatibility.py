"""Whether a student can learn from a teacher, found out before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from equipoise.compress.objective.layers import unwrapped
from equipoise.compress.objective.task_losses import TOKENS, Kind, Tensor
from equipoise.compress.objective.watched import Run, Watched
from equipoise.errors import SourceError

_CHOOSE: Final = "Choose a teacher for the same task and classes, or change the student's head."


def check_vocabularies(student: Watched, *, teacher: Watched, batch: Mapping[str, Tensor]) -> None:
    """Both must read the same tokens.

    Raises:
        SourceError: Their vocabularies have different sizes.
    """
    ours, theirs = _vocabulary(student.module), _vocabulary(teacher.module)
    if TOKENS in batch and None not in {ours, theirs} and ours != theirs:
        raise SourceError(
            f"the vocabulary of {teacher.name} has {theirs} tokens, that of {student.name} {ours}:"
            " the same number is another word",
            hint="Distil before the vocabulary is trimmed, or choose a teacher of the same"
            " tokenizer.",
        )


def _vocabulary(module: Any) -> int | None:
    inner = unwrapped(module)
    getter = getattr(inner, "get_input_embeddings", None)
    try:
        embeddings = getter() if getter else None
    except NotImplementedError:  # transformers raises it for models without one table
        embeddings = None
    size = getattr(embeddings, "num_embeddings", None)
    return int(size) if size is not None else None


def check_labels(student: Watched, *, teacher: Watched) -> None:
    """Classes must have the same names in the same order, where both configs name them.

    Raises:
        SourceError: They do not.
    """
    ours, theirs = _labels(student.module), _labels(teacher.module)
    different = [i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]]
    if different:
        first = different[0]
        raise SourceError(
            f"class {first} is {theirs[first]!r} for {teacher.name}, and {ours[first]!r} for"
            f" {student.name}",
            hint="Make the student's id2label that of the teacher before training.",
        )


def _labels(module: Any) -> dict[int, str]:
    """Class names of a config; empty when it has only those that transformers makes up."""
    names = getattr(getattr(unwrapped(module), "config", None), "id2label", None) or {}
    by_index = {int(index): str(name) for index, name in names.items()}
    made_up = all(name == f"LABEL_{index}" for index, name in by_index.items())
    return {} if made_up else by_index


def check_outputs(runs: Sequence[Run], *, kind: Kind, student: Watched, teacher: Watched) -> None:
    """The first outputs must have one shape.

    Raises:
        SourceError: They differ.
    """
    (our_name, our), (their_name, their) = (next(iter(r.outputs.items())) for r in runs)
    if our.shape == their.shape:
        return
    if our.shape[:-1] == their.shape[:-1]:
        what = "values" if kind in {"regression", "embedding"} else "classes"
        raise SourceError(
            f"{teacher.name} has {their.shape[-1]} {what}, {student.name} {our.shape[-1]}",
            hint=_CHOOSE,
        )
    raise SourceError(
        f"output {their_name!r} of {teacher.name} is {list(their.shape)}, output {our_name!r} of"
        f" {student.name} {list(our.shape)}",
        hint=_CHOOSE,
    )


def check_inner(runs: Sequence[Run], *, student: Watched, teacher: Watched) -> None:
    """Hidden states and attention maps must be of the same positions.

    Raises:
        SourceError: They are not.
    """
    ours, theirs = runs
    pairs = (
        ("hidden states", ours.states, theirs.states, slice(0, 2)),
        ("attention maps", ours.maps, theirs.maps, slice(2, 4)),
    )
    for what, our, their, axes in pairs:
        shapes = {tuple(t.shape[axes]) for t in our}, {tuple(t.shape[axes]) for t in their}
        if shapes[0] != shapes[1] or len(shapes[0]) > 1:
            raise SourceError(
                f"{what} of {teacher.name} are at {sorted(shapes[1])}, those of {student.name} at"
                f" {sorted(shapes[0])} positions",
                hint="Both have to divide an input into the same positions, such as patches of one"
                " size; set that part of the objective to 0.",
            )
