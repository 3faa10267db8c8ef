"""Data from directories of pictures and from functions of the user's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equipoise.data.config import DataConfig
from equipoise.data.images import apply
from equipoise.data.prepare import prepare_data
from equipoise.data.preprocessing import ImagePreprocessing
from equipoise.data.readers.base import read
from equipoise.data.store import Rows
from equipoise.errors import DataError

STEPS = ImagePreprocessing(size=(6, 6), resize_to=(6, 6), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with two pictures each, one of them grey."""
    random = np.random.default_rng(0)
    for index, name in enumerate(("cat", "cat", "dog", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, size=(8, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        picture = picture.convert("L") if index == 3 else picture
        picture.save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def config(data: Path | str, **settings: object) -> DataConfig:
    return DataConfig(data=str(data), **{"preprocessing": STEPS, "input_name": "x", **settings})


def test_pictures_go_through_the_models_preprocessing(folder: Path) -> None:
    """Folders are classes in the order of their names, grey pictures become RGB."""
    found = read(str(folder), config=config(folder))
    assert found.labels == ("cat", "dog")
    assert [int(sample.label) for sample in found.evaluation] == [0, 0, 1, 1]
    pixels = np.asarray(Image.open(folder / "cat" / "0.png"))
    np.testing.assert_array_equal(found.evaluation[0].feeds["x"], apply(pixels, STEPS))
    assert found.evaluation[3].feeds["x"].shape == (1, 3, 6, 6)
    assert len(found.evaluation[1:3]) == 2


def test_calibration_takes_pictures_without_labels(folder: Path, tmp_path: Path) -> None:
    """Pictures in no folder of a class are enough when no label is needed."""
    (folder / "cat" / "0.png").rename(folder / "loose.png")
    prepare_data(config(folder, labelled=False, calibration_samples=3), output=tmp_path / "out")
    rows = Rows(tmp_path / "out" / "calibration")
    assert len(rows) == 3
    assert rows[0]["x"].shape == (1, 3, 6, 6)
    with pytest.raises(DataError, match=r"loose\.png: a picture outside the folders"):
        list(read(str(folder), config=config(folder)).evaluation)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "cat" / "0.png").write_bytes(b"no picture"), r"0\.png is no picture"),
        (lambda f: [p.unlink() for p in f.rglob("*.png")], "there is no picture"),
    ],
)
def test_bad_pictures_are_named(folder: Path, change, words: str) -> None:
    """A damaged file, and a folder without any."""
    change(folder)
    with pytest.raises(DataError, match=words):
        list(read(f"images:{folder}", config=config(folder)).evaluation)


def test_pictures_need_their_preprocessing(folder: Path) -> None:
    """Nothing is guessed."""
    with pytest.raises(DataError, match="what the model does to pictures is not known"):
        read(str(folder), config=config(folder, preprocessing=None))


FUNCTIONS = """
import numpy as np
def good():
    for i in range(3):
        yield {"x": np.full((1, 2), i, dtype=np.float32), "label": i}
def bare():
    return [{"x": np.zeros((1, 2))}]
def broken():
    raise KeyError("no such table")
def words():
    return [{"x": np.array(["a"]), "label": 0}]
def values():
    return [{"x": np.zeros((1, 2)), "label": v} for v in (0.25, 2.5)]
def named():
    return [{"x": np.zeros((1, 2)), "label": "cat"}]
def lists():
    return [[1, 2]]
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "samples_of_ours.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "python:samples_of_ours"


def test_a_function_gives_samples(module: str) -> None:
    """Mappings of input name to array, with a label."""
    found = read(f"{module}:good", config=config(f"{module}:good"))
    assert [int(sample.label) for sample in found.evaluation] == [0, 1, 2]
    np.testing.assert_array_equal(found.evaluation[2].feeds["x"], [[2, 2]])
    bare = read(f"{module}:bare", config=config(f"{module}:bare", labelled=False))
    assert set(bare.evaluation[0].feeds) == {"x"}


def test_a_function_gives_values(module: str) -> None:
    """Floats stay what they are, and are refused where the model has classes."""
    name = f"{module}:values"
    found = read(name, config=config(name)).evaluation
    assert [sample.label.tolist() for sample in found] == [0.25, 2.5]
    with pytest.raises(DataError, match=r"sample 0: 'label' is float64.*classes"):
        read(name, config=config(name, labels=("cat", "dog")))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bare", "sample 0: there is no 'label'"),
        ("broken", "failed: KeyError: 'no such table'"),
        ("words", "'x' holds no numbers"),
        ("lists", "sample 0 is list"),
        ("named", "sample 0: 'label' is .*numbers are needed"),
        ("number", "is no function"),
        ("absent", "there is no such function"),
    ],
)
def test_what_a_function_gives_is_checked(module: str, name: str, words: str) -> None:
    """Each fault with the sample and what is needed."""
    with pytest.raises(DataError, match=words):
        read(f"{module}:{name}", config=config(f"{module}:{name}"))
