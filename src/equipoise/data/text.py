"""Text to model inputs with ``tokenizer.json`` and the ``tokenizers`` package alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.errors import DataError
from equipoise.spec import Array

_SHOWN: Final = 80

IGNORED: Final = -100
"""Label of tokens that do not count: special tokens and all but the first piece of a word."""


TEXT_INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids")
"""What a text becomes, each int64 [1, tokens]."""

OPTIONAL_INPUTS: Final = ("attention_mask", "token_type_ids")
"""Inputs that some models do not take; with one text and no padding they say nothing."""


class TextEncoder:
    """Encodes text as ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 [1, n].

    Args:
        tokenizer: A ``tokenizer.json``.
        max_length: Most tokens per text, special tokens included; the rest is cut off.

    Raises:
        DataError: There is no such file, or it is no tokenizer.
    """

    def __init__(self, tokenizer: Path | None, *, max_length: int = 512) -> None:
        if tokenizer is None:
            raise DataError(
                "text data needs a tokenizer.json",
                hint="Give --tokenizer FILE, or a transformers directory that has one.",
            )
        self._max_length = max_length
        self._tokenizer = _load(tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.truncated = 0

    def text(self, text: str, *, pair: str | None = None) -> dict[str, Array]:
        """Encode a text, or a pair of texts."""
        return self._feeds(self._encode(text, pair=pair))

    def words(self, words: Sequence[str]) -> tuple[dict[str, Array], list[int | None]]:
        """Encode a sentence given as words.

        Returns:
            The feeds, and for each token the index of its word where the token is the first piece
            of it; None elsewhere.
        """
        encoding = self._encode(list(words), pair=None)
        seen: set[int | None] = {None}
        first: list[int | None] = []
        for word in encoding.word_ids:
            first.append(None if word in seen else word)
            seen.add(word)
        return self._feeds(encoding), first

    def _encode(self, text: str | list[str], *, pair: str | None) -> Any:
        try:
            encoding = self._tokenizer.encode(text, pair, is_pretokenized=isinstance(text, list))
        except TypeError as error:  # half of a surrogate pair has no UTF-8 form
            shown = repr((text, pair) if pair else text)[:_SHOWN]
            raise DataError(f"text {shown} cannot be encoded: {error}") from error
        if len(encoding.ids) <= self._max_length:
            return encoding
        self.truncated += 1
        self._tokenizer.enable_truncation(self._max_length)
        encoding = self._tokenizer.encode(text, pair, is_pretokenized=isinstance(text, list))
        self._tokenizer.no_truncation()
        return encoding

    @staticmethod
    def _feeds(encoding: Any) -> dict[str, Array]:
        return {
            "input_ids": np.array([encoding.ids], dtype=np.int64),
            "attention_mask": np.array([encoding.attention_mask], dtype=np.int64),
            "token_type_ids": np.array([encoding.type_ids], dtype=np.int64),
        }


def _load(path: Path) -> Any:
    tokenizers = extras.require("tokenizers")
    if not path.is_file():
        raise DataError(f"no such tokenizer: {path}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare exceptions from Rust
        raise DataError(f"{path} is no tokenizer.json: {error}") from error
