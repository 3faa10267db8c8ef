"""Batches: every sample once, padded as it should be, the same for any number of processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.compress.batches import Samples, ahead, batches_of, number_of_batches, share
from equipoise.data.store import write_rows
from equipoise.errors import DataError

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=200).map(np.array)


@given(lengths, st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_sample_once_in_batches_of_near_sizes(
    lengths: Any, batch_size: int, seed: int, epoch: int
) -> None:
    """As few batches as possible, none larger than asked for, sizes at most one apart."""
    batches = batches_of(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == number_of_batches(len(lengths), batch_size=batch_size)
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_processes_and_parts_share_out_a_batch_whole(size: int, world: int, parts: int) -> None:
    """Nothing is lost, nothing twice, and each process makes as many parts."""
    batch = np.random.default_rng(size).permutation(size)
    shares = [share(batch, rank=rank, world=world, parts=parts) for rank in range(world)]
    assert {len(mine) for mine in shares} == {parts}
    assert sorted(np.concatenate([p for mine in shares for p in mine])) == sorted(batch)


def test_the_order_follows_from_seed_and_epoch() -> None:
    """The same again for both the same, another for either changed."""
    sizes = np.random.default_rng(0).integers(1, 30, 200)

    def order(seed: int, epoch: int) -> list[int]:
        batches = batches_of(sizes, batch_size=8, seed=seed, epoch=epoch)
        return np.concatenate(batches).tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_near_lengths_share_a_batch_and_little_is_padded() -> None:
    """Under a fifth of the padding of batches at random; batches are not sorted themselves."""
    sizes = np.random.default_rng(0).integers(4, 100, 3200)
    batches = batches_of(sizes, batch_size=16, seed=0, epoch=0)

    def padding(batches: list[Any]) -> int:
        return sum(int((sizes[batch].max() - sizes[batch]).sum()) for batch in batches)

    at_random = np.array_split(np.random.default_rng(1).permutation(3200), 200)
    assert padding(batches) < 0.2 * padding(at_random)
    longest = np.array([sizes[batch].max() for batch in batches])
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.3


def test_samples_of_one_length_are_shuffled_plainly() -> None:
    """Equal lengths leave the order to chance: no batch is of neighbours."""
    batches = batches_of(np.ones(100, np.int64), batch_size=10, seed=0, epoch=0)
    assert all((np.diff(np.sort(batch)) > 1).any() for batch in batches)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three sentences of 2, 4 and 3 tokens, with a tag each and an embedding each."""
    sizes = (2, 4, 3)
    tokens = [np.arange(1, n + 1)[None] for n in sizes]
    write_rows(tmp_path / "inputs", [{"ids": t, "mask": np.ones_like(t)} for t in tokens])
    write_rows(tmp_path / "flat", [{"label": np.arange(n)} for n in sizes])
    write_rows(tmp_path / "row", [{"label": np.arange(n)[None]} for n in sizes])
    write_rows(tmp_path / "scalar", [{"label": np.array(n)} for n in sizes])
    write_rows(tmp_path / "vector", [{"label": np.full((1, 5), n, np.float32)} for n in sizes])
    return tmp_path


def samples(folder: Path, labels: str | None) -> Samples:
    place = None if labels is None else folder / labels
    return Samples(folder / "inputs", names=("ids", "mask"), labels=place)


@pytest.mark.parametrize("labels", ["flat", "row"])
def test_inputs_are_padded_with_0_and_labels_per_token_with_what_does_not_count(
    texts: Path, labels: str
) -> None:
    """To the longest of the batch, in the order that was asked for."""
    batch = samples(texts, labels).batch(np.array([2, 0]))
    assert batch["ids"].tolist() == [[1, 2, 3], [1, 2, 0]]
    assert batch["mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["label"].tolist() == [[0, 1, 2], [0, 1, -100]]


def test_labels_per_sample_are_stacked(texts: Path) -> None:
    """Scalars to [batch], rows of numbers to [batch, n]."""
    assert samples(texts, "scalar").batch(np.array([1, 0]))["label"].tolist() == [4, 2]
    vectors = samples(texts, "vector").batch(np.array([1, 2]))["label"]
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[4.0] * 5, [3.0] * 5]


def test_what_samples_say_of_themselves(texts: Path) -> None:
    """Number, ragged axes, lengths, and the form of labels."""
    tagged = samples(texts, "flat")
    assert len(tagged) == 3
    assert tagged.ragged == {"ids": (0,), "mask": (0,)}
    assert tagged.lengths.tolist() == [4, 8, 6]
    assert tagged.label_form == ("int64", 1)
    assert tagged.label(1).tolist() == [0, 1, 2, 3]
    plain = samples(texts, None)
    assert not plain.labelled
    assert plain.label_form == ("", 0)
    assert set(plain.batch(np.array([0]))) == {"ids", "mask"}


def test_places_of_padding_can_be_asked_for(texts: Path) -> None:
    """On ragged axes alone."""
    batch = samples(texts, "scalar").batch(np.array([0]), more=1)
    assert batch["ids"].tolist() == [[1, 2, 0]]
    assert batch["label"].tolist() == [2]


@settings(max_examples=25)
@given(shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=6))
def test_any_shapes_come_back_out_of_their_padding(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]]
) -> None:
    """Two ragged axes, empty ones too: the corner of each holds its sample, the rest is 0."""
    folder = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(len(shapes))
    rows = [{"x": random.normal(size=(1, *shape)).astype(np.float32)} for shape in shapes]
    write_rows(folder, rows)
    batch = Samples(folder, names=("x",), labels=None).batch(np.arange(len(shapes)))["x"]
    assert batch.shape[1:] == tuple(np.max(shapes, axis=0))
    for padded, row in zip(batch, rows, strict=True):
        corner = tuple(map(slice, row["x"].shape[1:]))
        assert np.array_equal(padded[corner], row["x"][0])
        assert np.count_nonzero(padded) == np.count_nonzero(row["x"])


def test_rows_that_are_no_samples_are_refused(texts: Path) -> None:
    """Each says what is wrong."""
    with pytest.raises(DataError, match="no input 'pixels'; it has ids, mask"):
        Samples(texts / "inputs", names=("pixels",), labels=None)
    with pytest.raises(DataError, match="no array 'label'"):
        Samples(texts / "inputs", names=("ids",), labels=texts / "inputs")
    write_rows(texts / "two", [{"ids": np.zeros((2, 3))}])
    with pytest.raises(DataError, match="'ids' needs a first dimension of 1"):
        Samples(texts / "two", names=("ids",), labels=None)
    write_rows(texts / "few", [{"label": np.array(0)}])
    with pytest.raises(DataError, match="1 labels; there are 3 samples"):
        samples(texts, "few")
    with pytest.raises(DataError, match="no such file"):
        Samples(texts / "nowhere", names=("ids",), labels=None)


def test_the_next_is_made_while_one_is_used() -> None:
    """One ahead, in order; an error comes out in its place."""
    made, event = [], threading.Event()

    def make(item: int) -> int:
        if item == 3:
            raise DataError("sample 3 is bad")
        made.append(item)
        if item == 1:
            event.set()
        return item * 10

    found: Iterator[int] = ahead(make, range(5))
    assert next(found) == 0
    assert event.wait(5), "the second is made before it is asked for"
    assert next(found) == 10
    assert next(found) == 20
    with pytest.raises(DataError, match="sample 3"):
        next(found)
    assert list(ahead(make, [])) == []
    assert list(ahead(make, [7])) == [70]
