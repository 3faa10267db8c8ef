"""Classes of tokens to spans of text.

    tokens ── words of them (first, average, max; simple: each token is one) ── spans of one entity

The strategies are those of transformers' ``TokenClassificationPipeline``; spans, labels and scores
are equal to its own. Where it goes wrong, this does not: see :func:`_begins` and :class:`_Scheme`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from equipoise.data.decode import Probabilities, label_of
from equipoise.data.text import Encoded

Aggregation = Literal["simple", "first", "average", "max"]

_PREFIXED: Final = re.compile(r"([BIESLUM])-(.+)", re.DOTALL)
_OPENS: Final = frozenset("BSU")
_CLOSES: Final = frozenset("ESLU")
_MARKS: Final = frozenset({"Mn", "Me"})


@dataclass(frozen=True, kw_only=True)
class Entity:
    """A span of a text.

    Attributes:
        text: The span, as it stands in the text.
        label: What it is: ``PER``.
        start: Its first character.
        end: The character behind its last one.
        score: Mean probability over its words.
    """

    text: str
    label: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, kw_only=True)
class _Word:
    start: int
    end: int
    index: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How tokens become spans.

    Attributes:
        labels: Class names: BIO, IOB1, BIOES, BILOU, or plain ones; may be empty.
        aggregation: How the tokens of a word agree.
        splits_words: Whether the tokenizer's words are words.
    """

    labels: Sequence[str]
    aggregation: Aggregation
    splits_words: bool


def find_entities(
    text: str, encoded: Encoded, probabilities: Probabilities, *, grouping: Grouping
) -> Iterator[Entity]:
    """The spans of ``text``, ``O`` among them.

    Args:
        text: The text.
        encoded: All of its tokens; there is one of the text at least.
        probabilities: float64 [tokens, classes] of the tokens that are of the text.
        grouping: How.
    """
    begins = (
        np.ones(len(probabilities), dtype=np.bool_)
        if grouping.aggregation == "simple"
        else _begins(text, encoded, splits_words=grouping.splits_words)
    )
    words = _words(encoded.offsets[encoded.content], probabilities, begins, grouping.aggregation)
    scheme = _Scheme(grouping.labels)
    group: list[_Word] = []
    for word in words:
        if group and scheme.separates(group[-1].index, word.index):
            yield from _entity(text, group, scheme)
            group = []
        group.append(word)
    if group:
        yield from _entity(text, group, scheme)


def _begins(text: str, encoded: Encoded, *, splits_words: bool) -> NDArray[np.bool_]:
    """Which of the tokens of the text begin a word.

    transformers takes a token whose letters are as many as its characters for the begin of a word,
    and so joins words whose accents are characters of their own; the tokenizer knows better. For a
    tokenizer that splits no words both take the gaps between them: space alone there, any white
    space here.
    """
    content = encoded.content
    if splits_words:
        words = encoded.words[content]
        return np.concatenate(([True], words[1:] != words[:-1]))
    starts = encoded.offsets[content, 0].tolist()
    gaps = [s == 0 or any(c.isspace() for c in text[s - 1 : s + 1]) for s in starts]
    return np.array(gaps, dtype=np.bool_)


def _words(
    offsets: NDArray[np.int64],
    probabilities: Probabilities,
    begins: NDArray[np.bool_],
    aggregation: Aggregation,
) -> Iterator[_Word]:
    edges = [*np.flatnonzero(begins).tolist(), len(begins)]
    if edges[0] != 0:  # what stands before the first word is one too
        edges.insert(0, 0)
    for start, stop in pairwise(edges):
        scores = _AGREE[aggregation](probabilities[start:stop])
        index = int(scores.argmax())
        first, last = int(offsets[start, 0]), int(offsets[stop - 1, 1])
        yield _Word(start=first, end=last, index=index, score=float(scores[index]))


def _most_certain(scores: Probabilities) -> Probabilities:
    return np.asarray(scores[scores.max(axis=1).argmax()], dtype=np.float64)


def _first(scores: Probabilities) -> Probabilities:
    return np.asarray(scores[0], dtype=np.float64)


def _mean(scores: Probabilities) -> Probabilities:
    return np.asarray(scores.mean(axis=0), dtype=np.float64)


_AGREE: Final[dict[Aggregation, Callable[[Probabilities], Probabilities]]] = {
    "simple": _first,
    "first": _first,
    "average": _mean,
    "max": _most_certain,
}
"""From the scores of a word's tokens [tokens, classes] to those of the word."""

STRATEGIES: Final = tuple(_AGREE)


class _Scheme:
    """What the labels of a model mean.

    ``B-``, ``S-`` and ``U-`` begin a span, ``E-``, ``L-``, ``S-`` and ``U-`` end one, and so does
    another type. Labels of a model that has neither ``B-`` nor ``I-`` are plain: spans end where
    the label changes. transformers knows ``B-`` and ``I-`` alone, and makes of ``E-PER`` a span of
    its own.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._prefixed = any(label.startswith(("B-", "I-")) for label in labels)

    def parts(self, index: int) -> tuple[str, str]:
        """Prefix and type of a class."""
        label = label_of(index, self._labels)
        found = _PREFIXED.fullmatch(label) if self._prefixed else None
        return (found[1], found[2]) if found else ("", label)

    def separates(self, left: int, right: int) -> bool:
        """Whether two words of these classes, side by side, are of two spans."""
        before, kind = self.parts(left)
        after, other = self.parts(right)
        return kind != other or before in _CLOSES or after in _OPENS


def _entity(text: str, words: Sequence[_Word], scheme: _Scheme) -> Iterator[Entity]:
    """The span of some words, without the white space that some tokenizers count to a word."""
    start, end = words[0].start, _whole_character(text, words[-1].end)
    span = text[start:end]
    start += len(span) - len(span.lstrip())
    if span := span.strip():
        yield Entity(
            text=span,
            label=scheme.parts(words[0].index)[1],
            start=start,
            end=start + len(span),
            score=float(np.mean([word.score for word in words])),
        )


def _whole_character(text: str, end: int) -> int:
    """``end``, behind the accents that a tokenizer drops from the last letter."""
    while 0 < end < len(text) and unicodedata.category(text[end]) in _MARKS:
        end += 1
    return end
