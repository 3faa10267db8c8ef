"""Samples of equal shapes, run together where the model takes any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from equipoise.errors import BackendError
from equipoise.spec import Array, Feeds, TensorSpec, check_feeds

Run = Callable[[Feeds], dict[str, Array]]


def batch_dimension(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """The name of the dynamic dimension that every tensor has first; empty when there is none."""
    specs = (*inputs, *outputs)
    first = {spec.shape[0] if spec.shape else 0 for spec in specs}
    name = first.pop() if len(first) == 1 else 0
    elsewhere = any(name in spec.shape[1:] for spec in specs)
    return name if isinstance(name, str) and not elsewhere else ""


def run_together(
    feeds: Sequence[Feeds], *, inputs: Sequence[TensorSpec], run: Run, most: int
) -> list[dict[str, Array]]:
    """Run samples in groups of equal shapes; the answers are in the order of the samples.

    Args:
        feeds: Named arrays of each sample, batch dimension first.
        inputs: Specs of the inputs, which share a dynamic first dimension.
        run: Runs once.
        most: Rows of a group; a sample with more runs alone.

    Raises:
        InputError: A sample does not fit; nothing has been run then.
        BackendError: An output has another number of rows than the inputs.
    """
    for sample in feeds:
        check_feeds(sample, inputs)
    answers: dict[int, dict[str, Array]] = {}
    for group in _groups(feeds, inputs=inputs, most=most):
        answers |= dict(zip(group, _answers([feeds[i] for i in group], run), strict=True))
    return [answers[index] for index in range(len(feeds))]


def _groups(
    feeds: Sequence[Feeds], *, inputs: Sequence[TensorSpec], most: int
) -> Iterator[list[int]]:
    """Indices of samples whose shapes are equal but for their rows, at most ``most`` rows each."""
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, sample in enumerate(feeds):
        key = tuple(sample[spec.name].shape[1:] for spec in inputs)
        alike.setdefault(key, []).append(index)
    name = inputs[0].name
    for indices in alike.values():
        group: list[int] = []
        rows = 0
        for index in indices:
            own = len(feeds[index][name])
            if group and rows + own > most:
                yield group
                group, rows = [], 0
            group, rows = [*group, index], rows + own
        yield group


def _answers(samples: Sequence[Feeds], run: Run) -> Iterator[dict[str, Array]]:
    if len(samples) == 1:
        yield run(samples[0])
        return
    joined = {name: np.concatenate([s[name] for s in samples]) for name in samples[0]}
    rows = [len(next(iter(sample.values()))) for sample in samples]
    outputs, begin = run(joined), 0
    for name, array in outputs.items():
        if len(array) != sum(rows):
            raise BackendError(f"output {name!r} has {len(array)} rows for {sum(rows)} of inputs")
    for count in rows:
        # A copy: a view would keep the whole batch in memory for as long as one answer lives.
        yield {name: array[begin : begin + count].copy() for name, array in outputs.items()}
        begin += count
