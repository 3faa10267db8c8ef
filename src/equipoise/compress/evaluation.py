"""The metric of a model in training, on the validation samples, in batches.

Samples are padded to a batch and every output is cut back to the sample it belongs to, so that the
metric sees what it would see of each sample alone. Which axes have to be cut is found by running
one sample with and without a place of padding. Where padding is not masked, or an output does not
follow it place by place, only samples of one shape share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise import extras
from equipoise.compress.batches import MASK, Samples
from equipoise.compress.distributed import placed
from equipoise.data.metrics import Metric, Outputs
from equipoise.spec import Array

Run = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Takes a batch of tensors; gives output tensors by name."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """An axis of an output that is as long as an axis of an input.

    Attributes:
        axis: Of the output, after the one of the batch.
        name: Of the input.
        along: Axis of a sample of it.
    """

    axis: int
    name: str
    along: int


class Validator:
    """Evaluates models on samples, together with the other processes.

    Args:
        samples: The validation samples.
        metric: The task metric.
        batch_size: Samples per batch of one process.
        rank: Of this process.
        world: Processes.
        device: Where tensors go.
        reference: Runs the teacher, for a metric that compares with it; None gives no reference.
    """

    def __init__(  # noqa: PLR0913  what is evaluated, by what, and by whom
        self,
        samples: Samples,
        *,
        metric: Metric,
        batch_size: int,
        rank: int,
        world: int,
        device: Any,
        reference: Run | None,
    ) -> None:
        self._samples, self._metric, self._reference = samples, metric, reference
        self._batch_size, self._rank, self._world = batch_size, rank, world
        self._device = device
        self._cuts: dict[str, tuple[Cut, ...]] | None = None

    def evaluate(self, run: Run, *, summed: Callable[[Any], Any]) -> float:
        """The metric of what ``run`` gives; NaN where outputs are.

        Args:
            run: The model, ready to evaluate; every process calls it equally often.
            summed: Sums a tensor over the processes.

        Raises:
            DataError: Labels do not fit the outputs.
        """
        torch = extras.require("torch")
        with torch.no_grad():
            cuts = self._found_cuts(run)
            totals = sum(self._statistics(run, cuts))
            tensor = torch.as_tensor(totals, dtype=torch.float64).to(self._device)
            counted = summed(tensor).cpu().numpy()
        return float(self._metric.value(counted))

    def _statistics(self, run: Run, cuts: Mapping[str, tuple[Cut, ...]]) -> Iterator[Array]:
        """Summed statistics of each batch that falls to this process."""
        batches = self._batches()
        for first in range(0, len(batches), self._world):
            mine = first + self._rank
            # Processes without a batch run the first again, because the others wait for them.
            indices = batches[mine if mine < len(batches) else 0]
            batch = self._tensors(self._samples.batch(indices))
            outputs = _arrays(run(batch))
            reference = {} if self._reference is None else _arrays(self._reference(batch))
            statistics = [
                self._metric.statistics(
                    self._of(outputs, place, index, cuts),
                    self._samples.label(index),
                    self._of(reference, place, index, cuts),
                )
                for place, index in enumerate(indices.tolist())
            ]
            yield np.sum(statistics, axis=0) * (mine < len(batches))

    def _batches(self) -> list[Array]:
        """Index arrays of all batches, samples of near lengths together."""
        if self._alone:
            shapes = np.concatenate([self._samples.shapes(n) for n in self._samples.ragged], axis=1)
            group = np.unique(shapes, axis=0, return_inverse=True)[1].ravel()
        else:
            group = np.zeros(len(self._samples), np.int64)
        order = np.lexsort((self._samples.lengths, group))
        borders = np.flatnonzero(np.diff(group[order])) + 1
        return [
            part[first : first + self._batch_size]
            for part in np.split(order, borders)
            for first in range(0, len(part), self._batch_size)
        ]

    @property
    def _alone(self) -> bool:
        """Whether only samples of one shape may share a batch."""
        return bool(self._samples.ragged) and not self._cuts

    def _found_cuts(self, run: Run) -> Mapping[str, tuple[Cut, ...]]:
        if self._cuts is None:
            masked = self._samples.ragged and MASK in self._samples.ragged
            self._cuts = self._probe(run) if masked else {}
        return self._cuts

    def _probe(self, run: Run) -> dict[str, tuple[Cut, ...]]:
        """Axes of outputs that grow with padding; none at all when one cannot be cut back."""
        shortest = np.array([int(self._samples.lengths.argmin())])
        plain, padded = (
            {
                name: value.shape[1:]
                for name, value in run(
                    self._tensors(self._samples.batch(shortest, more=more))
                ).items()
            }
            for more in (0, 1)
        )
        lengths = [
            (int(self._samples.shapes(name)[shortest[0], axis]), name, axis)
            for name, axes in self._samples.ragged.items()
            for axis in axes
        ]
        cuts: dict[str, tuple[Cut, ...]] = {}
        for name, shape in plain.items():
            grown = [a for a, size in enumerate(shape) if padded[name][a] != size]
            found = [
                next((Cut(axis=a, name=n, along=at) for size, n, at in lengths if size == shape[a]
                      and padded[name][a] == size + 1), None)
                for a in grown
            ]  # fmt: skip
            if None in found:
                return {}
            cuts[name] = tuple(cut for cut in found if cut is not None)
        return cuts

    def _of(
        self, outputs: Outputs, place: int, index: int, cuts: Mapping[str, tuple[Cut, ...]]
    ) -> Outputs:
        """The outputs of one sample of a batch, with a first axis of 1, without its padding."""
        found = {}
        for name, array in outputs.items():
            cut = [slice(place, place + 1), *[slice(None)] * (array.ndim - 1)]
            for axis in cuts.get(name, ()):
                length = int(self._samples.shapes(axis.name)[index, axis.along])
                cut[axis.axis + 1] = slice(length)
            found[name] = array[tuple(cut)]
        return found

    def _tensors(self, batch: Mapping[str, Array]) -> dict[str, Any]:
        return placed(batch, device=self._device)


def _arrays(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Outputs as arrays, floating ones in float32."""
    torch = extras.require("torch")
    found = {}
    for name, value in outputs.items():
        half = value.dtype in {torch.bfloat16, torch.float16}
        found[name] = (value.float() if half else value).cpu().numpy()
    return found
