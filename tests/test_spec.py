"""Tensor specs, and the check that arrays fit them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.errors import InputError
from equipoise.spec import TensorSpec, check_feeds, cosine, describe

SPECS = (
    TensorSpec(name="ids", dtype="int64", shape=("batch", "length")),
    TensorSpec(name="mask", dtype="int64", shape=("batch", "length")),
    TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8)),
)
SIZES = st.fixed_dictionaries({"batch": st.integers(0, 4), "length": st.integers(0, 6)})


def fitting(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Arrays of zeros that fit SPECS."""
    return {
        s.name: np.zeros([d if isinstance(d, int) else sizes[d] for d in s.shape], dtype=s.dtype)
        for s in SPECS
    }


GOOD = fitting({"batch": 2, "length": 5})


def test_a_spec_reads_as_in_a_listing() -> None:
    """For messages and tables."""
    assert str(SPECS[2]) == "image: float32[batch, 3, 8]"
    assert describe(np.zeros((1, 2), dtype=np.int8)) == "int8[1, 2]"
    assert describe(np.float32(1).reshape(())) == "float32[]"


@given(sizes=SIZES)
def test_arrays_of_any_equal_sizes_fit(sizes: dict[str, int]) -> None:
    """Dynamic dimensions take any size, none included."""
    check_feeds(fitting(sizes), SPECS)


@given(sizes=SIZES, name=st.sampled_from([s.name for s in SPECS]), data=st.data())
def test_one_dimension_that_differs_is_refused(
    sizes: dict[str, int], name: str, data: st.DataObject
) -> None:
    """Every dimension here is fixed or shared, so a change of any is named with its tensor."""
    feeds = fitting(sizes)
    array = feeds[name]
    axis = data.draw(st.integers(0, array.ndim - 1))
    shape = list(array.shape)
    shape[axis] += 1
    feeds[name] = np.zeros(shape, dtype=array.dtype)
    with pytest.raises(InputError, match=r"input '(ids|mask|image)' is .*(has to be|in input)"):
        check_feeds(feeds, SPECS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": None}, ["missing ids", "unknown none"]),
        ({"extra": GOOD["ids"]}, ["missing none", "unknown extra"]),
        (
            {"mask": GOOD["mask"].astype(np.int32)},
            ["'mask'", "int32[2, 5]", "int64[batch, length]"],
        ),
        ({"mask": GOOD["mask"][0]}, ["'mask'", "int64[5]"]),
        ({"mask": GOOD["mask"][:, :4]}, ["'mask'", "'length' is 5 in input 'ids'"]),
        ({"image": GOOD["image"][:, :2]}, ["'image'", "float32[2, 2, 8]", "axis 1 has to be 3"]),
        ({"image": GOOD["image"][:1]}, ["'image'", "'batch' is 2 in input 'ids'"]),
        ({"image": [[0.0]]}, ["'image' is list, not a NumPy array"]),
        ({"image": 3.0}, ["'image' is float, not a NumPy array"]),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], words: list[str]) -> None:
    """The tensor, what was given and what is allowed."""
    feeds = {n: a for n, a in {**GOOD, **change}.items() if a is not None}
    with pytest.raises(InputError) as caught:
        check_feeds(feeds, SPECS)
    for word in words:
        assert word in str(caught.value)


def test_wrong_names_hint_at_the_right_ones() -> None:
    """All that the model takes, sorted."""
    with pytest.raises(InputError) as caught:
        check_feeds({}, SPECS)
    assert caught.value.hint == "The model takes: ids, image, mask."


def test_a_dimension_that_repeats_in_one_tensor_is_square() -> None:
    """Equal names are equal sizes inside a tensor too."""
    square = [TensorSpec(name="a", dtype="float32", shape=("n", "n"))]
    check_feeds({"a": np.zeros((2, 2), dtype=np.float32)}, square)
    with pytest.raises(InputError, match="'n' is 2"):
        check_feeds({"a": np.zeros((2, 3), dtype=np.float32)}, square)


vectors = hnp.arrays(
    np.float64, st.integers(1, 8), elements=st.floats(-1e6, 1e6).filter(lambda v: abs(v) > 1e-6)
)


@given(vector=vectors, scale=st.floats(1e-3, 1e3))
def test_cosine_does_not_see_scale(vector: np.ndarray, scale: float) -> None:
    """One with itself at any scale, minus one with its opposite."""
    assert cosine(vector, scale * vector) == pytest.approx(1.0)
    assert cosine(vector, -scale * vector) == pytest.approx(-1.0)


def test_cosine_at_its_edges() -> None:
    """Two zeros agree, one does not; NaN and infinity agree with nothing."""
    zero, one = np.zeros(3), np.array([1.0, 0.0, 0.0])
    assert cosine(zero, zero) == 1.0
    assert cosine(zero, one) == 0.0
    assert cosine(one, np.array([0.0, 1.0, 0.0])) == 0.0
    with np.errstate(invalid="ignore"):
        assert cosine(np.full(3, np.nan), one) == 0.0
        assert cosine(np.full(3, np.inf), one) == 0.0
    assert cosine(one.reshape(1, 3), one) == 1.0
