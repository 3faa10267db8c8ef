"""Sizes to prove an export at: which ones, and feeds of those sizes out of real samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from equipoise.errors import InputError
from equipoise.spec import Array, Feeds, TensorSpec

BATCH: Final = "batch"
_TRACE_BATCH: Final = 2
_THIRD_BATCH: Final = 3

Sizes = Mapping[str, int]
"""Named dimension -> size."""


def dimension_names(specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Names of the dynamic dimensions of ``specs``, in order."""
    return tuple(dict.fromkeys(dim for spec in specs for dim in spec.shape if isinstance(dim, str)))


def natural_sizes(specs: Sequence[TensorSpec], feeds: Feeds) -> dict[str, int]:
    """The size that each named dimension has in one sample.

    Raises:
        InputError: An input is missing, or has another rank than its spec.
    """
    sizes: dict[str, int] = {}
    for spec in specs:
        if spec.name not in feeds or feeds[spec.name].ndim != len(spec.shape):
            raise InputError(f"the samples do not fit {spec}; they have {sorted(feeds)}")
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
            if isinstance(dim, str):
                sizes.setdefault(dim, size)
    return sizes


def proving_sizes(names: Sequence[str], natural: Sizes) -> tuple[dict[str, int], ...]:
    """The sizes to prove: the traced one first, then ones that it was not traced at.

    Batch 1 with everything else as traced; each other dimension alone at half its size, so that a
    frozen one can be named; and batch 3 with all others at three quarters. torch.export takes
    sizes 0 and 1 for constants, so the trace has batch 2.

    Args:
        names: The dynamic dimensions.
        natural: Size of each in a real sample.
    """
    traced = {name: _TRACE_BATCH if name == BATCH else natural[name] for name in names}
    others = [name for name in names if name != BATCH]
    third = {name: _share(natural[name], 3) for name in others}
    found = [traced]
    if BATCH in names:
        found += [traced | {BATCH: 1}, traced | third | {BATCH: _THIRD_BATCH}]
    found += [traced | {name: _share(natural[name], 2)} for name in others]
    return tuple(dict(sizes) for sizes in dict.fromkeys(tuple(s.items()) for s in found))


def _share(size: int, quarters: int) -> int:
    """So many quarters of ``size``, at least 2: a size of 1 is taken for broadcasting."""
    return max(2, size * quarters // 4)


def feeds_of(
    rows: Sequence[Feeds], specs: Sequence[TensorSpec], sizes: Sizes, *, start: int = 0
) -> dict[str, Array]:
    """Feeds of the given sizes out of samples of batch 1: joined, cropped or repeated.

    Args:
        rows: Samples of batch 1; they take turns.
        specs: The inputs.
        sizes: Size of each named dimension; one that is not named keeps its own.
        start: Index of the first row.
    """
    count = sizes.get(BATCH, 1)
    chosen = [rows[(start + i) % len(rows)] for i in range(count)]
    return {spec.name: _joined(spec, [row[spec.name] for row in chosen], sizes) for spec in specs}


def _joined(spec: TensorSpec, arrays: Sequence[Array], sizes: Sizes) -> Array:
    others = {name: size for name, size in sizes.items() if name != BATCH}
    first = _resized(spec, arrays[0], others)
    if BATCH not in spec.shape:
        return first
    axis = spec.shape.index(BATCH)
    shared = {name: first.shape[i] for i, name in enumerate(spec.shape) if isinstance(name, str)}
    alike = [_resized(spec, array, shared | {BATCH: array.shape[axis]}) for array in arrays]
    return np.concatenate(alike, axis=axis)


def _resized(spec: TensorSpec, array: Array, sizes: Sizes) -> Array:
    for axis, dim in enumerate(spec.shape):
        wanted = sizes.get(dim, array.shape[axis]) if isinstance(dim, str) else dim
        if wanted != array.shape[axis]:
            array = np.take(array, np.arange(wanted) % array.shape[axis], axis=axis)
    return array


def in_words(sizes: Sizes) -> str:
    """``batch 3, sequence 12``; ``the only size`` without dynamic dimensions."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "the only size"
