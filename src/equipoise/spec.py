"""What a tensor looks like: name, dtype, shape with named dynamic dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import InputError

Array = NDArray[Any]
Feeds = Mapping[str, Array]
"""Named arrays that go into a model, batch dimension first."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: Tensor name, as in the ONNX graph.
        dtype: NumPy name of the element type, such as ``float32``.
        shape: Sizes; a string is a dynamic dimension, and equal strings are equal sizes.
            Example: ``("batch", 3, 224, 224)``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


def describe(array: Array) -> str:
    """``float32[1, 8, 8]`` for messages."""
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"


def cosine(left: Array, right: Array) -> float:
    """Cosine between two flattened arrays; 1 for two zero arrays, 0 when one is zero or NaN."""
    a, b = left.ravel(), right.ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norm == 0.0:
        return float(not a.any() and not b.any())
    value = float(np.dot(a, b)) / norm
    return value if math.isfinite(value) else 0.0


def check_feeds(feeds: Feeds, specs: Sequence[TensorSpec]) -> None:
    """Check that ``feeds`` fit ``specs``: names, dtypes, ranks, fixed and shared dimensions.

    Raises:
        InputError: Names the tensor, what was given and what is allowed.
    """
    _check_names(feeds, [spec.name for spec in specs])
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        array = feeds[spec.name]
        if not isinstance(array, np.ndarray):
            raise InputError(f"input {spec.name!r} is {type(array).__name__}, not a NumPy array")
        if array.dtype != np.dtype(spec.dtype) or array.ndim != len(spec.shape):
            raise InputError(f"input {spec.name!r} is {describe(array)}; the model takes {spec}")
        _check_dimensions(array, spec, sizes)


def _check_names(feeds: Feeds, names: Iterable[str]) -> None:
    wanted, given = set(names), set(feeds)
    if wanted != given:
        missing = ", ".join(sorted(wanted - given)) or "none"
        extra = ", ".join(sorted(given - wanted)) or "none"
        raise InputError(
            f"inputs do not fit the model: missing {missing}; unknown {extra}",
            hint=f"The model takes: {', '.join(sorted(wanted))}.",
        )


def _check_dimensions(array: Array, spec: TensorSpec, sizes: dict[str, tuple[int, str]]) -> None:
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(dim, int):
            allowed, why = dim, f"axis {axis} has to be {dim}"
        else:
            allowed, source = sizes.setdefault(dim, (size, spec.name))
            why = f"{dim!r} is {allowed} in input {source!r}"
        if size != allowed:
            raise InputError(
                f"input {spec.name!r} is {describe(array)}; the model takes {spec}, and {why}"
            )


def ones(
    specs: Sequence[TensorSpec], *, sizes: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """An array of ones for each spec.

    Args:
        specs: The inputs of a model.
        sizes: Dynamic dimension -> size; 16 for a sequence and 1 for any other when not given.
    """
    known = sizes or {}
    return {
        spec.name: np.ones([_size(dim, known) for dim in spec.shape], dtype=spec.dtype)
        for spec in specs
    }


def _size(dim: int | str, known: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    return known.get(dim, 16 if "seq" in dim.lower() else 1)
