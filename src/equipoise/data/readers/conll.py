"""CoNLL column files: a token per line, its tag in the last column, blank lines between."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from equipoise import fs
from equipoise.data.config import DataConfig
from equipoise.data.readers.base import DataSet, Sample, label_indices
from equipoise.data.text import IGNORED, TextEncoder
from equipoise.errors import DataError
from equipoise.spec import Array

Sentence = Sequence[tuple[str, str]]
"""Pairs of word and tag."""

_TAG: Final = re.compile(r"O|[BIES]-.+")
_GAP: Final = re.compile(r"[ \t]+")
_EVALUATION: Final = ("test.txt", "valid.txt")
_CALIBRATION: Final = ("valid.txt", "train.txt")
_TRAINING, _VALIDATION = "train.txt", "valid.txt"


def read(path: Path | None, *, config: DataConfig) -> DataSet:
    """Read a file, or a directory with ``test.txt`` and, for calibration, ``valid.txt``.

    Raises:
        DataError: A missing file, a line without a tag, a tag that is no BIO tag or that the
            model does not know, no sentence at all.
    """
    place = path or Path()
    evaluation = _first(place, _EVALUATION) if place.is_dir() else place
    calibration = _first(place, _CALIBRATION) if place.is_dir() else None
    encoder = TextEncoder(config.tokenizer, max_length=config.max_length)
    sentences = list(read_sentences(evaluation))
    labels = config.labels or _tags_of(sentences)
    samples = encode_sentences(sentences, encoder, labels=labels, where=str(evaluation))
    others: list[Sample] = []
    if calibration is not None and calibration != evaluation:
        kept = list(read_sentences(calibration))[: config.calibration_samples]
        others = encode_sentences(kept, encoder, labels=labels, where=str(calibration))
    return DataSet(
        evaluation=samples,
        calibration=others,
        labels=labels,
        warnings=truncation_warnings(encoder, config),
        **_training(place, evaluation, encoder, config=config, labels=labels),
    )


def _training(
    place: Path,
    evaluation: Path,
    encoder: TextEncoder,
    *,
    config: DataConfig,
    labels: Sequence[str],
) -> dict[str, list[Sample]]:
    """The files of a directory that are for training; only read where they are asked for."""
    wanted = {"training": place / _TRAINING, "validation": place / _VALIDATION}
    if config.for_training is False or not place.is_dir():
        return {}
    return {
        part: encode_sentences(list(read_sentences(file)), encoder, labels=labels, where=str(file))
        for part, file in wanted.items()
        if file.is_file() and file != evaluation
    }


def truncation_warnings(encoder: TextEncoder, config: DataConfig) -> tuple[str, ...]:
    """A warning when texts were cut off."""
    if not encoder.truncated:
        return ()
    return (f"{encoder.truncated} texts are longer than {config.max_length} tokens and were cut",)


def _first(directory: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise DataError(f"{directory} has none of {', '.join(names)}")


def read_sentences(path: Path) -> Iterator[Sentence]:
    """The sentences of a column file; ``-DOCSTART-`` lines are skipped."""
    sentence: list[tuple[str, str]] = []
    for number, line in enumerate(fs.read_text(path, error=DataError).split("\n"), start=1):
        columns = _GAP.split(line.strip())
        if columns[0] in {"", "-DOCSTART-"}:
            if sentence:
                yield sentence
            sentence = []
        elif len(columns) < 2 or not _TAG.fullmatch(columns[-1]):
            raise DataError(
                f"{path}, line {number}: {line[:60]!r} does not end in a BIO tag such as O or B-PER"
            )
        else:
            sentence.append((columns[0], columns[-1]))
    if sentence:
        yield sentence


def _tags_of(sentences: Sequence[Sentence]) -> tuple[str, ...]:
    return tuple(sorted({tag for sentence in sentences for _, tag in sentence}))


def encode_sentences(
    sentences: Sequence[Sentence], encoder: TextEncoder, *, labels: Sequence[str], where: str
) -> list[Sample]:
    """Sentences as samples; the label of a word is at its first piece, -100 elsewhere."""
    samples = []
    for sentence in sentences:
        feeds, first = encoder.words([word for word, _ in sentence])
        tags = label_indices([tag for _, tag in sentence], labels, where=where)
        samples.append(Sample(feeds=feeds, label=_label(tags, first)))
    return samples


def _label(tags: Array, first: Sequence[int | None]) -> Array:
    values = [IGNORED if word is None else int(tags[word]) for word in first]
    return np.array(values, dtype=np.int64)
