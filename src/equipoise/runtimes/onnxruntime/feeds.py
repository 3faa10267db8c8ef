"""Whether feeds fit, said fast: three layers run in less time than a full check takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from equipoise.spec import Array, Feeds, TensorSpec

_BINDING_BYTES: Final = 256 << 10
"""Binding buffers takes 3 microseconds more than a run; copying as many bytes takes that too."""


def dimensions_of(specs: Sequence[TensorSpec]) -> dict[str, tuple[str, int]]:
    """Dynamic dimension -> the first input and its axis that has this size."""
    found: dict[str, tuple[str, int]] = {}
    for spec in specs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                found.setdefault(dim, (spec.name, axis))
    return found


def fast_check(specs: Sequence[TensorSpec]) -> Callable[[Feeds], bool]:
    """What :func:`equipoise.spec.check_feeds` asks, prepared once.

    Returns:
        A function that says whether feeds certainly fit; if not, a full check says what is wrong,
        if anything is.
    """
    count = len(specs)
    forms = tuple(_form(spec) for spec in specs)
    single = tuple(fixed for spec in specs for fixed in _leading(spec))
    shared = _shared(specs)
    ndarray = np.ndarray

    def fit(feeds: Feeds) -> bool:
        if len(feeds) != count:
            return False
        for name, dtype, rank, start, trailing in forms:
            array = feeds.get(name)
            if type(array) is not ndarray or array.dtype != dtype or array.ndim != rank:
                return False
            if trailing and array.shape[start:] != trailing:
                return False
        for name, axis, size in single:
            if feeds[name].shape[axis] != size:
                return False
        for name, axis, other, place in shared:
            if feeds[name].shape[axis] != feeds[other].shape[place]:
                return False
        return True

    return fit


def _start(spec: TensorSpec) -> int:
    """The axis behind the last dynamic one."""
    return max((axis + 1 for axis, dim in enumerate(spec.shape) if isinstance(dim, str)), default=0)


def _form(spec: TensorSpec) -> tuple[str, Any, int, int, tuple[int | str, ...]]:
    """Name, type, rank, and the fixed dimensions at the end with their first axis."""
    start = _start(spec)
    return spec.name, numpy_dtype(spec.dtype), len(spec.shape), start, spec.shape[start:]


def _leading(spec: TensorSpec) -> tuple[tuple[str, int, int], ...]:
    """Fixed dimensions before a dynamic one: input, axis, size."""
    dims = enumerate(spec.shape[: _start(spec)])
    return tuple((spec.name, axis, dim) for axis, dim in dims if isinstance(dim, int))


def _shared(specs: Sequence[TensorSpec]) -> tuple[tuple[str, int, str, int], ...]:
    """Input and axis, and the input and axis with the same dynamic dimension before."""
    first = dimensions_of(specs)
    return tuple(
        (spec.name, axis, *first[dim])
        for spec in specs
        for axis, dim in enumerate(spec.shape)
        if isinstance(dim, str) and first[dim] != (spec.name, axis)
    )


def numpy_dtype(name: str) -> Any:
    """The NumPy type called ``name``; None when NumPy has no such type."""
    try:
        return np.dtype(name)
    except TypeError:
        return None


class Buffers:
    """Which buffers of a caller an output can be computed into, without a copy.

    Args:
        outputs: The outputs of a model.
        dimensions: Dynamic dimension -> an input and its axis that has this size.
    """

    def __init__(
        self, outputs: Sequence[TensorSpec], dimensions: Mapping[str, tuple[str, int]]
    ) -> None:
        self._outputs = {spec.name: spec for spec in outputs}
        self._dimensions = dimensions

    def take(self, out: Mapping[str, Array], feeds: Feeds) -> bool:
        """Whether every buffer surely fits, and together they are large enough to be worth it."""
        size = 0
        for buffer in out.values():
            size += buffer.nbytes
        return size >= _BINDING_BYTES and all(
            name in self._outputs and self._fits(buffer, self._outputs[name], feeds)
            for name, buffer in out.items()
        )

    def _fits(self, buffer: Array, spec: TensorSpec, feeds: Feeds) -> bool:
        if buffer.dtype != numpy_dtype(spec.dtype) or len(spec.shape) != buffer.ndim:
            return False
        if not (buffer.flags.c_contiguous and buffer.flags.writeable and buffer.flags.aligned):
            return False
        pairs = zip(buffer.shape, spec.shape, strict=True)
        return all(self._is(size, dim, feeds) for size, dim in pairs)

    def _is(self, size: int, dim: int | str, feeds: Feeds) -> bool:
        if isinstance(dim, int):
            return size == dim
        if dim not in self._dimensions:
            return False
        name, axis = self._dimensions[dim]
        known: int = feeds[name].shape[axis]
        return known == size
