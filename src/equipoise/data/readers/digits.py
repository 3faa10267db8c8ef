"""Handwritten digits: 1,797 real 8x8 images inside scikit-learn (UCI Optical Recognition)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.data.config import DataConfig
from equipoise.data.readers.base import DataSet, Sample
from equipoise.spec import Array

_LARGEST_PIXEL: Final = 16.0


def load() -> tuple[Array, Array]:
    """``(images float32 [1797, 1, 8, 8] in 0..1, labels int64 [1797])``."""
    datasets: Any = extras.require("sklearn.datasets")
    digits = datasets.load_digits()
    images = (digits.images / _LARGEST_PIXEL).astype(np.float32)[:, None]
    return images, digits.target.astype(np.int64)


def split(labels: Array, *, seed: int = 0) -> tuple[Array, Array]:
    """``(train, held out)`` indices: half and half, each class alike."""
    generator = np.random.default_rng(seed)
    train, held_out = [], []
    for digit in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == digit))
        train.append(members[: len(members) // 2])
        held_out.append(members[len(members) // 2 :])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))


def read(path: Path | None, *, config: DataConfig) -> DataSet:  # noqa: ARG001
    """Evaluation on the held-out half, calibration on the half that training may use."""
    images, labels = load()
    train, held_out = split(labels)

    def samples(indices: Array) -> list[Sample]:
        return [Sample(feeds={"image": images[i : i + 1]}, label=labels[i]) for i in indices]

    return DataSet(
        evaluation=samples(held_out),
        calibration=samples(train),
        labels=tuple(str(digit) for digit in range(10)),
        training=samples(train),
    )
