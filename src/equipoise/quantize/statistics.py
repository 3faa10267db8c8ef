"""What calibration knows of the activations of a model, in memory and on disk.

Extremes, histograms, channels, and all but the channels once more at half of the samples.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from equipoise import fs
from equipoise.errors import DataError
from equipoise.quantize.histogram import Histogram
from equipoise.spec import Array

MASK_MAGNITUDE: Final = 1e9
"""No trained activation is as large; attention masks (-1e9, -3.4e38, -inf) are."""

_STATISTICS: Final = "statistics.npz"
_NUMBERS: Final = ("low", "high", "moving_low", "moving_high")
_COUNTS: Final = ("count", "masked")
_CHANNEL: Final = ("low", "high")
_NO_AXIS: Final = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelStatistics:
    """What each channel of an activation did.

    Attributes:
        axis: Axis that counts channels.
        low: float64 ``[channels]``, least value.
        high: float64 ``[channels]``, largest value.
    """

    axis: int
    low: Array
    high: Array

    @property
    def magnitude(self) -> Array:
        """float64 ``[channels]``: largest absolute value of each."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorStatistics:
    """What the values of one activation did, mask constants apart.

    All figures leave out infinities, NaNs and magnitudes from ``MASK_MAGNITUDE`` on.

    Attributes:
        low: Least value; 0 when there was none.
        high: Largest value; 0 when there was none.
        moving_low: Moving average of the least value of each sample.
        moving_high: Moving average of the largest value of each sample.
        count: Number of values.
        masked: Number of values left out.
        histogram: Of an even share of the values of each sample; its grid holds both extremes.
        channels: None where the tensor has no axis of channels of one size in all samples.
    """

    low: float
    high: float
    moving_low: float
    moving_high: float
    count: int
    masked: int
    histogram: Histogram
    channels: ChannelStatistics | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What calibration left.

    Attributes:
        tensors: Activation -> its statistics over all samples.
        half: The same over the first ``half_samples``, without channels; for ``convergence``.
        samples: Number of samples.
        half_samples: Number of samples behind ``half``; 0 when there was one sample alone.
    """

    tensors: dict[str, TensorStatistics]
    half: dict[str, TensorStatistics]
    samples: int
    half_samples: int


def read_statistics(directory: Path) -> Statistics:
    """The statistics that calibration left in ``directory``.

    Raises:
        DataError: There are none, or they are not ours.
    """
    path = directory / _STATISTICS
    try:
        with np.load(path, allow_pickle=False) as file:
            return _unpacked({name: file[name] for name in file.files})
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}", hint="Calibrate the model first.") from error
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no calibration statistics: {error}") from error


def write_statistics(directory: Path, statistics: Statistics) -> None:
    """Write ``statistics`` to ``directory``.

    Raises:
        OutputError: It cannot be written.
    """
    with fs.replacing(directory / _STATISTICS) as path, path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **_packed(statistics))


def _packed(statistics: Statistics) -> dict[str, Array]:
    """One array per figure, over all tensors: names of tensors are data here, never keys."""
    return {
        "samples": np.array([statistics.samples, statistics.half_samples]),
        **_columns(statistics.tensors, prefix="all"),
        **_columns(statistics.half, prefix="half"),
        **_channel_columns(statistics.tensors),
    }


def _columns(tensors: Mapping[str, TensorStatistics], *, prefix: str) -> dict[str, Array]:
    found = list(tensors.values())
    columns = {
        "names": np.array(list(tensors), dtype=np.str_),
        "first": np.array([t.histogram.first for t in found], dtype=np.int64),
        "exponent": np.array([t.histogram.exponent for t in found], dtype=np.int64),
        "bins": np.array([len(t.histogram.counts) for t in found], dtype=np.int64),
        "counts": _joined([t.histogram.counts for t in found], dtype=np.int64),
        **{n: np.array([getattr(t, n) for t in found], dtype=np.float64) for n in _NUMBERS},
        **{n: np.array([getattr(t, n) for t in found], dtype=np.int64) for n in _COUNTS},
    }
    return {f"{prefix}.{name}": column for name, column in columns.items()}


def _channel_columns(tensors: Mapping[str, TensorStatistics]) -> dict[str, Array]:
    present = [t.channels for t in tensors.values()]
    some = [channels for channels in present if channels is not None]
    return {
        "channels.axis": np.array([_NO_AXIS if c is None else c.axis for c in present], np.int64),
        "channels.sizes": np.array([0 if c is None else len(c.low) for c in present], np.int64),
        **{
            f"channels.{name}": _joined([getattr(c, name) for c in some], dtype=np.float64)
            for name in _CHANNEL
        },
    }


def _joined(arrays: list[Array], *, dtype: type) -> Array:
    return np.concatenate([np.zeros(0, dtype=dtype), *arrays]).astype(dtype)


def _split(joined: Array, sizes: Array) -> list[Array]:
    if int(sizes.sum()) != len(joined):
        raise ValueError(f"{len(joined)} values for sizes that add up to {sizes.sum()}")
    return np.split(joined, np.cumsum(sizes)[:-1]) if len(sizes) else []


def _unpacked(arrays: Mapping[str, Array]) -> Statistics:
    samples, half_samples = arrays["samples"].tolist()
    names = arrays["all.names"].tolist()
    channels = dict(zip(names, _channels(arrays), strict=True))
    return Statistics(
        tensors=_tensors(arrays, prefix="all", channels=channels),
        half=_tensors(arrays, prefix="half", channels={}),
        samples=samples,
        half_samples=half_samples,
    )


def _tensors(
    arrays: Mapping[str, Array], *, prefix: str, channels: Mapping[str, ChannelStatistics | None]
) -> dict[str, TensorStatistics]:
    columns = {n: arrays[f"{prefix}.{n}"].tolist() for n in (*_NUMBERS, *_COUNTS)}
    first, exponent = (arrays[f"{prefix}.{n}"].tolist() for n in ("first", "exponent"))
    counts = _split(arrays[f"{prefix}.counts"], arrays[f"{prefix}.bins"])
    return {
        name: TensorStatistics(
            histogram=Histogram(first=first[i], exponent=exponent[i], counts=counts[i]),
            channels=channels.get(name),
            **{column: values[i] for column, values in columns.items()},
        )
        for i, name in enumerate(arrays[f"{prefix}.names"].tolist())
    }


def _channels(arrays: Mapping[str, Array]) -> list[ChannelStatistics | None]:
    sizes = arrays["channels.sizes"]
    columns = {name: _split(arrays[f"channels.{name}"], sizes) for name in _CHANNEL}
    return [
        None
        if axis == _NO_AXIS
        else ChannelStatistics(axis=axis, **{name: parts[i] for name, parts in columns.items()})
        for i, axis in enumerate(arrays["channels.axis"].tolist())
    ]
