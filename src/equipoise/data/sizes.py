"""The sizes that real inputs have, and ranges that share them evenly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from equipoise.spec import Feeds, TensorSpec

Range = tuple[int, int, int]
"""Least, usual and largest size."""


def observed_sizes(
    inputs: Sequence[TensorSpec], rows: Iterable[Feeds]
) -> dict[str, tuple[int, ...]]:
    """Dynamic dimension -> its size in each row.

    Args:
        inputs: Specs of the inputs.
        rows: Real inputs.
    """
    found: dict[str, list[int]] = {}
    for feeds in rows:
        sizes = {
            dim: size
            for spec in inputs
            for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
            if isinstance(dim, str)
        }
        for name, size in sizes.items():
            found.setdefault(name, []).append(size)
    return {name: tuple(values) for name, values in found.items()}


def size_buckets(
    observed: Mapping[str, Sequence[int]], *, count: int
) -> tuple[dict[str, Range], ...]:
    """So many ranges of each dimension that each holds as many of the observed sizes.

    Every range begins at the least size, so that what a small one refuses a larger one takes; it is
    fastest at the median of the sizes that it has more of than the range before. Equal ranges are
    one.

    Args:
        observed: Dimension -> sizes that were seen.
        count: Number of ranges at most.
    """
    ranges = [
        {name: _range(np.sort(sizes), index, count=count) for name, sizes in observed.items()}
        for index in range(count)
    ]
    return tuple(r for index, r in enumerate(ranges) if r not in ranges[:index])


def _range(ordered: np.ndarray, index: int, *, count: int) -> Range:
    last = -(-len(ordered) * (index + 1) // count) - 1
    first = -(-len(ordered) * index // count)
    usual = ordered[(first + last) // 2]
    return int(ordered[0]), int(usual), int(ordered[last])
