"""Rows on disk: what is written comes back, of any shape, one row in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.data.store import Rows, equal_shapes, stack, write_rows
from equipoise.errors import DataError

Row = dict[str, np.ndarray]


@st.composite
def row_lists(draw: st.DrawFn) -> list[Row]:
    """Rows with equal names, dtypes and ranks, and any shapes."""
    names = draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3, unique=True))
    forms = {
        name: (
            draw(st.sampled_from(["float32", "int64", "uint8", "bool", "float16"])),
            draw(st.integers(0, 3)),
        )
        for name in names
    }
    return [
        {
            name: draw(
                hnp.arrays(dtype, draw(st.tuples(*[st.integers(0, 3)] * rank)) if rank else ())
            )
            for name, (dtype, rank) in forms.items()
        }
        for _ in range(draw(st.integers(1, 5)))
    ]


@given(rows=row_lists())
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=60,
    deadline=None,
)
def test_rows_come_back_as_written(tmp_path: Path, rows: list[Row]) -> None:
    """Names, order, dtypes, shapes and values, empty and zero-dimensional arrays included."""
    header = write_rows(tmp_path, rows)
    found = Rows(tmp_path)
    assert header == found.header
    assert len(found) == len(rows)
    for written, read in zip(rows, found, strict=True):
        assert list(read) == list(written)
        for name, array in written.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)


def test_a_row_is_a_copy(tmp_path: Path) -> None:
    """Changing it changes neither the file nor the next reading."""
    write_rows(tmp_path, [{"x": np.arange(3)}])
    rows = Rows(tmp_path)
    rows[0]["x"][:] = 7
    np.testing.assert_array_equal(rows[0]["x"], np.arange(3))


def test_strided_rows_are_written_in_order(tmp_path: Path) -> None:
    """A view of every other value, and a transposed array."""
    x = np.arange(12).reshape(3, 4)
    write_rows(tmp_path, [{"x": x.T}, {"x": x[::2, ::2]}])
    rows = Rows(tmp_path)
    np.testing.assert_array_equal(rows[0]["x"], x.T)
    np.testing.assert_array_equal(rows[1]["x"], x[::2, ::2])


def test_rows_may_be_read_from_an_iterator_once(tmp_path: Path) -> None:
    """A generator is enough."""
    write_rows(tmp_path, ({"x": np.full(i, i)} for i in range(4)))
    assert [row["x"].tolist() for row in Rows(tmp_path)] == [[], [1], [2, 2], [3, 3, 3]]


@pytest.mark.parametrize("index", [-1, 2, 100])
def test_a_row_that_does_not_exist_is_an_index_error(tmp_path: Path, index: int) -> None:
    """From either side."""
    write_rows(tmp_path, [{"x": np.zeros(1)}] * 2)
    with pytest.raises(IndexError):
        Rows(tmp_path)[index]


def test_no_rows_is_a_data_error(tmp_path: Path) -> None:
    """Said as what it is."""
    with pytest.raises(DataError, match="the data is empty"):
        write_rows(tmp_path / "rows", [])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"x": np.zeros(2)}, ["sample 1 has ['x']", "sample 0 has ['x', 'y']"]),
        ({"x": np.zeros(2), "z": np.zeros(1)}, ["sample 1 has ['x', 'z']"]),
        (
            {"x": np.zeros(2), "y": np.zeros(1, np.float32)},
            ["sample 1: 'y' is float32[1]", "float64"],
        ),
        ({"x": np.zeros((1, 2)), "y": np.zeros(1)}, ["sample 1: 'x' is float64[1, 2]", "1 dim"]),
    ],
)
def test_a_row_unlike_the_first_is_named(tmp_path: Path, row: Row, words: list[str]) -> None:
    """With its index, and nothing is left that reads as rows."""
    first = {"x": np.zeros(3), "y": np.zeros(1)}
    with pytest.raises(DataError) as caught:
        write_rows(tmp_path, [first, row])
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(DataError, match=r"no such file: .*rows\.json"):
        Rows(tmp_path)


def test_a_header_of_another_form_is_refused(tmp_path: Path) -> None:
    """The file is named."""
    write_rows(tmp_path, [{"x": np.zeros(1)}])
    (tmp_path / "rows.json").write_text(json.dumps({"rows": "many"}))
    with pytest.raises(DataError, match=r"rows\.json: RowsHeader: missing key 'columns'"):
        Rows(tmp_path)


@pytest.fixture
def mixed(tmp_path: Path) -> Rows:
    """Lengths 3, 5, 5, 3, 5, 7."""
    lengths = [3, 5, 5, 3, 5, 7]
    write_rows(
        tmp_path,
        ({"ids": np.full((1, n), i), "mask": np.ones((1, n))} for i, n in enumerate(lengths)),
    )
    return Rows(tmp_path)


@pytest.mark.parametrize(("most", "expected"), [(8, [1, 2, 4]), (2, [1, 2]), (1, [1])])
def test_rows_of_the_commonest_shape(mixed: Rows, most: int, expected: list[int]) -> None:
    """In order, up to so many."""
    assert equal_shapes(mixed, most=most) == expected


def test_shapes_of_a_column(mixed: Rows) -> None:
    """Of every row."""
    assert mixed.shapes("mask").tolist() == [[1, n] for n in (3, 5, 5, 3, 5, 7)]


def test_a_stack_joins_along_the_batch(mixed: Rows) -> None:
    """Rows of equal shape as one batch, in the order asked for."""
    batch = stack(mixed, [4, 1])
    assert batch["ids"].shape == (2, 5)
    assert batch["ids"][:, 0].tolist() == [4, 1]
    assert batch["mask"].shape == (2, 5)


MANY = """
import resource, sys
from pathlib import Path
import numpy as np
from equipoise.data.store import Rows, write_rows

row = np.ones((1, 250_000), dtype=np.float32)
write_rows(Path(sys.argv[1]), ({"x": row} for _ in range(2)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_rows(Path(sys.argv[1]), ({"x": row * i} for i in range(100)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_writing_holds_one_row_in_memory(tmp_path: Path) -> None:
    """A hundred rows of a megabyte each cost a few megabytes."""
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(child.stdout) < 20 * 1024
