"""Rows of different length through an engine: sorted, padded little, given back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, TypeVar

import numpy as np

from equipoise.apps.opening import OpenBundle
from equipoise.data.text import TEXT_INPUTS, Encoded, TextEncoder
from equipoise.errors import DataError, IncompatibleError, InputError
from equipoise.spec import Array, Feeds

T = TypeVar("T")
_SHOWN: Final = 60
_NO_PADDING: Final = (0, 0)


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How texts are run.

    Attributes:
        batch_size: Most texts that run together.
        max_length: Most tokens per text; those of the bundle when None, and never more.
        buckets: Lengths in tokens to pad to, for runtimes that prepare anew for each length; the
            longest text of a batch decides when empty.
        max_characters: Longest text that is taken. A longer one is refused before it is encoded.

    Raises:
        InputError: A number is below 1.
    """

    batch_size: int = 32
    max_length: int | None = None
    buckets: tuple[int, ...] = ()
    max_characters: int = 1_000_000

    def __post_init__(self) -> None:
        numbers = (self.batch_size, self.max_characters, *self.buckets)
        if min((*numbers, 1 if self.max_length is None else self.max_length)) < 1:
            raise InputError(f"{self} holds a number below 1")


class TextRunner:
    """Encodes texts and runs them.

    Args:
        bundle: An open bundle with a tokenizer.
        settings: How.

    Raises:
        InputError: The bundle has no tokenizer, or takes other inputs than those of texts.
        DataError: Its tokenizer cannot be read.
    """

    def __init__(self, bundle: OpenBundle, settings: TextSettings) -> None:
        self._bundle, self._settings = bundle, settings
        self._dtypes = _text_dtypes(bundle)
        batch, length = next(s.shape for s in bundle.inputs if s.name == "input_ids")
        self._batch = batch if isinstance(batch, int) else None
        self._length = length if isinstance(length, int) else None
        self.encoder = _encoder(bundle, settings, fixed=self._length)
        # Without a mask the model cannot tell padding from text: it would answer for another text.
        # Such texts run together only where they happen to be of one length. Nor is padded where
        # the bundle does not say that what runs together gives what it gives alone: an engine that
        # takes its ranges from its input takes them from padding too, and would gain nothing.
        self._masked = "attention_mask" in self._dtypes
        known = self.encoder.padding is not None and bundle.engine.batching
        self._pads = self._masked and (known or self._length is not None)

    def check(self, text: object, *, where: str, empty: bool = False) -> str:
        """``text`` as a string of allowed length.

        Args:
            text: What the caller gave.
            where: What it is called in messages.
            empty: Whether a text without a visible character is allowed.

        Raises:
            DataError: It is none.
        """
        if not isinstance(text, str):
            raise DataError(
                f"{where} is {type(text).__name__}, not a string",
                hint="Decode bytes first, and give several texts as a list.",
            )
        if len(text) > self._settings.max_characters:
            raise DataError(
                f"{where} has {len(text)} characters; {self._settings.max_characters} are allowed",
                hint="Split it, or allow more with TextSettings(max_characters=...).",
            )
        if not empty and not text.strip():
            raise DataError(
                f"{where} is empty: {text[:_SHOWN]!r}",
                hint="Leave out texts that say nothing.",
            )
        return text

    def map(self, rows: Sequence[Encoded], reduce: Callable[[Feeds, Encoded], T]) -> list[T]:
        """Run all rows, and make of the outputs of each what is kept.

        Args:
            rows: Encoded texts.
            reduce: From outputs of batch size 1, padded behind the text, and the row.

        Returns:
            What ``reduce`` gave, in the order of ``rows``.

        Raises:
            IncompatibleError: A row is shorter than an engine of fixed length takes, without a
                mask.
        """
        found: dict[int, T] = {}
        for indices in self._groups(rows):
            length = self._padded(len(rows[indices[0]]))
            feeds = [self._feeds(rows[i], length) for i in indices]
            for i, outputs in zip(indices, self._run(feeds), strict=True):
                found[i] = reduce(outputs, rows[i])
        return [found[i] for i in range(len(rows))]

    def _groups(self, rows: Sequence[Encoded]) -> Iterator[list[int]]:
        """Indices of rows that run together, the longest first in each and of all."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        if self._pads:
            parts = [order]
        else:
            parts = [list(part) for _, part in groupby(order, key=lambda i: len(rows[i]))]
        size = self._settings.batch_size
        for part in parts:
            yield from (part[i : i + size] for i in range(0, len(part), size))

    def _padded(self, longest: int) -> int:
        """How long a batch becomes whose longest row has so many tokens."""
        if self._length is not None:
            return self._length
        fitting = [size for size in self._settings.buckets if size >= longest]
        return min(fitting, default=longest) if self._masked else longest

    def _feeds(self, row: Encoded, length: int) -> dict[str, Array]:
        missing = length - len(row)
        if missing and not self._masked:
            raise IncompatibleError(
                f"the engine takes {length} tokens, a text has {len(row)}, and without an"
                " attention_mask the rest would count as text",
                hint="Export the model with a dynamic sequence, or with its attention_mask.",
            )
        token, kind = self.encoder.padding or _NO_PADDING
        fill = dict(zip(TEXT_INPUTS, (token, 0, kind), strict=True))
        feeds = row.feeds()
        return {
            name: np.pad(feeds[name], [(0, 0), (0, missing)], constant_values=fill[name]).astype(
                dtype, copy=False
            )
            for name, dtype in self._dtypes.items()
        }

    def _run(self, feeds: Sequence[Feeds]) -> Sequence[Feeds]:
        return run_rows(self._bundle, feeds, batch=self._batch)


def run_rows(bundle: OpenBundle, feeds: Sequence[Feeds], *, batch: int | None) -> Sequence[Feeds]:
    """Outputs of batch size 1 for each of ``feeds``, which have batch size 1 and equal shapes.

    Args:
        bundle: An open bundle.
        feeds: Inputs, in order.
        batch: The only batch size that the engine takes; None for any.
    """
    if batch is None:
        return bundle.run_batch(feeds, most=len(feeds))
    found: list[Feeds] = []
    for start in range(0, len(feeds), batch):
        rows = list(feeds[start : start + batch])
        filled = rows + rows[-1:] * (batch - len(rows))
        joined = {name: np.concatenate([row[name] for row in filled]) for name in rows[0]}
        outputs = bundle.run(joined)
        found += [{n: a[i : i + 1] for n, a in outputs.items()} for i in range(len(rows))]
    return found


def _text_dtypes(bundle: OpenBundle) -> dict[str, str]:
    """Inputs of the engine -> their dtypes. Raises InputError when they are not those of a text."""
    names = {spec.name for spec in bundle.inputs}
    flat = all(len(spec.shape) == 2 for spec in bundle.inputs)
    if "input_ids" not in names or not names <= set(TEXT_INPUTS) or not flat:
        raise InputError(
            f"the bundle {bundle.manifest.name!r} takes no text, but"
            f" {'; '.join(map(str, bundle.inputs))}",
            hint=f"A text becomes {', '.join(TEXT_INPUTS)}, each [batch, sequence].",
        )
    return {spec.name: spec.dtype for spec in bundle.inputs}


def _encoder(bundle: OpenBundle, settings: TextSettings, *, fixed: int | None) -> TextEncoder:
    manifest = bundle.manifest
    if manifest.tokenizer is None:
        raise InputError(
            f"the bundle {manifest.name!r} has no tokenizer",
            hint="Pack it from a source that has a tokenizer.json, or with --tokenizer.",
        )
    limits = (manifest.max_length, settings.max_length, fixed)
    longest = min(limit for limit in limits if limit is not None)
    return TextEncoder(bundle.read(manifest.tokenizer), max_length=longest)


def as_batch(given: object, *, what: str) -> list[object]:
    """Several inputs as a list.

    Raises:
        DataError: It is none, or an empty one.
    """
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise DataError(
            f"{type(given).__name__} is neither {what} nor a list of them",
            hint="Give one, or a list.",
        )
    if not given:
        raise DataError(f"the list is empty: no {what} was given", hint="Give at least one.")
    return list(given)
