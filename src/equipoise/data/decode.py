"""Class scores to probabilities and words: what a model says, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import NonFiniteError
from equipoise.spec import Array

Probabilities = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One decision.

    Attributes:
        text: The word, or the whole text.
        label: Class name, or its number where there are no names.
        score: Softmax probability of the class.
    """

    text: str
    label: str
    score: float


def softmax(scores: Array) -> Probabilities:
    """Probabilities of classes that exclude each other, along the last axis; float64.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    exact = _finite(scores)
    powers = np.exp(exact - exact.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), dtype=np.float64)


def sigmoid(scores: Array) -> Probabilities:
    """Probability of each class by itself; float64.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    exact = _finite(scores)
    shrunk = np.exp(-np.abs(exact))  # never above 1, so that no score is too large for it
    return np.asarray(np.where(exact >= 0, 1.0, shrunk) / (1.0 + shrunk), dtype=np.float64)


def _finite(scores: Array) -> Probabilities:
    if not np.isfinite(scores).all():
        raise NonFiniteError(
            "the model's scores hold NaN or infinity",
            hint="Run the bundle's self-test on this device: equipoise run BUNDLE --selftest",
        )
    return scores.astype(np.float64)


def label_of(index: int, labels: Sequence[str]) -> str:
    """Name of a class; its number where it has none."""
    return labels[index] if index < len(labels) else str(index)


def decode(
    outputs: Mapping[str, Array],
    *,
    words: Sequence[str],
    first: Sequence[int | None],
    labels: Sequence[str],
) -> tuple[Decoded, ...]:
    """Decisions of a text classifier for one text.

    Args:
        outputs: The first output has scores [1, classes], or [1, tokens, classes].
        words: Words of the text.
        first: Per token, the index of the word that begins there; empty for a whole text.
        labels: Class names; may be empty.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    scores = next(iter(outputs.values()))[0]
    if not first:
        return (_decision(" ".join(words), scores, labels),)
    return tuple(
        _decision(words[word], scores[token], labels)
        for token, word in enumerate(first)
        if word is not None
    )


def _decision(text: str, scores: Array, labels: Sequence[str]) -> Decoded:
    probabilities = softmax(scores)
    best = int(probabilities.argmax())
    return Decoded(text=text, label=label_of(best, labels), score=float(probabilities[best]))
