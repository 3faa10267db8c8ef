"""Whether calibration saw what evaluation brings: values beyond the calibrated extremes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from equipoise.data.store import Rows
from equipoise.errors import RecipeError
from equipoise.quantize.observe import ObserveSettings, observe_rows
from equipoise.quantize.statistics import MASK_MAGNITUDE, Statistics, TensorStatistics
from equipoise.spec import Array

UNLIKE_SHARE: Final = 1e-3
"""Of data alike, fewer values than this lie beyond the extremes of even a few samples."""

_UNLIKE_VALUES: Final = 10
"""A value or two beyond the extremes are chance, however few values there are in all."""

_UNLIKE_TENSORS: Final = 0.05
_NAMED: Final = 3


@dataclass(frozen=True, kw_only=True)
class TensorCoverage:
    """How an activation kept within what calibration saw of it.

    Attributes:
        count: Number of values, mask constants apart.
        outside: Share of them beyond the calibrated extremes.
        reach: How far beyond, at the farthest, as a share of the calibrated range.
    """

    count: int
    outside: float
    reach: float


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How evaluation data kept within what calibration saw.

    Attributes:
        samples: Number of evaluation samples.
        tensors: Activation -> its coverage; the largest share outside first.
        unlike: Share of the activations that have more than a thousandth of their values outside.
        sentence: Whether the data are alike, in words.
    """

    samples: int
    tensors: dict[str, TensorCoverage]
    unlike: float
    sentence: str

    @property
    def alike(self) -> bool:
        """Whether the evaluation data is like the calibration data."""
        return self.unlike <= _UNLIKE_TENSORS


def measure_coverage(
    model: Path,
    samples: Path,
    *,
    statistics: Statistics,
    settings: ObserveSettings,
) -> Coverage:
    """Run the float model on evaluation samples and count what calibration had not seen.

    Args:
        model: The ONNX file that was calibrated.
        samples: Directory of evaluation inputs, written by ``data.store``.
        statistics: What calibration saw.
        settings: Threads, and how many activations at a time.

    Raises:
        RecipeError: Calibration saw no activation.
        SourceError: The model is no ONNX file, or lacks an activation that was calibrated.
        DataError: There are no samples.
        InputError: The samples do not fit the model.
    """
    counters = {name: _Counter(seen) for name, seen in statistics.tensors.items() if seen.count}
    if not counters:
        raise RecipeError("no activation was calibrated", hint="Calibrate the model first.")
    rows = Rows(samples)

    def receive(_: int, values: Mapping[str, Array]) -> None:
        for name, array in values.items():
            counters[name].add(array)

    observe_rows(model, rows, names=tuple(counters), receive=receive, settings=settings)
    return _coverage({name: counter.result() for name, counter in counters.items()}, len(rows))


class _Counter:
    """Counts the values of one activation within and beyond what calibration saw."""

    def __init__(self, seen: TensorStatistics) -> None:
        self._seen = seen
        self._low, self._high = seen.low, seen.high
        self._count, self._outside = 0, 0

    def add(self, array: Array) -> None:
        if not array.size:
            return
        low, high = float(array.min()), float(array.max())
        if not -MASK_MAGNITUDE < low <= high < MASK_MAGNITUDE:  # true for NaN too
            self.add(array[np.abs(array) < MASK_MAGNITUDE])
            return
        self._count += array.size
        if low < self._seen.low or high > self._seen.high:
            outside = (array < self._seen.low) | (array > self._seen.high)
            self._outside += int(np.count_nonzero(outside))
            self._low, self._high = min(self._low, low), max(self._high, high)

    def result(self) -> TensorCoverage:
        beyond = max(self._seen.low - self._low, self._high - self._seen.high)
        span = max(self._seen.high, 0.0) - min(self._seen.low, 0.0)
        return TensorCoverage(
            count=self._count,
            outside=self._outside / max(self._count, 1),
            reach=beyond / span if span else float(beyond > 0),
        )


def _coverage(tensors: dict[str, TensorCoverage], samples: int) -> Coverage:
    worst = dict(sorted(tensors.items(), key=lambda item: (-item[1].outside, -item[1].reach)))
    unlike = [name for name, tensor in worst.items() if _is_unlike(tensor)]
    return Coverage(
        samples=samples,
        tensors=worst,
        unlike=len(unlike) / len(worst),
        sentence=_sentence(worst, unlike),
    )


def _is_unlike(tensor: TensorCoverage) -> bool:
    many = tensor.outside * tensor.count >= _UNLIKE_VALUES
    return many and tensor.outside > UNLIKE_SHARE


def _sentence(worst: dict[str, TensorCoverage], unlike: list[str]) -> str:
    if len(unlike) <= _UNLIKE_TENSORS * len(worst):
        return (
            f"{1 - len(unlike) / len(worst):.0%} of the activations keep within what calibration"
            " saw: the evaluation data is like the calibration data"
        )
    shown = ", ".join(f"{name} {worst[name].outside:.1%}" for name in unlike[:_NAMED])
    return (
        f"the evaluation data is unlike the calibration data: {len(unlike)} of {len(worst)}"
        f" activations have values that calibration never saw ({shown})"
    )
