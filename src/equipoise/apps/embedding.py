"""Vectors of texts and of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from equipoise.apps.batches import TextRunner, TextSettings, as_batch
from equipoise.apps.opening import Application, OpenBundle
from equipoise.apps.pictures import PictureRunner, takes_pictures
from equipoise.data.images import MAX_PIXELS
from equipoise.data.text import Encoded
from equipoise.deploy import Keys
from equipoise.errors import InputError, NonFiniteError, unknown_name
from equipoise.spec import Array, Feeds, TensorSpec

Vectors = NDArray[np.float32]
Pooling = Literal["auto", "mean", "cls", "model"]

POOLINGS: Final = ("auto", "mean", "cls", "model")
_DEFAULT: Final = TextSettings()
_POOLED: Final = (
    "sentence_embedding", "text_embeds", "image_embeds", "embedding", "embeddings"
)  # fmt: skip
"""Outputs that are called what an embedding is called."""

_LEAST_NORM: Final = 1e-12
"""As ``torch.nn.functional.normalize`` has it: a vector of zeros stays one."""


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    runner: TextRunner | PictureRunner
    output: str
    pooling: Pooling

    def pooled(self, outputs: Feeds, row: Encoded | None = None) -> Vectors:
        """One vector. Padding stands behind the tokens of ``row`` and is left out."""
        values: Vectors = outputs[self.output][0].astype(np.float32)
        if self.pooling == "model":
            return values
        if row is None:
            return _of_picture(values, cls=self.pooling == "cls")
        return values[0] if self.pooling == "cls" else _mean(values[: len(row)])

    def vectors(self, given: Sequence[object]) -> list[Vectors]:
        """One of each text or picture. Raises DataError."""
        runner = self.runner
        if isinstance(runner, PictureRunner):
            return [self.pooled(outputs) for outputs in runner.run(given)]
        texts = [runner.check(text, where=f"text {i}") for i, text in enumerate(given)]
        return runner.map([runner.encoder.encode(text) for text in texts], self.pooled)


class Embedder(Application[_Prepared]):
    """Gives texts or pictures vectors that lie close where they mean the same. A context manager.

    A text that is longer than the bundle allows is cut at its end.

    Args:
        bundle: Path of a bundle, or an open one.
        pooling: ``mean`` of the vectors of all tokens that are no padding, special ones included,
            as sentence-transformers has it; ``cls``, the vector of the first token; ``model``, what
            the model itself makes of them, an output [batch, size]; ``auto``: ``model`` where an
            output is called an embedding or there is no other kind, for pictures wherever there is
            one, ``mean`` elsewhere. BERT's ``pooler_output`` is no embedding of a sentence, and
            is taken only when asked for.
        normalize: Make every vector of length 1, so that a dot product is a cosine.
        settings: Batches, lengths and limits of texts.
        trust: Public keys, one of which has to have signed, for a path; see :func:`equipoise.load`.
        threads: Threads per operator, for a path; as measured when None.

    Raises:
        InputError: The bundle is for something else, has no tokenizer, or no such output.
        UsageError: There is no such pooling.
        IntegrityError: It is no bundle, is not signed, or a file is not what its hash says.
        MissingExtraError: ``tokenizers`` or the runtime is not installed.
    """

    tasks: ClassVar = frozenset(
        {"encoder", "feature-extraction", "image-embedding", "text-embedding"}
    )

    def __init__(  # noqa: PLR0913  settings of one small thing each
        self,
        bundle: str | Path | OpenBundle,
        *,
        pooling: Pooling = "auto",
        normalize: bool = False,
        settings: TextSettings = _DEFAULT,
        trust: Keys = (),
        threads: int | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise unknown_name("pooling", pooling, POOLINGS)
        self._asked, self._normalize, self._settings = pooling, normalize, settings
        super().__init__(bundle, trust=trust, threads=threads)

    @property
    def pooling(self) -> Pooling:
        """How vectors are made: what was asked for, or what ``auto`` has become."""
        return self._made[1].pooling

    def _prepare(self) -> _Prepared:
        pictures = takes_pictures(self.session)
        output, pooling = _choose(self.session, self._asked, pictures=pictures)
        runner = (
            PictureRunner(self.session, max_pixels=MAX_PIXELS)
            if pictures
            else TextRunner(self.session, self._settings)
        )
        return _Prepared(runner=runner, output=output, pooling=pooling)

    def __call__(self, given: object) -> Vectors:
        """Vectors of a text or a picture, or of each of a list.

        Args:
            given: A text; a picture as :class:`equipoise.ImageClassifier` takes one; or a list.

        Returns:
            float32 [size], and for a list float32 [number, size], in its order.

        Raises:
            DataError: Something is no text or no picture, is empty or too long; says which one.
            NonFiniteError: The engine gave NaN.
        """
        single = not isinstance(given, list | tuple)
        items = [given] if single else as_batch(given, what="text or picture")
        vectors = self._answer(lambda prepared: prepared.vectors(items))
        found = self._finished(np.stack(vectors))
        return np.asarray(found[0]) if single else found

    def _finished(self, vectors: Vectors) -> Vectors:
        if not np.isfinite(vectors).all():
            raise NonFiniteError(
                "the model's vectors hold NaN or infinity",
                hint="Run the bundle's self-test on this device: equipoise run BUNDLE --selftest",
            )
        if not self._normalize:
            return vectors
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(norms, _LEAST_NORM), dtype=np.float32)


def _mean(tokens: Array) -> Vectors:
    return np.asarray(tokens.mean(axis=0, dtype=np.float64), dtype=np.float32)


def _of_picture(values: Array, *, cls: bool) -> Vectors:
    """From patches [patches, size] or a map [size, height, width]."""
    if values.ndim == 3:
        return np.asarray(values.mean(axis=(1, 2), dtype=np.float64), dtype=np.float32)
    return np.asarray(values[0]) if cls else _mean(values)


def _choose(bundle: OpenBundle, asked: Pooling, *, pictures: bool) -> tuple[str, Pooling]:
    """The output to take, and how to pool it. Raises InputError when there is none."""
    whole = [spec for spec in bundle.outputs if len(spec.shape) == 2]
    ranks = {3, 4} if pictures else {3}
    parts = [spec for spec in bundle.outputs if len(spec.shape) in ranks]
    named = [spec for spec in whole if spec.name in _POOLED]
    if asked == "auto":
        own = bool(named) or (bool(whole) and (pictures or not parts))
        asked = "model" if own else "mean"
    found: list[TensorSpec] = (named or whole) if asked == "model" else parts
    if not found:
        shape = "[batch, size]" if asked == "model" else "[batch, tokens, size]"
        raise InputError(
            f"pooling {asked!r} needs an output {shape}; the bundle {bundle.manifest.name!r} gives"
            f" {'; '.join(map(str, bundle.outputs))}",
            hint="Choose another pooling.",
        )
    return found[0].name, asked
