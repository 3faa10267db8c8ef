"""Sizes of real inputs, and ranges that share them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from equipoise.data.sizes import observed_sizes, size_buckets
from equipoise.spec import TensorSpec

INPUTS = (
    TensorSpec(name="ids", dtype="int64", shape=("batch", "sequence")),
    TensorSpec(name="mask", dtype="int64", shape=("batch", "sequence")),
    TensorSpec(name="fixed", dtype="float32", shape=(1, 3)),
)


def test_sizes_are_those_of_the_rows() -> None:
    """Of each dynamic dimension, once for each row."""
    rows = [
        {"ids": np.zeros((1, n)), "mask": np.zeros((1, n)), "fixed": np.zeros((1, 3))}
        for n in (5, 9, 7)
    ]
    assert observed_sizes(INPUTS, rows) == {"batch": (1, 1, 1), "sequence": (5, 9, 7)}


def test_buckets_share_the_sizes_evenly() -> None:
    """A third of the sizes more in each; equal ranges are one."""
    found = size_buckets({"sequence": range(1, 301), "batch": [1] * 300}, count=3)
    assert [bucket["sequence"] for bucket in found] == [(1, 50, 100), (1, 150, 200), (1, 250, 300)]
    assert {bucket["batch"] for bucket in found} == {(1, 1, 1)}
    assert size_buckets({"sequence": [7] * 10}, count=4) == ({"sequence": (7, 7, 7)},)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=50), st.integers(1, 6))
def test_the_last_bucket_takes_every_size(sizes: list[int], count: int) -> None:
    """And each is least <= usual <= largest, one above the other."""
    found = [bucket["n"] for bucket in size_buckets({"n": sizes}, count=count)]
    assert found[-1][2] == max(sizes)
    assert all(least == min(sizes) and least <= usual <= most for least, usual, most in found)
    assert [r[2] for r in found] == sorted(r[2] for r in found)


def test_no_rows_are_no_buckets() -> None:
    """A fixed model has no dimension to share."""
    assert observed_sizes(INPUTS[2:], [{"fixed": np.zeros((1, 3))}]) == {}
    assert size_buckets({}, count=3) == ({},)
