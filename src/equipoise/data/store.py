"""Rows of named arrays on disk, of any shape from row to row, read one at a time.

Every stage after data preparation reads its samples from here, so that none needs a tokenizer or
an image library, and memory stays at one row whatever the number of rows.

    rows.json            names, dtypes, ranks, number of rows
    <i>.bin              all values of array i, row after row
    <i>.shapes.npy       int64 [rows, rank]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from equipoise import fs, record
from equipoise.errors import DataError
from equipoise.spec import Array, describe


@dataclass(frozen=True, kw_only=True)
class Column:
    """One named array of every row."""

    name: str
    dtype: str
    rank: int


@dataclass(frozen=True, kw_only=True)
class RowsHeader:
    """What ``rows.json`` says."""

    columns: tuple[Column, ...]
    rows: int


def write_rows(directory: Path, rows: Iterable[Mapping[str, Array]]) -> RowsHeader:
    """Write rows to ``directory``, one at a time.

    Args:
        directory: A directory to make or fill.
        rows: Each row a mapping of name to array; names, dtypes and ranks equal in all rows.

    Raises:
        DataError: No rows, or a row that differs from the first in names, dtypes or ranks.
        OutputError: The directory cannot be written.
    """
    fs.make_directory(directory)
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        raise DataError("there is no sample at all: the data is empty")
    columns = tuple(Column(name=n, dtype=str(a.dtype), rank=a.ndim) for n, a in first.items())
    shapes: list[list[tuple[int, ...]]] = [[] for _ in columns]
    with ExitStack() as stack:
        files = [
            stack.enter_context(fs.appending(directory / f"{i}.bin")) for i in range(len(columns))
        ]
        for index, row in enumerate(_chain(first, iterator)):
            _check_row(row, columns, index=index)
            for column, file, seen in zip(columns, files, shapes, strict=True):
                file.write(np.ascontiguousarray(row[column.name]).tobytes())
                seen.append(row[column.name].shape)
    header = RowsHeader(columns=columns, rows=len(shapes[0]))
    _write_shapes(directory, header, shapes)
    fs.write_json(directory / "rows.json", header)
    return header


def _chain(
    first: Mapping[str, Array], rest: Iterator[Mapping[str, Array]]
) -> Iterator[Mapping[str, Array]]:
    yield first
    yield from rest


def _write_shapes(directory: Path, header: RowsHeader, shapes: list[list[tuple[int, ...]]]) -> None:
    for i, column in enumerate(header.columns):
        array = np.array(shapes[i], dtype=np.int64).reshape(header.rows, column.rank)
        with fs.replacing(directory / f"{i}.shapes.npy") as path, path.open("wb") as file:
            np.save(file, array)


def _check_row(row: Mapping[str, Array], columns: tuple[Column, ...], *, index: int) -> None:
    if set(row) != {c.name for c in columns}:
        raise DataError(
            f"sample {index} has {sorted(row)}; sample 0 has {sorted(c.name for c in columns)}"
        )
    for column in columns:
        array = row[column.name]
        if str(array.dtype) != column.dtype or array.ndim != column.rank:
            raise DataError(
                f"sample {index}: {column.name!r} is {describe(array)}; in sample 0 it is"
                f" {column.dtype} with {column.rank} dimensions"
            )


class Rows(Sequence[dict[str, Array]]):
    """Rows written by :func:`write_rows`, read on demand. A slice of them is read at once.

    Raises:
        DataError: A file is missing, or is not what ``rows.json`` says; names it.
    """

    def __init__(self, directory: Path) -> None:
        text = fs.read_text(directory / "rows.json", error=DataError)
        where = str(directory / "rows.json")
        self.header = record.loads(RowsHeader, text, where=where, error=DataError)
        columns = list(enumerate(self.header.columns))
        self._dtypes = [_dtype_of(column, where=where) for _, column in columns]
        self._shapes = [
            _read_shapes(directory / f"{i}.shapes.npy", (self.header.rows, column.rank))
            for i, column in columns
        ]
        self._values = [directory / f"{i}.bin" for i, _ in columns]
        self._starts = [_offsets(shapes) for shapes in self._shapes]
        for file, starts, dtype in zip(self._values, self._starts, self._dtypes, strict=True):
            _check_size(file, int(starts[-1]) * dtype.itemsize)

    def __len__(self) -> int:
        return self.header.rows

    @overload
    def __getitem__(self, index: int) -> dict[str, Array]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Array]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Array] | list[dict[str, Array]]:
        """Row ``index`` as new arrays, or the rows of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {c.name: self._array(i, index) for i, c in enumerate(self.header.columns)}

    def _array(self, column: int, index: int) -> Array:
        start, end = self._starts[column][index : index + 2].tolist()
        dtype = self._dtypes[column]
        # Pages of a memory map would count as memory of this process, row after row.
        values = np.fromfile(
            self._values[column], dtype=dtype, count=end - start, offset=start * dtype.itemsize
        )
        return values.reshape(tuple(self._shapes[column][index].tolist()))

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return (self[i] for i in range(len(self)))

    def shapes(self, name: str) -> Array:
        """int64 [rows, rank]: the shape of ``name`` in every row."""
        index = [c.name for c in self.header.columns].index(name)
        shapes: Array = self._shapes[index]
        return shapes


def _dtype_of(column: Column, *, where: str) -> np.dtype[Any]:
    """The type of the values of ``column``: numbers, and nothing that would be unpickled."""
    try:
        dtype = np.dtype(column.dtype)
    except TypeError as error:
        raise DataError(
            f"{where}: {column.name!r} has the type {column.dtype!r}: {error}"
        ) from error
    if dtype.kind not in "biuf" or column.rank < 0:
        raise DataError(
            f"{where}: {column.name!r} is {column.dtype} with {column.rank} dimensions; numbers are"
            " needed"
        )
    return dtype


def _read_shapes(file: Path, expected: tuple[int, int]) -> Array:
    """int64 [rows, rank] from ``file``, no number of them negative."""
    try:
        shapes: Array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} holds no shapes: {error}") from error
    if shapes.shape != expected or shapes.dtype != np.int64 or (shapes < 0).any():
        raise DataError(f"{file} holds {describe(shapes)}; int64{list(expected)} is needed")
    return shapes


def _offsets(shapes: Array) -> Array:
    sizes = np.prod(shapes, axis=1, dtype=np.int64)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def _check_size(file: Path, expected: int) -> None:
    held = file.stat().st_size if file.is_file() else 0
    if held != expected:
        raise DataError(f"{file} has {held} bytes; its shapes take {expected}")


def equal_shapes(rows: Rows, *, most: int) -> list[int]:
    """Indices of up to ``most`` rows of the commonest shape, in order."""
    shapes = np.concatenate([rows.shapes(c.name) for c in rows.header.columns], axis=1)
    _, group, counts = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
    members = np.flatnonzero(group.ravel() == counts.argmax())
    indices: list[int] = members[:most].tolist()
    return indices


def stack(rows: Rows, indices: Sequence[int]) -> dict[str, Array]:
    """Rows of equal shape as one batch, joined along the first axis."""
    chosen = [rows[i] for i in indices]
    return {name: np.concatenate([row[name] for row in chosen]) for name in chosen[0]}
