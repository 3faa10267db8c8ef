"""What a reader gives, and how the form of data is found from what the user typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, cast

import numpy as np

from equipoise.data.config import DataConfig
from equipoise.errors import DataError
from equipoise.registry import Registry
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One labelled input.

    Attributes:
        feeds: Arrays by input name, batch dimension 1.
        label: int64, a scalar class or one class per token with -100 where none counts; or float32
            values, for a regression.
    """

    feeds: Mapping[str, Array]
    label: Array


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What a reader found.

    Attributes:
        evaluation: Labelled samples to measure on.
        calibration: Samples to calibrate on that share none with ``evaluation``; empty when the
            form has no part of its own for that.
        labels: Class names in index order; empty when the data has numbers only.
        warnings: What the user should know.
        training: Samples to train on, where the form has a part for that and
            ``DataConfig.for_training`` asks for it.
        validation: Samples to decide by while training, under the same conditions.
    """

    evaluation: Sequence[Sample]
    calibration: Sequence[Sample] = ()
    labels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    training: Sequence[Sample] = ()
    validation: Sequence[Sample] = ()


class Reader(Protocol):
    """Reads one form of data."""

    def __call__(self, path: Path | None, *, config: DataConfig) -> DataSet:
        """Read ``path`` (None for a form that has no file). Raises DataError."""


READERS: Final = Registry(
    kind="data form",
    group="equipoise.readers",
    builtin={
        name: f"equipoise.data.readers.{name}:read"
        for name in ("conll", "digits", "idx", "images", "jsonl", "npz", "python")
    },
)
PICTURES: Final = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
"""Suffixes of pictures."""

_FORM_OF_SUFFIX: Final = {
    ".npz": "npz", ".jsonl": "jsonl", ".txt": "conll", ".conll": "conll", ".bio": "conll"
}  # fmt: skip
_FORMS: Final = (
    "Give digits, an .npz or .jsonl file, a CoNLL file (.txt, .conll, .bio) or directory, a"
    " directory of pictures or of idx files, or say the form: npz:PATH, jsonl:PATH, conll:PATH,"
    " images:PATH, idx:PATH, python:MODULE:FUNCTION."
)


def split_form(data: str) -> tuple[str, Path | None]:
    """The form and the path in what the user typed.

    Raises:
        DataError: Nothing of that name, or a file whose form cannot be told.
    """
    if data == "digits":
        return "digits", None
    form, colon, rest = data.partition(":")
    if colon and form == "python":
        return form, None
    if colon and form in READERS.names():
        return form, _existing(Path(rest))
    path = _existing(Path(data))
    form = _form_of_directory(path) if path.is_dir() else _FORM_OF_SUFFIX.get(path.suffix, "")
    if not form:
        raise DataError(f"{path}: no data form has the suffix {path.suffix!r}", hint=_FORMS)
    return form, path


def _form_of_directory(path: Path) -> str:
    if next(path.glob("*-idx?-ubyte*"), None):
        return "idx"
    has_pictures = any(file.suffix.lower() in PICTURES for file in path.rglob("*"))
    return "images" if has_pictures else "conll"


def _existing(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"no such data: {path}", hint=_FORMS)
    return path.resolve()


def read(data: str, *, config: DataConfig) -> DataSet:
    """Read what the user typed. Raises DataError or UsageError."""
    form, path = split_form(data)
    return cast("Reader", READERS.get(form))(path, config=config)


def label_indices(names: Sequence[str], labels: Sequence[str], *, where: str) -> Array:
    """Class names as int64 indices into ``labels``. Raises DataError naming a stranger."""
    index = {label: i for i, label in enumerate(labels)}
    for name in names:
        if name not in index:
            raise DataError(
                f"{where}: label {name!r} is not among the model's {list(labels)}",
                hint="Give the data that belongs to the model, or the labels with --labels.",
            )
    return np.array([index[name] for name in names], dtype=np.int64)
