"""Entities in texts of any length."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Final, overload

import numpy as np

from equipoise.apps.batches import TextRunner, TextSettings, as_batch
from equipoise.apps.entities import STRATEGIES, Aggregation, Entity, Grouping, find_entities
from equipoise.apps.opening import Application, OpenBundle, output_of
from equipoise.data.decode import Probabilities, softmax
from equipoise.data.text import Encoded
from equipoise.errors import InputError, unknown_name
from equipoise.spec import Feeds

_DEFAULT: Final = TextSettings()
_SHARED: Final = 4
"""Windows share one token in so many."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of a long text that the model sees at once, counted in tokens of the text.

    Attributes:
        start: The first token that it sees.
        stop: The one behind the last.
        first: The first token that it decides.
        last: The one behind the last that it decides.
    """

    start: int
    stop: int
    first: int
    last: int


def windows(tokens: int, *, room: int, stride: int) -> tuple[Window, ...]:
    """Windows over a text, each full, so that every token is decided once.

    Two windows that follow each other see some tokens both, at least ``stride``. Each of those is
    decided by the window in which it stands farther from the edge, which is where more of its
    neighbours are seen; the earlier one where that is equal.

    Args:
        tokens: Tokens of the text.
        room: Tokens of a text that the model sees at once.
        stride: Tokens that two windows share at least; below ``room``.
    """
    starts = [*range(0, max(tokens - room, 0), room - stride), max(tokens - room, 0)]
    edges = [0, *((a + room + b + 1) // 2 for a, b in pairwise(starts)), tokens]
    return tuple(
        Window(start=s, stop=min(s + room, tokens), first=edges[i], last=edges[i + 1])
        for i, s in enumerate(starts)
    )


class TokenClassifier(Application):
    """Finds entities in texts. A context manager.

    A text that is longer than the bundle allows is seen through overlapping windows
    (:func:`windows`), so that nothing of it is lost, and no entity is cut at an edge.

    Args:
        bundle: Path of a bundle, or an open one.
        aggregation: How the tokens of a word agree: ``first`` (the first decides), ``average``,
            ``max`` (the most certain one decides), or ``simple``: every token for itself.
        ignore: Labels that are no entities.
        stride: Tokens that two windows share; a quarter of a window when None.
        settings: Batches, lengths and limits.
        threads: Threads per operator, for a path; as measured when None.

    Raises:
        InputError: The bundle is for something else, has no tokenizer, or ``stride`` is too large.
        UsageError: There is no such aggregation.
        IntegrityError: It is no bundle, or a file is not what its hash says.
        MissingExtraError: ``tokenizers`` or the runtime is not installed.
    """

    tasks: ClassVar = frozenset({"token-classification"})

    def __init__(  # noqa: PLR0913  settings of one small thing each
        self,
        bundle: str | Path | OpenBundle,
        *,
        aggregation: Aggregation = "first",
        ignore: Collection[str] = ("O",),
        stride: int | None = None,
        settings: TextSettings = _DEFAULT,
        threads: int | None = None,
    ) -> None:
        if aggregation not in STRATEGIES:
            raise unknown_name("aggregation", aggregation, STRATEGIES)
        self._aggregation, self._ignore, self._stride = aggregation, frozenset(ignore), stride
        self._settings = settings
        super().__init__(bundle, threads=threads)

    def _prepare(self) -> None:
        self._output = output_of(self.session, rank=3, what="scores [batch, tokens, classes]")
        self._runner = TextRunner(self.session, self._settings)
        encoder = self._runner.encoder
        self._grouping = Grouping(
            labels=self.session.manifest.labels,
            aggregation=self._aggregation,
            splits_words=encoder.splits_words,
        )
        self._room = encoder.whole("").room(encoder.max_length)
        if self._stride is None:
            self._stride = self._room // _SHARED
        if not 0 <= self._stride < self._room:
            raise InputError(
                f"windows cannot share {self._stride} tokens: the model sees {self._room} of a text"
                " at once",
                hint="Give a smaller stride, or none.",
            )

    @overload
    def __call__(self, texts: str) -> tuple[Entity, ...]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, texts: Sequence[str]) -> tuple[tuple[Entity, ...], ...]: ...
    def __call__(
        self, texts: str | Sequence[str]
    ) -> tuple[Entity, ...] | tuple[tuple[Entity, ...], ...]:
        """Find the entities of a text, or of each text of a list.

        Returns:
            Entities in the order of the text; none for an empty text. For a list as many of
            those, in its order.

        Raises:
            DataError: Something is no text, or too long; says which one.
            NonFiniteError: The engine gave NaN.
        """
        single = isinstance(texts, str)
        given = [texts] if single else as_batch(texts, what="text")
        checked = [
            self._runner.check(text, where=f"text {i}", empty=True) for i, text in enumerate(given)
        ]
        found = self._found(checked)
        return found[0] if single else tuple(found)

    def _found(self, texts: Sequence[str]) -> list[tuple[Entity, ...]]:
        """All windows of all texts run together."""
        whole = [self._runner.encoder.whole(text) for text in texts]
        parts = [self._windows(row) for row in whole]
        rows = [
            row.part(window.start, window.stop)
            for row, seen in zip(whole, parts, strict=True)
            for window in seen
        ]
        scores = iter(self._runner.map(rows, self._scores))
        joined = [[next(scores)[w.first - w.start : w.last - w.start] for w in ws] for ws in parts]
        return [
            self._entities(text, row, pieces)
            for text, row, pieces in zip(texts, whole, joined, strict=True)
        ]

    def _windows(self, row: Encoded) -> tuple[Window, ...]:
        """None for a text without a token: there is nothing to ask the model."""
        tokens = row.content.size
        return windows(tokens, room=self._room, stride=self._stride or 0) if tokens else ()

    def _scores(self, outputs: Feeds, row: Encoded) -> Probabilities:
        """Probabilities of the tokens that are of the text: [tokens, classes]."""
        return softmax(outputs[self._output][0][row.content])

    def _entities(
        self, text: str, row: Encoded, pieces: Sequence[Probabilities]
    ) -> tuple[Entity, ...]:
        if not pieces:
            return ()
        entities = find_entities(text, row, np.concatenate(pieces), grouping=self._grouping)
        return tuple(entity for entity in entities if entity.label not in self._ignore)
