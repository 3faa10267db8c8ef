"""Text to model inputs with ``tokenizer.json`` and the ``tokenizers`` package alone.

A text is encoded whole, and cut here: the package cuts by changing the tokenizer that threads
share, and makes every pair of leftovers of two long texts before it throws them away. What is cut
is what transformers cuts: the end of a text, or of the longer of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

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

_SPECIAL: Final = -1
_PAD_TOKENS: Final = ("[PAD]", "<pad>", "<PAD>", "<|pad|>", "<|endoftext|>")
"""What a padding token is called where tokenizer.json does not say which one it is."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A text, or a pair of texts, as tokens.

    Attributes:
        ids: int64 [tokens].
        type_ids: int64 [tokens]: 1 for what belongs to the second text.
        offsets: int64 [tokens, 2]: first character of the text that a token comes from, and the one
            behind its last; zeros for what the model's template adds.
        sequence: int64 [tokens]: which text a token is of, 0 or 1; -1 for what the template adds.
        words: int64 [tokens]: which word of its text, as the tokenizer splits words; -1 for none.
        truncated: Whether tokens were left out.
    """

    ids: Indices
    type_ids: Indices
    offsets: Indices
    sequence: Indices
    words: Indices
    truncated: bool = False

    def __len__(self) -> int:
        return self.ids.size

    @property
    def content(self) -> Indices:
        """Positions of the tokens that are of a text."""
        return np.flatnonzero(self.sequence != _SPECIAL)

    def part(self, start: int, stop: int) -> Encoded:
        """The template around the content tokens ``start`` to ``stop`` of a single text."""
        kept = self.sequence == _SPECIAL
        kept[self.content[start:stop]] = True
        return self._only(kept)

    def feeds(self) -> dict[str, Array]:
        """``input_ids``, ``attention_mask`` and ``token_type_ids``, each int64 [1, tokens]."""
        columns = (self.ids, np.ones_like(self.ids), self.type_ids)
        return {name: c[np.newaxis] for name, c in zip(TEXT_INPUTS, columns, strict=True)}

    def cut(self, max_length: int, *, left: bool = False) -> Encoded:
        """At most ``max_length`` tokens, the longer of two texts cut first.

        Args:
            max_length: Most tokens, the template's included.
            left: Cut the beginning of a text instead of its end.

        Raises:
            DataError: The template alone has more tokens.
        """
        room = self.room(max_length)
        kept = self.sequence == _SPECIAL
        of_text = [np.flatnonzero(self.sequence == text) for text in (0, 1)]
        shares = _shares(of_text[0].size, of_text[1].size, room=room)
        for places, share in zip(of_text, shares, strict=True):
            kept[places[places.size - share :] if left else places[:share]] = True
        return self if kept.all() else self._only(kept)

    def room(self, max_length: int) -> int:
        """How many tokens of texts fit into ``max_length`` beside the template's.

        Raises:
            DataError: The template alone has more tokens.
        """
        template = int((self.sequence == _SPECIAL).sum())
        if template > max_length:
            raise DataError(
                f"{max_length} tokens are allowed, and {template} are added to every text",
                hint="Allow more tokens.",
            )
        return max_length - template

    def _only(self, kept: NDArray[np.bool_]) -> Encoded:
        return Encoded(
            ids=self.ids[kept],
            type_ids=self.type_ids[kept],
            offsets=self.offsets[kept],
            sequence=self.sequence[kept],
            words=self.words[kept],
            truncated=self.truncated or not kept.all(),
        )


def _shares(first: int, second: int, *, room: int) -> tuple[int, int]:
    """How many tokens of each text stay: ``longest_first`` of tokenizers.

    The shorter one keeps all it has, or half of the room where both are longer than that.
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)


class TextEncoder:
    """Encodes text as ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 [1, n].

    Threads may share it.

    Args:
        tokenizer: A ``tokenizer.json``, or its bytes.
        max_length: Most tokens per text, special tokens included; the rest is cut off.

    Attributes:
        max_length: As given.
        truncated: How many texts were cut so far.
        padding: Token and type that fill a row up; None when the tokenizer has no such token.

    Raises:
        DataError: There is no such file, or it is no tokenizer.
    """

    def __init__(self, tokenizer: Path | bytes | None, *, max_length: int = 512) -> None:
        if tokenizer is None:
            raise DataError(
                "text data needs a tokenizer.json",
                hint="Give --tokenizer FILE, or a transformers directory that has one.",
            )
        self.max_length = max_length
        self.truncated = 0
        self._tokenizer = _load(tokenizer)
        self._left = (self._tokenizer.truncation or {}).get("direction") == "left"
        self.padding = _padding(self._tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @property
    def splits_words(self) -> bool:
        """Whether pieces inside words are marked (``##ing``), so that its words are words."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    def text(self, text: str, *, pair: str | None = None) -> dict[str, Array]:
        """Encode a text, or a pair of texts."""
        return self.encode(text, pair=pair).feeds()

    def words(self, words: Sequence[str]) -> tuple[dict[str, Array], list[int | None]]:
        """Encode a sentence given as words.

        Returns:
            The feeds, and for each token the index of its word where the token is the first piece
            of it; None elsewhere.
        """
        encoded = self._cut(self._encoded(list(words), pair=None))
        seen = {_SPECIAL}
        first: list[int | None] = []
        for word in encoded.words.tolist():
            first.append(None if word in seen else word)
            seen.add(word)
        return encoded.feeds(), first

    def encode(self, text: str, *, pair: str | None = None) -> Encoded:
        """The tokens of a text, or of a pair of texts, at most ``max_length``.

        Raises:
            DataError: It cannot be encoded, or ``max_length`` has no room for the special tokens.
        """
        return self._cut(self._encoded(text, pair=pair))

    def whole(self, text: str) -> Encoded:
        """All tokens of a text, however many. Raises DataError when it cannot be encoded."""
        return self._encoded(text, pair=None)

    def _cut(self, encoded: Encoded) -> Encoded:
        cut = encoded.cut(self.max_length, left=self._left)
        self.truncated += cut.truncated
        return cut

    def _encoded(self, text: str | list[str], *, pair: str | None) -> Encoded:
        try:
            encoding = self._tokenizer.encode(text, pair, is_pretokenized=isinstance(text, list))
        except TypeError as error:  # half of a surrogate pair has no UTF-8 form
            shown = repr((text, pair) if pair else text)[:_SHOWN]
            raise DataError(f"text {shown} cannot be encoded: {error}") from error
        return Encoded(
            ids=np.array(encoding.ids, dtype=np.int64),
            type_ids=np.array(encoding.type_ids, dtype=np.int64),
            offsets=np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2),
            sequence=_numbers(encoding.sequence_ids),
            words=_numbers(encoding.word_ids),
        )


def next_tokens(tokens: Indices) -> Indices:
    """What a causal language model has to say at each token of a text: the one behind it.

    Args:
        tokens: int64 [1, n].

    Returns:
        int64 [n]: -100 at the last token, behind which there is none.
    """
    return np.append(tokens[0, 1:], IGNORED)


def _numbers(values: Sequence[int | None]) -> Indices:
    return np.array([_SPECIAL if v is None else v for v in values], dtype=np.int64)


def _padding(tokenizer: Any) -> tuple[int, int] | None:
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"]), int(tokenizer.padding["pad_type_id"])
    known = (tokenizer.token_to_id(name) for name in _PAD_TOKENS)
    return next(((token, 0) for token in known if token is not None), None)


def _load(source: Path | bytes) -> Any:
    tokenizers = extras.require("tokenizers")
    place = "the tokenizer" if isinstance(source, bytes) else str(source)
    if isinstance(source, Path) and not source.is_file():
        raise DataError(f"no such tokenizer: {source}")
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        return tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the package raises bare exceptions from Rust
        raise DataError(f"{place} is no tokenizer.json: {error}") from error
