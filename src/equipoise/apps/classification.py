"""What a classifier says of one input, and how its scores become that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from equipoise.data.decode import label_of, sigmoid, softmax
from equipoise.errors import NonFiniteError
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A class and how likely it is.

    Attributes:
        label: Its name; its number where the bundle names no classes.
        index: Its number.
        score: Its probability; the value itself of a model with one output.
    """

    label: str
    index: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Classification(Scored):
    """The likeliest class of an input, and all others.

    Attributes:
        scores: Of every class, by its number.
        labels: Names of the classes; may be empty.
    """

    scores: tuple[float, ...] = field(repr=False)
    labels: tuple[str, ...] = field(repr=False, default=())

    def top(self, count: int) -> tuple[Scored, ...]:
        """The ``count`` likeliest classes, the likeliest first; all where there are fewer."""
        order = sorted(range(len(self.scores)), key=lambda i: -self.scores[i])
        return tuple(self._scored(i) for i in order[:count])

    def above(self, threshold: float) -> tuple[Scored, ...]:
        """The classes whose score is at least ``threshold``, by number: answers of multi-label."""
        numbers = range(len(self.scores))
        return tuple(self._scored(i) for i in numbers if self.scores[i] >= threshold)

    def _scored(self, index: int) -> Scored:
        label = label_of(index, self.labels)
        return Scored(label=label, index=index, score=self.scores[index])


def classified(scores: Array, labels: Sequence[str], *, multi_label: bool) -> Classification:
    """Scores of one input as a decision.

    Args:
        scores: Logits [classes]; one alone is a value and stays as it is, unless ``multi_label``.
        labels: Class names; may be empty.
        multi_label: Classes do not exclude each other: sigmoid instead of softmax.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    if multi_label:
        found = sigmoid(scores)
    elif scores.size > 1:
        found = softmax(scores)
    else:
        found = _value(scores)
    best = int(found.argmax())
    return Classification(
        label=label_of(best, labels),
        index=best,
        score=float(found[best]),
        scores=tuple(found.tolist()),
        labels=tuple(labels),
    )


def _value(scores: Array) -> Array:
    if not np.isfinite(scores).all():
        raise NonFiniteError("the model's value is NaN or infinite")
    return scores.astype(np.float64)
