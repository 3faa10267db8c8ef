"""Labels that are numbers to come near to, not classes: of regression, and target vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from equipoise.errors import DataError
from equipoise.spec import Array, describe


def takes_values(labels: Sequence[str]) -> bool:
    """Whether a model with these class names may be one of values.

    transformers gives a regressor a single class, and a model without a config has none.
    """
    return len(labels) < 2


def as_values(given: Any, labels: Sequence[str], *, where: str) -> Array:
    """Values as float32, as the model computes them.

    Args:
        given: Numbers, in whatever NumPy makes an array of.
        labels: Class names of the model.
        where: The place in the data, for messages.

    Raises:
        DataError: The model has classes, or these are no finite float32 numbers.
    """
    numbers = _numbers(given, where=where)
    if not takes_values(labels):
        raise DataError(
            f"{where} is {describe(numbers)}; the model has the classes {list(labels)}, so that"
            " whole numbers or names are needed",
        )
    with np.errstate(over="ignore"):
        values = numbers.astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{where} holds NaN, infinity, or a number beyond float32")
    return values


def _numbers(given: Any, *, where: str) -> Array:
    try:
        numbers = np.asarray(given)
    except ValueError as error:  # lists of unequal length
        raise DataError(f"{where} is no array of numbers: {error}") from error
    if numbers.dtype.kind not in "iuf":
        raise DataError(f"{where} is {str(given)[:60]!r}, which is no number")
    return numbers
