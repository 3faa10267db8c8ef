"""Rows on disk as padded batches, in an order that follows from a seed.

One order is for all processes: a *batch* is what one optimiser step learns from, and each process
takes its share of it, in as many *parts* as gradients are accumulated over. So any number of
processes sees the same batches.

Samples of near lengths share a batch, which wastes little on padding: samples are shuffled, sorted
by length within pools of several batches, and the batches are shuffled again. Within a batch
samples are dealt out, so that no process has all the long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from equipoise.data.store import Rows
from equipoise.data.text import IGNORED
from equipoise.errors import DataError
from equipoise.spec import Array

LABEL: Final = "label"
MASK: Final = "attention_mask"
_MOST_POOLED: Final = 50
_FEWEST_POOLS: Final = 4
"""As the sampler of transformers groups by length: at most 50 batches, at least 4 pools."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class _Column:
    """One named array of every sample, without the axis of length 1 in front.

    Attributes:
        values: All values, sample after sample, mapped into memory and read when they are used.
        starts: int64 [samples + 1]: where the values of a sample begin.
        shapes: int64 [samples, rank].
        ragged: Axes whose size differs between samples.
        padding: What fills a batch up.
    """

    values: Array
    starts: Array
    shapes: Array
    ragged: tuple[int, ...]
    padding: int

    def sample(self, index: int) -> Array:
        start, end = self.starts[index : index + 2].tolist()
        return self.values[start:end].reshape(self.shapes[index])

    def batch(self, indices: Array, *, more: int) -> Array:
        """[len(indices), ...]: samples padded to the largest and, where ragged, ``more``."""
        if not self.ragged:
            return self.values.reshape(self.shapes.shape[0], *self.shapes[0])[indices]
        size = self.shapes[indices].max(0)
        size[list(self.ragged)] += more
        padded = np.full((len(indices), *size), self.padding, dtype=self.values.dtype)
        for place, index in enumerate(indices.tolist()):
            sample = self.sample(index)
            padded[place][tuple(map(slice, sample.shape))] = sample
        return padded


class Samples:
    """Inputs and, where there are any, labels.

    Args:
        inputs: Directory of rows, each array with a first dimension of 1.
        names: Of the inputs that are used.
        labels: Directory of rows with ``label``: a scalar, or [n] or [1, n]; None for no labels.

    Raises:
        DataError: Rows are missing, an input is not among them, a first dimension is not 1, or
            there are not as many labels as samples.
    """

    def __init__(self, inputs: Path, *, names: tuple[str, ...], labels: Path | None) -> None:
        rows = Rows(inputs)
        known = [column.name for column in rows.header.columns]
        missing = [name for name in names if name not in known]
        if missing:
            raise DataError(f"{inputs} has no input {missing[0]!r}; it has {', '.join(known)}")
        self._columns = {name: _input(rows, inputs, name) for name in names}
        self._labels = None if labels is None else _labels(Rows(labels), labels, len(rows))
        self._count = len(rows)

    def __len__(self) -> int:
        return self._count

    @property
    def labelled(self) -> bool:
        """Whether there are labels."""
        return self._labels is not None

    @property
    def label_form(self) -> tuple[str, int]:
        """Dtype and rank of a sample's label; an empty dtype without labels."""
        if self._labels is None:
            return "", 0
        return str(self._labels.values.dtype), self._labels.shapes.shape[1]

    @property
    def ragged(self) -> dict[str, tuple[int, ...]]:
        """Input name -> axes of a sample whose size differs between samples."""
        return {name: column.ragged for name, column in self._columns.items() if column.ragged}

    @property
    def lengths(self) -> Array:
        """int64 [samples]: numbers in the inputs of each."""
        sizes = [np.diff(column.starts) for column in self._columns.values()]
        return np.asarray(np.sum(sizes, axis=0))

    def shapes(self, name: str) -> Array:
        """int64 [samples, rank]: the shape of an input, without the axis in front."""
        return self._columns[name].shapes

    def label(self, index: int) -> Array:
        """The label of one sample; an empty array without labels."""
        if self._labels is None:
            return np.empty(0, np.int64)
        return np.array(self._labels.sample(index))

    def batch(self, indices: Array, *, more: int = 0) -> dict[str, Array]:
        """Samples as one batch: inputs padded with 0, and ``label`` padded with -100.

        A model without ``attention_mask`` sees the padding.

        Args:
            indices: int64 [b], at least one.
            more: So many places of padding more than needed on every ragged axis.
        """
        batch = {name: column.batch(indices, more=more) for name, column in self._columns.items()}
        if self._labels is not None:
            batch[LABEL] = self._labels.batch(indices, more=more)
        return batch


def _input(rows: Rows, directory: Path, name: str) -> _Column:
    shapes = rows.shapes(name)
    if not shapes.shape[1] or (shapes[:, 0] != 1).any():
        raise DataError(f"{directory}: {name!r} needs a first dimension of 1, one sample a row")
    return _column(rows, directory, name, shapes=shapes[:, 1:], padding=0)


def _labels(rows: Rows, directory: Path, samples: int) -> _Column:
    if LABEL not in {column.name for column in rows.header.columns}:
        raise DataError(f"{directory} has no array {LABEL!r}")
    if len(rows) != samples:
        raise DataError(f"{directory} has {len(rows)} labels; there are {samples} samples")
    shapes = rows.shapes(LABEL)
    # A label of one row may be [1, n]; one of a regression to one number is [1] and stays it.
    inner = shapes[:, 1:] if shapes.shape[1] > 1 and (shapes[:, 0] == 1).all() else shapes
    return _column(rows, directory, LABEL, shapes=inner, padding=IGNORED)


def _column(rows: Rows, directory: Path, name: str, *, shapes: Array, padding: int) -> _Column:
    """A column by the form on disk that ``data/store.py`` states; Rows has checked the sizes.

    Mapped, so that processes share one copy and data may be larger than memory.
    """
    index = [column.name for column in rows.header.columns].index(name)
    starts = np.concatenate([[0], np.cumsum(np.prod(shapes, axis=1, dtype=np.int64))])
    dtype = np.dtype(rows.header.columns[index].dtype)
    values: Array = np.empty(0, dtype)
    if starts[-1]:
        values = np.memmap(directory / f"{index}.bin", dtype=dtype, mode="r").view(np.ndarray)
    ragged = tuple(np.flatnonzero((shapes != shapes[:1]).any(0)).tolist())
    return _Column(values=values, starts=starts, shapes=shapes, ragged=ragged, padding=padding)


def batches_of(lengths: Array, *, batch_size: int, seed: int, epoch: int) -> list[Array]:
    """The batches of one epoch: every sample once, in an order of ``seed`` and ``epoch``.

    As few batches as ``batch_size`` allows, of sizes that differ by one at most: a last batch of a
    few samples would weigh as much as a whole one.

    Args:
        lengths: int64 [samples].
        batch_size: Most samples of a batch.
        seed: Any number from 0.
        epoch: From 0.
    """
    random = np.random.default_rng([seed, epoch])
    count = number_of_batches(len(lengths), batch_size=batch_size)
    order = random.permutation(len(lengths))
    edges = np.linspace(0, len(lengths), count + 1).astype(np.int64)
    pool = min(max(count // _FEWEST_POOLS, 1), _MOST_POOLED)
    for first in range(0, count, pool):
        span = slice(edges[first], edges[min(first + pool, count)])
        order[span] = order[span][np.argsort(lengths[order[span]], kind="stable")]
    batches = np.split(order, edges[1:-1])
    return [batches[i] for i in random.permutation(count)]


def number_of_batches(samples: int, *, batch_size: int) -> int:
    """Batches of one epoch."""
    return -(-samples // batch_size)


def share(batch: Array, *, rank: int, world: int, parts: int) -> list[Array]:
    """What one of ``world`` processes takes of a batch, in ``parts``; some may be empty."""
    return np.array_split(batch[rank::world], parts)


def ahead(make: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``make`` of each item, the next one made in a thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[R] | None = None
        for item in items:
            following = pool.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
