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
from equipoise.deploy import Keys
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


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """Attributes: room: Tokens of a text that the model sees at once."""

    runner: TextRunner
    output: str
    grouping: Grouping
    room: int
    stride: int

    def windows(self, row: Encoded) -> tuple[Window, ...]:
        """None for a text without a token: there is nothing to ask the model."""
        tokens = row.content.size
        return windows(tokens, room=self.room, stride=self.stride) if tokens else ()

    def scores(self, outputs: Feeds, row: Encoded) -> Probabilities:
        """Probabilities of the tokens that are of the text: [tokens, classes]."""
        return softmax(outputs[self.output][0][row.content])


class TokenClassifier(Application[_Prepared]):
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
        trust: Public keys, one of which has to have signed, for a path; see :func:`equipoise.load`.
        threads: Threads per operator, for a path; as measured when None.

    Raises:
        InputError: The bundle is for something else, has no tokenizer, or ``stride`` is too large.
        UsageError: There is no such aggregation.
        IntegrityError: It is no bundle, is not signed, or a file is not what its hash says.
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
        trust: Keys = (),
        threads: int | None = None,
    ) -> None:
        if aggregation not in STRATEGIES:
            raise unknown_name("aggregation", aggregation, STRATEGIES)
        self._aggregation, self._ignore, self._stride = aggregation, frozenset(ignore), stride
        self._settings = settings
        super().__init__(bundle, trust=trust, threads=threads)

    def _prepare(self) -> _Prepared:
        output = output_of(self.session, rank=3, what="scores [batch, tokens, classes]")
        runner = TextRunner(self.session, self._settings)
        room = runner.encoder.whole("").room(runner.encoder.max_length)
        grouping = Grouping(
            labels=self.session.manifest.labels,
            aggregation=self._aggregation,
            splits_words=runner.encoder.splits_words,
        )
        stride = self._stride_in(room)
        return _Prepared(runner=runner, output=output, grouping=grouping, room=room, stride=stride)

    def _stride_in(self, room: int) -> int:
        stride = room // _SHARED if self._stride is None else self._stride
        if not 0 <= stride < room:
            raise InputError(
                f"windows cannot share {stride} tokens: the model sees {room} of a text at once",
                hint="Give a smaller stride, or none.",
            )
        return stride

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
        found = self._answer(lambda prepared: self._found(given, prepared))
        return found[0] if single else tuple(found)

    def _found(self, given: Sequence[object], prepared: _Prepared) -> list[tuple[Entity, ...]]:
        """All windows of all texts run together."""
        runner = prepared.runner
        texts = [runner.check(text, where=f"text {i}", empty=True) for i, text in enumerate(given)]
        whole = [runner.encoder.whole(text) for text in texts]
        seen = [prepared.windows(row) for row in whole]
        rows = [
            row.part(window.start, window.stop)
            for row, of_row in zip(whole, seen, strict=True)
            for window in of_row
        ]
        scores = iter(runner.map(rows, prepared.scores))
        decided = [
            [next(scores)[w.first - w.start : w.last - w.start] for w in of_row] for of_row in seen
        ]
        return [
            self._entities(text, row, pieces, grouping=prepared.grouping)
            for text, row, pieces in zip(texts, whole, decided, strict=True)
        ]

    def _entities(
        self, text: str, row: Encoded, pieces: Sequence[Probabilities], *, grouping: Grouping
    ) -> tuple[Entity, ...]:
        if not pieces:
            return ()
        entities = find_entities(text, row, np.concatenate(pieces), grouping=grouping)
        return tuple(entity for entity in entities if entity.label not in self._ignore)
