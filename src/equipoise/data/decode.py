"""Class scores to words: what a text model says, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.spec import Array


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
    """
    scores = next(iter(outputs.values()))[0].astype(np.float64)
    if not first:
        return (_decision(" ".join(words), scores, labels),)
    return tuple(
        _decision(words[word], scores[token], labels)
        for token, word in enumerate(first)
        if word is not None
    )


def _decision(text: str, scores: Array, labels: Sequence[str]) -> Decoded:
    probabilities = np.exp(scores - scores.max())
    best = int(scores.argmax())
    label = labels[best] if best < len(labels) else str(best)
    return Decoded(text=text, label=label, score=float(probabilities[best] / probabilities.sum()))
