"""Samples from a function of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise.data.config import DataConfig
from equipoise.data.readers.base import DataSet, Sample
from equipoise.data.readers.values import as_values
from equipoise.errors import DataError
from equipoise.spec import Array, describe

_LABEL: Final = "label"


def read(path: Path | None, *, config: DataConfig) -> DataSet:  # noqa: ARG001
    """Call ``python:MODULE:FUNCTION``; it gives mappings of input name to array, batch included.

    An entry ``label`` is the sample's label: whole numbers for classes, floats for values.

    Raises:
        DataError: There is no such function, it fails, or gives something else.
    """
    function = _function(config.data)
    try:
        rows = list(function())
    except DataError:
        raise
    except Exception as error:  # the user's code raises what it likes
        raise DataError(f"{config.data} failed: {type(error).__name__}: {error}") from error
    samples = [_sample(row, config, index=index) for index, row in enumerate(rows)]
    return DataSet(evaluation=samples, labels=config.labels)


def _function(data: str) -> Callable[[], Iterable[Any]]:
    _, _, place = data.partition(":")
    module, colon, name = place.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"{data}: there is no such function: {error}",
            hint="Say python:MODULE:FUNCTION, with a module that Python can import from here.",
        ) from error
    if not colon or not callable(function):
        raise DataError(f"{data} is no function")
    return function  # type: ignore[no-any-return]


def _sample(row: object, config: DataConfig, *, index: int) -> Sample:
    if not isinstance(row, Mapping) or not row:
        raise DataError(
            f"{config.data}, sample {index} is {type(row).__name__};"
            " a mapping of input name to array is needed"
        )
    arrays: dict[str, Array] = {str(name): np.asarray(value) for name, value in row.items()}
    label = arrays.pop(_LABEL, None)
    if label is None and config.labelled:
        raise DataError(f"{config.data}, sample {index}: there is no {_LABEL!r} in it")
    strange = [name for name, array in arrays.items() if array.dtype.kind not in "biuf"]
    if strange:
        raise DataError(f"{config.data}, sample {index}: {strange[0]!r} holds no numbers")
    where = f"{config.data}, sample {index}: {_LABEL!r}"
    return Sample(feeds=arrays, label=_label(label, config, where=where))


def _label(label: Array | None, config: DataConfig, *, where: str) -> Array:
    if label is None:
        return np.zeros((), dtype=np.int64)
    if label.dtype.kind == "f" or (label.dtype.kind in "iu" and len(config.labels) == 1):
        return as_values(label, config.labels, where=where)
    if label.dtype.kind not in "biu":
        raise DataError(f"{where} is {describe(label)}; numbers are needed")
    return label.astype(np.int64)
