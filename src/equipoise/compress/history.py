"""What has happened in a training, and where it stands."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from equipoise.compress.settings import Objective


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metric on the validation samples after so many steps."""

    step: int
    metric: float


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a training stands: the content of ``state.json``.

    Attributes:
        processes: How many train.
        losses: Of every step so far.
        parts: The same of each part of the loss, by name, not weighted.
        step_seconds: Time of every step.
        seconds: Of everything so far, evaluations and checkpoints included.
        evaluations: In order; the first before training.
        scaler: What Accelerate's gradient scaler keeps; empty unless in float16.
    """

    processes: int
    losses: tuple[float, ...] = ()
    parts: dict[str, tuple[float, ...]]
    step_seconds: tuple[float, ...] = ()
    seconds: float = 0.0
    evaluations: tuple[Evaluation, ...] = ()
    scaler: dict[str, int | float]

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def best(self) -> Evaluation:
        """The best evaluation; of equal ones the last, which has learned longest."""
        return max(self.evaluations, key=lambda found: (found.metric, found.step))


def stale(evaluations: Sequence[Evaluation]) -> int:
    """Evaluations since the metric last got better than ever before."""
    highest, since = -math.inf, 0
    for found in evaluations:
        since = 0 if found.metric > highest else since + 1
        highest = max(highest, found.metric)
    return since


class History:
    """What has happened, while it grows; :class:`Standing` is the same as it is kept."""

    def __init__(self, *, processes: int, objective: Objective) -> None:
        self._processes, self._objective = processes, objective
        self._losses: list[float] = []
        self._parts: dict[str, list[float]] = {}
        self.step_seconds: list[float] = []
        self.evaluations: list[Evaluation] = []
        self._begin = time.perf_counter()

    @property
    def step(self) -> int:
        """Steps that were taken up."""
        return len(self._losses)

    def add(self, parts: Mapping[str, float]) -> None:
        """The parts of the loss of one more step."""
        for name, value in parts.items():
            self._parts.setdefault(name, []).append(value)
        weighted = (getattr(self._objective, name) * value for name, value in parts.items())
        self._losses.append(sum(weighted))

    def restore(self, standing: Standing) -> None:
        """Begin where ``standing`` is."""
        self._losses = list(standing.losses)
        self._parts = {name: list(values) for name, values in standing.parts.items()}
        self.step_seconds = list(standing.step_seconds)
        self.evaluations = list(standing.evaluations)
        self._begin -= standing.seconds

    def standing(self, *, scaler: dict[str, int | float]) -> Standing:
        """What is kept."""
        return Standing(
            processes=self._processes,
            losses=tuple(self._losses),
            parts={name: tuple(values) for name, values in self._parts.items()},
            step_seconds=tuple(self.step_seconds),
            seconds=time.perf_counter() - self._begin,
            evaluations=tuple(self.evaluations),
            scaler=scaler,
        )
