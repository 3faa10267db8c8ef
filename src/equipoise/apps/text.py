"""Classes of texts and of pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, overload

from equipoise.apps.batches import TextRunner, TextSettings, as_batch
from equipoise.apps.classification import Classification, classified
from equipoise.apps.opening import Application, OpenBundle, output_of
from equipoise.data.text import Encoded
from equipoise.deploy import Keys
from equipoise.errors import DataError
from equipoise.spec import Feeds

Text = str | tuple[str, str]
"""A text, or a pair of texts as a tuple."""

_DEFAULT: Final = TextSettings()


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    runner: TextRunner
    output: str
    labels: tuple[str, ...]


class TextClassifier(Application[_Prepared]):
    """Says of which class a text is, or a pair of texts. A context manager.

    A text that is longer than the bundle allows is cut at its end, and of a pair the longer text
    is, as transformers does with ``truncation=True``.

    Args:
        bundle: Path of a bundle, or an open one.
        multi_label: Classes do not exclude each other: each gets its own probability (sigmoid).
            Otherwise they share one (softmax), and a model with a single output gives its value.
        settings: Batches, lengths and limits.
        trust: Public keys, one of which has to have signed, for a path; see :func:`equipoise.load`.
        threads: Threads per operator, for a path; as measured when None.

    Raises:
        InputError: The bundle is for something else, or has no tokenizer.
        IntegrityError: It is no bundle, is not signed, or a file is not what its hash says.
        MissingExtraError: ``tokenizers`` or the runtime is not installed.
    """

    tasks: ClassVar = frozenset({"sequence-classification"})

    def __init__(
        self,
        bundle: str | Path | OpenBundle,
        *,
        multi_label: bool = False,
        settings: TextSettings = _DEFAULT,
        trust: Keys = (),
        threads: int | None = None,
    ) -> None:
        self._multi_label, self._settings = multi_label, settings
        super().__init__(bundle, trust=trust, threads=threads)

    def _prepare(self) -> _Prepared:
        return _Prepared(
            output=output_of(self.session, rank=2, what="scores [batch, classes]"),
            runner=TextRunner(self.session, self._settings),
            labels=self.session.manifest.labels,
        )

    @overload
    def __call__(self, texts: Text) -> Classification: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, texts: Sequence[Text]) -> tuple[Classification, ...]: ...
    def __call__(self, texts: Text | Sequence[Text]) -> Classification | tuple[Classification, ...]:
        """Classify a text, a pair (a tuple of two), or a list of them.

        Returns:
            One decision, or for a list as many, in its order.

        Raises:
            DataError: Something is no text, is empty or too long; says which one.
            NonFiniteError: The engine gave NaN.
        """
        single = isinstance(texts, str | tuple)
        given = [texts] if single else as_batch(texts, what="text")
        found = self._answer(lambda prepared: self._classified(given, prepared))
        return found[0] if single else tuple(found)

    def _classified(self, texts: Sequence[object], prepared: _Prepared) -> list[Classification]:
        rows = [self._encoded(text, prepared.runner, number=i) for i, text in enumerate(texts)]

        def decided(outputs: Feeds, _row: Encoded) -> Classification:
            scores = outputs[prepared.output][0]
            return classified(scores, prepared.labels, multi_label=self._multi_label)

        return prepared.runner.map(rows, decided)

    @staticmethod
    def _encoded(given: object, runner: TextRunner, *, number: int) -> Encoded:
        where = f"text {number}"
        texts = given if isinstance(given, tuple) else (given,)
        if len(texts) not in {1, 2}:
            raise DataError(
                f"{where} is a tuple of {len(texts)}",
                hint="A pair is a tuple of two texts; give several texts as a list.",
            )
        first, *second = [runner.check(text, where=where) for text in texts]
        return runner.encoder.encode(first, pair=second[0] if second else None)
