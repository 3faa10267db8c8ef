"""Sizes to prove at, and feeds of those sizes out of real samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.parity.sizes import (
    dimension_names,
    feeds_of,
    in_words,
    natural_sizes,
    proving_sizes,
)
from equipoise.spec import TensorSpec

IDS = TensorSpec(name="ids", dtype="int64", shape=("batch", "sequence"))
IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, "height", "width"))
SHARED = TensorSpec(name="table", dtype="float32", shape=(4, "sequence"))


def test_names_come_in_order_and_once() -> None:
    """Equal names are one dimension."""
    assert dimension_names([IDS, IMAGE]) == ("batch", "sequence", "height", "width")


def test_proof_has_the_trace_batch_one_and_every_dimension_alone() -> None:
    """At least three combinations of sizes, the traced one first, one change at a time."""
    found = proving_sizes(("batch", "sequence"), {"batch": 1, "sequence": 16})
    assert found == (
        {"batch": 2, "sequence": 16},
        {"batch": 1, "sequence": 16},
        {"batch": 3, "sequence": 12},
        {"batch": 2, "sequence": 8},
    )
    assert proving_sizes((), {}) == ({},)
    assert [s["batch"] for s in proving_sizes(("batch",), {"batch": 1})] == [2, 1, 3]


def test_rows_are_joined_cropped_and_repeated() -> None:
    """A batch takes turns through the rows; a longer size repeats what is there."""
    rows = [{"ids": np.arange(4)[None]}, {"ids": np.arange(10, 16)[None]}]
    assert feeds_of(rows, [IDS], {"batch": 2, "sequence": 3})["ids"].tolist() == [
        [0, 1, 2], [10, 11, 12],
    ]  # fmt: skip
    longer = feeds_of(rows, [IDS], {"batch": 1, "sequence": 6})["ids"]
    assert longer.tolist() == [[0, 1, 2, 3, 0, 1]]


def test_rows_of_unlike_lengths_join_at_the_length_of_the_first() -> None:
    """A batch needs one length even where none was asked for."""
    rows = [{"ids": np.arange(4)[None]}, {"ids": np.arange(10, 16)[None]}]
    assert feeds_of(rows, [IDS], {"batch": 2})["ids"].shape == (2, 4)


def test_inputs_without_a_batch_are_not_joined() -> None:
    """A table that all samples share stays one table."""
    rows = [{"ids": np.zeros((1, 4)), "table": np.ones((4, 4))}] * 2
    found = feeds_of(rows, [IDS, SHARED], {"batch": 2, "sequence": 2})
    assert (found["ids"].shape, found["table"].shape) == ((2, 2), (4, 2))


@given(
    batch=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9),
    own=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)  # fmt: skip
def test_feeds_have_the_sizes_asked_for(
    batch: int, height: int, width: int, own: tuple[int, int]
) -> None:
    """Whatever the rows and the sizes; every value comes out of a row."""
    row = {"image": np.arange(3 * own[0] * own[1], dtype=np.float32).reshape(1, 3, *own)}
    sizes = {"batch": batch, "height": height, "width": width}
    found = feeds_of([row], [IMAGE], sizes)["image"]
    assert found.shape == (batch, 3, height, width)
    assert natural_sizes([IMAGE], {"image": found}) == sizes
    assert set(found.ravel()) <= set(row["image"].ravel())


def test_samples_of_another_rank_are_refused() -> None:
    """The spec and the names there are in the message."""
    with pytest.raises(InputError, match=r"image: float32.*ids"):
        natural_sizes([IMAGE], {"ids": np.zeros((1, 2))})


def test_sizes_in_words() -> None:
    """For messages and tables."""
    assert in_words({"batch": 3, "sequence": 12}) == "batch 3, sequence 12"
    assert in_words({}) == "the only size"
