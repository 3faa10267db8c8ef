"""Which samples train, which decide while training, and which judge in the end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise.data.config import DataConfig
from equipoise.data.readers.base import DataSet, Sample, read
from equipoise.errors import DataError

_LEAST: Final = 5
_SHARE: Final = 10
"""A tenth decides, and where one file holds everything another tenth judges."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Samples that do not overlap.

    Attributes:
        training: What the weights are fitted to.
        validation: What early stopping, hyper-parameters and pruning steps are decided by.
        evaluation: What the result is judged by, once.
        warnings: What the user should know.
    """

    training: Sequence[Sample]
    validation: Sequence[Sample]
    evaluation: Sequence[Sample]
    warnings: tuple[str, ...] = ()


def training_parts(found: DataSet, config: DataConfig) -> Parts:
    """The three parts of what was read, the training and validation data that were named included.

    Data in one piece is cut at random into eight tenths, one and one.

    Raises:
        DataError: Too few samples, or no such data.
    """
    evaluation = found.evaluation
    training: Sequence[Sample] = found.training
    if config.train is not None:
        training = read(config.train, config=config).evaluation
    if not training:
        aside, training = _set_aside(evaluation, config, most=len(evaluation))
        evaluation = Chosen(evaluation, aside)
    training, validation = _validation(training, found, config)
    if config.training_samples is not None:
        training = drawn(training, config.training_samples, seed=config.seed)
    leaked = _leaked(training, evaluation)
    return Parts(training=training, validation=validation, evaluation=evaluation, warnings=leaked)


def _validation(
    training: Sequence[Sample], found: DataSet, config: DataConfig
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    if config.validation is not None:
        named = read(config.validation, config=config).evaluation
        return training, drawn(named, config.validation_samples, seed=config.seed)
    if found.validation and config.train is None:
        return training, drawn(found.validation, config.validation_samples, seed=config.seed)
    aside, rest = _set_aside(training, config, most=config.validation_samples)
    return rest, Chosen(training, aside)


def _set_aside(
    samples: Sequence[Sample], config: DataConfig, *, most: int
) -> tuple[list[int], Sequence[Sample]]:
    """Indices of a random tenth, and the samples without it."""
    if len(samples) < _LEAST:
        raise DataError(
            f"{config.train or config.data} has {len(samples)} samples: too few to train on and to"
            f" set some aside; at least {_LEAST} are needed",
            hint="Give training data of its own with --train.",
        )
    order = np.random.default_rng(config.seed).permutation(len(samples))
    count = max(1, min(most, len(samples) // _SHARE))
    aside, rest = sorted(order[:count].tolist()), sorted(order[count:].tolist())
    return aside, Chosen(samples, rest)


def drawn(samples: Sequence[Sample], count: int, *, seed: int) -> Sequence[Sample]:
    """``count`` of the samples, drawn at random, in their order; all where there are no more."""
    if len(samples) <= count:
        return samples
    order = np.random.default_rng(seed).permutation(len(samples))
    return Chosen(samples, sorted(order[:count].tolist()))


class Chosen(Sequence[Sample]):
    """Some of the samples, each read when it is asked for."""

    def __init__(self, samples: Sequence[Sample], indices: Sequence[int]) -> None:
        self._samples, self._indices = samples, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._indices[index]
        return Chosen(self._samples, chosen) if isinstance(index, slice) else self._samples[chosen]


def _leaked(training: Sequence[Sample], evaluation: Sequence[Sample]) -> tuple[str, ...]:
    """A warning when samples to judge by were trained on."""
    seen = {_digest(sample) for sample in training}
    count = sum(_digest(sample) in seen for sample in evaluation)
    if not count:
        return ()
    words = (
        f"{count} of {len(evaluation)} evaluation samples are among the training samples too: the"
        " metric flatters the trained model"
    )
    return (words,)


def _digest(sample: Sample) -> bytes:
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(sample.feeds):
        whole.update(name.encode() + repr(sample.feeds[name].shape).encode())
        whole.update(np.ascontiguousarray(sample.feeds[name]).tobytes())
    return whole.digest()
