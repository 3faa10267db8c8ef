"""Named arrays in an ``.npz`` file: one of them the labels, every other an input."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Final

import numpy as np

from equipoise.data.config import DataConfig
from equipoise.data.readers.base import DataSet, Sample, label_indices
from equipoise.data.readers.values import as_values
from equipoise.errors import DataError
from equipoise.spec import Array, describe

_LABEL_NAMES: Final = ("label", "labels", "y")


def read(path: Path | None, *, config: DataConfig) -> DataSet:
    """Read ``path``; the first axis of every array counts samples.

    Labels are class numbers or names; or floats, for a model of values.

    Raises:
        DataError: No .npz file, no label array, no input, arrays of unequal or no length, values
            that are not numbers.
    """
    arrays = read_arrays(path)
    names = [name for name in _LABEL_NAMES if name in arrays]
    if not names and not config.labelled:
        arrays["label"] = _no_labels(arrays)
        names = ["label"]
    if len(names) != 1:
        raise DataError(
            f"{path}: needs exactly one label array, named label, labels or y; it has"
            f" {', '.join(arrays)}"
        )
    labels = _as_labels(arrays.pop(names[0]), config, where=f"{path}: {names[0]}")
    if not arrays:
        raise DataError(f"{path}: has labels but no input array")
    _check_lengths(arrays, labels, where=str(path))
    samples = [
        Sample(feeds={n: a[i : i + 1] for n, a in arrays.items()}, label=labels[i])
        for i in range(len(labels))
    ]
    return DataSet(evaluation=samples, labels=config.labels)


def _no_labels(arrays: dict[str, Array]) -> Array:
    sized = [len(array) for array in arrays.values() if array.ndim]
    return np.zeros(sized[0] if sized else 0, dtype=np.int64)


def read_arrays(path: Path | None) -> dict[str, Array]:
    """All arrays of an ``.npz`` file; pickled objects are refused.

    Raises:
        DataError: It is none, or an array holds no numbers.
    """
    try:
        _check_headers(str(path))
        with np.load(str(path), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except MemoryError:
        raise
    except Exception as error:  # numpy and zipfile raise eight unrelated types on damaged files
        raise DataError(
            f"{path} is no .npz file of plain arrays: {error}",
            hint="Write it with numpy.savez(path, image=..., label=...).",
        ) from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biufU":
            raise DataError(f"{path}: array {name!r} is {describe(array)}; numbers are needed")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"{path}: array {name!r} holds NaN or infinity")
    return {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays.items()}


def _check_headers(path: str) -> None:
    """Refuse a member whose header promises more than it holds, before anything is allocated."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(name=member) as file:
                major, _ = np.lib.format.read_magic(file)
                reader = {1: np.lib.format.read_array_header_1_0}.get(
                    major, np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = reader(file)
            promised = math.prod(shape) * dtype.itemsize
            if promised > member.file_size and not dtype.hasobject:
                raise ValueError(
                    f"{member.filename} promises {promised} bytes and holds {member.file_size}"
                )


def _as_labels(labels: Array, config: DataConfig, *, where: str) -> Array:
    if labels.dtype.kind == "U":
        return label_indices([str(name) for name in labels], config.labels, where=where)
    if labels.dtype.kind == "f" or (labels.dtype.kind in "iu" and len(config.labels) == 1):
        return as_values(labels, config.labels, where=where)
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where} is {describe(labels)}; numbers or names are needed")
    return labels.astype(np.int64)


def _check_lengths(arrays: dict[str, Array], labels: Array, *, where: str) -> None:
    if not labels.ndim or not len(labels):
        raise DataError(f"{where}: there is no sample at all: the label array is empty")
    for name, array in arrays.items():
        if array.dtype.kind == "U":
            raise DataError(f"{where}: input {name!r} holds text; numbers are needed")
        if not array.ndim or len(array) != len(labels):
            raise DataError(
                f"{where}: input {name!r} is {describe(array)}, but there are {len(labels)} labels"
            )
