"""JSON lines: ``{"text", "label"}``, with or without ``"text_pair"``, or ``{"tokens", "tags"}``.

A causal language model learns from ``{"text"}`` alone, and so does a student without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import fs, record
from equipoise.data.config import DataConfig
from equipoise.data.readers.base import DataSet, Sample, label_indices
from equipoise.data.readers.conll import encode_sentences, truncation_warnings
from equipoise.data.readers.values import as_values, takes_values
from equipoise.data.text import TextEncoder, next_tokens
from equipoise.errors import DataError
from equipoise.spec import Array

_MOST_CLASSES: Final = 2**31
_LANGUAGE_MODEL: Final = "causal-lm"


def read(path: Path | None, *, config: DataConfig) -> DataSet:
    """Read ``path``. Labels are class numbers, or names among the model's labels.

    They are values where one of them has a fraction or is a list of numbers, and where the model
    has a single output; those of a causal language model are the next tokens.

    Raises:
        DataError: A line that is no such object, with its number; labels that do not fit.
    """
    lines = list(_lines(path or Path(), config))
    encoder = TextEncoder(config.tokenizer, max_length=config.max_length)
    labels = config.labels or _names_in(lines)
    label = _labeller(lines, config, labels=labels)
    samples = [
        _sample(line, encoder, labels=labels, label=label, where=where) for where, line in lines
    ]
    return DataSet(evaluation=samples, labels=labels, warnings=truncation_warnings(encoder, config))


def _lines(path: Path, config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, text in enumerate(fs.read_text(path, error=DataError).split("\n"), start=1):
        where = f"{path}, line {number}"
        if text.strip():
            yield where, _object(text, config, where=where)


def _object(text: str, config: DataConfig, *, where: str) -> dict[str, Any]:
    try:
        line = record.parse(text)
    except ValueError as error:
        raise DataError(f"{where}: no JSON: {error}") from error
    if not isinstance(line, dict):
        raise DataError(f"{where}: expected an object, got {text[:60]}")
    plain = config.task == _LANGUAGE_MODEL or not config.labelled
    for wanted in ({"text"} if plain else {"text", "label"}, {"tokens", "tags"}):
        if wanted <= set(line):
            return line
    needed = "text" if plain else "text and label"
    raise DataError(f"{where}: has {sorted(line)}; needs {needed}, or tokens and tags")


def _is_tagged(line: dict[str, Any]) -> bool:
    return {"tokens", "tags"} <= set(line)


def _names_in(lines: list[tuple[str, dict[str, Any]]]) -> tuple[str, ...]:
    """Class names for a model that has none: those in the data, sorted, if any."""
    names: set[str] = set()
    for _, line in lines:
        found = line["tags"] if _is_tagged(line) else [line.get("label")]
        if isinstance(found, list):
            names.update(name for name in found if isinstance(name, str))
    return tuple(sorted(names))


Labeller = Callable[[dict[str, Any], dict[str, Array], str], Array]
"""The label of a line, from the line, what its text became, and its place for messages."""


def _labeller(
    lines: list[tuple[str, dict[str, Any]]], config: DataConfig, *, labels: tuple[str, ...]
) -> Labeller:
    """How the lines of text are labelled."""
    if config.task == _LANGUAGE_MODEL:
        return lambda _, feeds, __: next_tokens(feeds["input_ids"])
    given = [line["label"] for _, line in lines if "label" in line and not _is_tagged(line)]
    if _are_values(given, labels=config.labels):
        return lambda line, _, where: _value(line, config.labels, where=where)
    return lambda line, _, where: _class(line.get("label", 0), labels, where=where)


def _are_values(given: list[Any], *, labels: tuple[str, ...]) -> bool:
    if not takes_values(labels):
        return False
    numbers = not any(isinstance(label, str | bool) for label in given)
    return (len(labels) == 1 and numbers) or any(isinstance(v, float | list) for v in given)


def _value(line: dict[str, Any], labels: tuple[str, ...], *, where: str) -> Array:
    label = line.get("label", 0.0)
    if isinstance(label, str | bool | None):
        raise DataError(f"{where}: label {label!r} is no number; others in the file are")
    return as_values(label, labels, where=f"{where}: label")


def _sample(
    line: dict[str, Any],
    encoder: TextEncoder,
    *,
    labels: tuple[str, ...],
    label: Labeller,
    where: str,
) -> Sample:
    if _is_tagged(line):
        words, tags = line["tokens"], line["tags"]
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise DataError(f"{where}: tokens and tags must be two lists of equal length")
        pairs = list(zip(map(str, words), map(str, tags), strict=True))
        return encode_sentences([pairs], encoder, labels=labels, where=where)[0]
    text, pair = line["text"], line.get("text_pair")
    if not isinstance(text, str) or not isinstance(pair, str | None):
        raise DataError(f"{where}: text and text_pair must be strings")
    feeds = encoder.text(text, pair=pair)
    return Sample(feeds=feeds, label=label(line, feeds, where))


def _class(label: object, labels: tuple[str, ...], *, where: str) -> Array:
    if isinstance(label, str):
        return np.asarray(label_indices([label], labels, where=where)[0])
    if isinstance(label, int) and not isinstance(label, bool):
        classes = len(labels) or _MOST_CLASSES
        if not 0 <= label < classes:
            raise DataError(f"{where}: class {label} is not among the {classes} classes from 0")
        return np.asarray(label, dtype=np.int64)
    raise DataError(f"{where}: label {label!r} is neither a class name nor a number")
