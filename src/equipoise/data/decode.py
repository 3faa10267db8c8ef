"""Class scores to probabilities and words: what a model says, for people."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import NonFiniteError
from equipoise.spec import Array

Probabilities = NDArray[np.float64]


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
