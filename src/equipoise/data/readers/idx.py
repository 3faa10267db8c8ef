"""The idx files of MNIST and its kin: pictures and classes in two parts, gzipped or not.

A header of big-endian numbers (0, 0, type, rank; one size per axis), then the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Final

import numpy as np

from equipoise.data.config import DataConfig
from equipoise.data.readers.base import DataSet, Sample
from equipoise.errors import DataError
from equipoise.spec import Array, describe

_UNSIGNED_BYTE: Final = 8
_LARGEST: Final = 255.0
_TRAINING, _EVALUATION = "train", "t10k"


def read(path: Path | None, *, config: DataConfig) -> DataSet:
    """Read a directory with ``t10k-*`` to evaluate on and, where it has them, ``train-*`` files.

    Pictures become float32 [1, 1, height, width] in 0..1, under the name ``config.input_name``, or
    ``image``.

    Raises:
        DataError: A file is missing, is no idx file of bytes, or there are not as many classes as
            pictures.
    """
    place = path or Path()
    name = config.input_name or "image"
    training = _part(place, _TRAINING, name=name) if _found(place, _TRAINING, "images") else []
    evaluation = _part(place, _EVALUATION, name=name)
    return DataSet(
        evaluation=evaluation, calibration=training, labels=config.labels, training=training
    )


def _part(place: Path, part: str, *, name: str) -> list[Sample]:
    images = _values(_file(place, part, "images"), rank=3)
    labels = _values(_file(place, part, "labels"), rank=1).astype(np.int64)
    if len(images) != len(labels):
        raise DataError(f"{place}: {part} has {len(images)} pictures and {len(labels)} classes")
    pictures = (images.astype(np.float32) / np.float32(_LARGEST))[:, None]
    return [Sample(feeds={name: pictures[i : i + 1]}, label=labels[i]) for i in range(len(labels))]


def _found(place: Path, part: str, what: str) -> Path | None:
    rank = {"images": 3, "labels": 1}[what]
    names = (f"{part}-{what}-idx{rank}-ubyte{end}" for end in (".gz", ""))
    return next((place / name for name in names if (place / name).is_file()), None)


def _file(place: Path, part: str, what: str) -> Path:
    found = _found(place, part, what)
    if found is None:
        raise DataError(
            f"{place} has no {part}-{what}-idx*-ubyte.gz",
            hint="Give the directory that holds t10k-images-idx3-ubyte.gz and its kin.",
        )
    return found


def _values(file: Path, *, rank: int) -> Array:
    """uint8 of ``rank`` axes."""
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    start = 4 * (rank + 1)
    header = np.frombuffer(data[: len(data[:start]) // 4 * 4], dtype=">u4")
    if len(header) != rank + 1 or header[0] != (_UNSIGNED_BYTE << 8) + rank:
        raise DataError(f"{file} is no idx file of bytes with {rank} axes")
    shape = tuple(int(size) for size in header[1:])
    values = np.frombuffer(data, dtype=np.uint8, offset=start)
    if values.size != math.prod(shape) or not values.size:
        raise DataError(f"{file} promises {list(shape)}, but holds {describe(values)}")
    return values.reshape(shape)
