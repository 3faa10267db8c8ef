"""Samples to train on, to decide by and to judge by."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.data.config import DataConfig
from equipoise.data.parts import training_parts
from equipoise.data.prepare import prepare_data
from equipoise.data.readers.base import DataSet, Sample, read, split_form
from equipoise.data.store import Rows
from equipoise.errors import DataError


def samples(numbers: range) -> list[Sample]:
    return [
        Sample(feeds={"x": np.array([[float(i)]], np.float32)}, label=np.int64(i)) for i in numbers
    ]


def numbers(part) -> list[int]:
    return [int(sample.label) for sample in part]


@given(count=st.integers(10, 300), seed=st.integers(0, 9))
def test_data_in_one_piece_is_cut_into_parts_that_cover_it(count: int, seed: int) -> None:
    config = DataConfig(data="one", for_training=True, seed=seed)
    parts = training_parts(DataSet(evaluation=samples(range(count))), config)
    found = [numbers(p) for p in (parts.training, parts.validation, parts.evaluation)]
    assert sorted(i for part in found for i in part) == list(range(count))
    assert all(found)
    assert parts.warnings == ()


def test_the_parts_of_the_form_are_kept() -> None:
    found = DataSet(
        evaluation=samples(range(5)),
        training=samples(range(10, 60)),
        validation=samples(range(5, 10)),
    )
    parts = training_parts(found, DataConfig(data="d", for_training=True))
    assert numbers(parts.evaluation) == list(range(5))
    assert numbers(parts.validation) == list(range(5, 10))
    assert numbers(parts.training) == list(range(10, 60))


def test_validation_comes_from_training_where_the_form_has_none() -> None:
    found = DataSet(evaluation=samples(range(5)), training=samples(range(10, 60)))
    parts = training_parts(found, DataConfig(data="d", for_training=True, validation_samples=3))
    assert len(parts.validation) == 3
    assert sorted(numbers(parts.validation) + numbers(parts.training)) == list(range(10, 60))


def test_training_on_what_is_judged_by_is_told() -> None:
    found = DataSet(evaluation=samples(range(20)), training=samples(range(20)))
    parts = training_parts(found, DataConfig(data="d", for_training=True))
    assert "18 of 20 evaluation samples are among the training samples" in parts.warnings[0]


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DataError, match="has 4 samples: too few to train on"):
        training_parts(
            DataSet(evaluation=samples(range(4))), DataConfig(data="d", for_training=True)
        )


def test_the_stage_writes_every_part(tmp_path: Path) -> None:
    record = prepare_data(
        DataConfig(data="digits", for_training=True, training_samples=100), output=tmp_path
    )
    assert (record.training_samples, record.validation_samples) == (100, 89)
    for name in ("training", "validation"):
        assert len(Rows(tmp_path / name)) == len(Rows(tmp_path / f"{name}_labels"))
    assert len(Rows(tmp_path / "evaluation")) == record.evaluation_samples


def test_a_training_part_is_taken_where_there_is_one(tmp_path: Path) -> None:
    """And where there is none, nothing is taken away from what judges."""
    own = prepare_data(DataConfig(data="digits", for_training=None), output=tmp_path / "own")
    without = prepare_data(DataConfig(data="digits"), output=tmp_path / "without")
    assert own.training_samples > 0
    assert own.evaluation_samples == without.evaluation_samples
    np.savez(tmp_path / "x.npz", x=np.ones((40, 2), np.float32), label=np.arange(40) % 2)
    one = DataConfig(data=str(tmp_path / "x.npz"), for_training=None)
    none, plain = (
        prepare_data(replace(one, for_training=f), output=tmp_path / str(f)) for f in (None, False)
    )
    assert none == plain
    named = prepare_data(replace(one, train=one.data), output=tmp_path / "named")
    assert (named.training_samples, named.evaluation_samples) == (36, 40)


def test_unlabelled_data_has_no_labels_to_train_on(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.arange(40, dtype=np.float32).reshape(20, 2))
    config = DataConfig(data=str(tmp_path / "x.npz"), for_training=True, labelled=False)
    prepare_data(config, output=tmp_path / "out")
    assert not (tmp_path / "out" / "training_labels").exists()
    assert len(Rows(tmp_path / "out" / "training")) == 17


def write_idx(folder: Path, part: str, count: int, *, packed: bool = True) -> np.ndarray:
    """Pictures of 4x3 pixels and their classes, as the form has it."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 4, 3)).astype(np.uint8)
    classes = np.arange(count, dtype=np.uint8) % 10
    for what, values in (("images", pixels), ("labels", classes)):
        header = struct.pack(f">{values.ndim + 1}I", 0x800 + values.ndim, *values.shape)
        name = f"{part}-{what}-idx{values.ndim}-ubyte"
        data = header + values.tobytes()
        (folder / f"{name}.gz" if packed else folder / name).write_bytes(
            gzip.compress(data) if packed else data
        )
    return pixels


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path: Path, *, packed: bool) -> None:
    write_idx(tmp_path, "train", 30, packed=packed)
    pixels = write_idx(tmp_path, "t10k", 12, packed=packed)
    assert split_form(str(tmp_path)) == ("idx", tmp_path.resolve())
    found = read(str(tmp_path), config=DataConfig(data=""))
    assert (len(found.evaluation), len(found.training)) == (12, 30)
    image = found.evaluation[3].feeds["image"]
    assert image.shape == (1, 1, 4, 3)
    np.testing.assert_allclose(image[0, 0] * 255, pixels[3], atol=1e-4)
    assert int(found.evaluation[3].label) == 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.unlink(), "has no t10k-labels-idx"),
        (lambda f: f.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x0c" + bytes(11))), "promises"),
        (lambda f: f.write_bytes(gzip.compress(b"\0\0\x0d\x01\0\0\0\x0c" + bytes(12))), "no idx"),
        (lambda f: f.write_bytes(gzip.compress(b"\0\0")), "no idx file"),
        (lambda f: f.write_bytes(b"nonsense"), "cannot be read"),
        (lambda f: f.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x0b" + bytes(11))), "12 pict"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, damage, words: str) -> None:
    write_idx(tmp_path, "t10k", 12)
    damage(tmp_path / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(DataError, match=words):
        read(f"idx:{tmp_path}", config=DataConfig(data=""))
