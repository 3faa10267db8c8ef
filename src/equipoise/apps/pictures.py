"""Classes of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol, overload

from equipoise.apps.batches import as_batch, run_rows
from equipoise.apps.classification import Classification, classified
from equipoise.apps.opening import Application, OpenBundle, output_of
from equipoise.data.images import MAX_PIXELS, decode_picture, takes_picture
from equipoise.deploy import Keys
from equipoise.errors import InputError
from equipoise.spec import Array, Feeds


class PillowPicture(Protocol):
    """A picture of Pillow, which need not be installed to name one."""

    def convert(self, mode: str) -> Any:
        """As another mode."""


Picture = str | Path | bytes | Array | PillowPicture
"""A path, the bytes of a file, a picture of Pillow, or uint8 [height, width, 3] in RGB."""

_BATCH: Final = 8


class PictureRunner:
    """Decodes and prepares pictures, and runs them.

    Args:
        bundle: An open bundle that takes pictures.
        max_pixels: Largest picture that is taken.

    Raises:
        InputError: It takes something else, or does not say how a picture is prepared.
    """

    def __init__(self, bundle: OpenBundle, *, max_pixels: int) -> None:
        self._bundle, self._max_pixels = bundle, max_pixels
        if not takes_pictures(bundle):
            raise InputError(
                f"the bundle {bundle.manifest.name!r} takes no picture that it says how to prepare,"
                f" but {'; '.join(map(str, bundle.inputs))}",
                hint="Prepare the arrays as for the PyTorch model, and give them to"
                " equipoise.load(...).run.",
            )
        self._spec = bundle.inputs[0]
        batch = self._spec.shape[0]
        self._batch = batch if isinstance(batch, int) else None

    def run(self, pictures: Sequence[object]) -> Iterator[Feeds]:
        """Outputs of batch size 1 for each picture, in order. Raises DataError."""
        for start in range(0, len(pictures), _BATCH):
            feeds = [self._feeds(picture) for picture in pictures[start : start + _BATCH]]
            if len({next(iter(f.values())).shape for f in feeds}) == 1:
                yield from run_rows(self._bundle, feeds, batch=self._batch)
            else:
                yield from (run_rows(self._bundle, [f], batch=self._batch)[0] for f in feeds)

    def _feeds(self, picture: object) -> dict[str, Array]:
        return self._bundle.preprocess(decode_picture(picture, max_pixels=self._max_pixels))


def takes_pictures(bundle: OpenBundle) -> bool:
    """Whether the bundle's one input is a picture that it knows how to prepare."""
    inputs = bundle.inputs
    return len(inputs) == 1 and takes_picture(inputs[0], bundle.manifest.preprocessing)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    runner: PictureRunner
    output: str
    labels: tuple[str, ...]


class ImageClassifier(Application[_Prepared]):
    """Says of which class a picture is. A context manager.

    Args:
        bundle: Path of a bundle, or an open one.
        multi_label: Classes do not exclude each other: each gets its own probability.
        max_pixels: A larger picture is refused before it is decoded.
        trust: Public keys, one of which has to have signed, for a path; see :func:`equipoise.load`.
        threads: Threads per operator, for a path; as measured when None.

    Raises:
        InputError: The bundle is for something else, or does not say how pictures are prepared.
        IntegrityError: It is no bundle, is not signed, or a file is not what its hash says.
        MissingExtraError: The runtime is not installed.
    """

    tasks: ClassVar = frozenset({"image-classification"})

    def __init__(
        self,
        bundle: str | Path | OpenBundle,
        *,
        multi_label: bool = False,
        max_pixels: int = MAX_PIXELS,
        trust: Keys = (),
        threads: int | None = None,
    ) -> None:
        self._multi_label, self._max_pixels = multi_label, max_pixels
        super().__init__(bundle, trust=trust, threads=threads)

    def _prepare(self) -> _Prepared:
        return _Prepared(
            output=output_of(self.session, rank=2, what="scores [batch, classes]"),
            runner=PictureRunner(self.session, max_pixels=self._max_pixels),
            labels=self.session.manifest.labels,
        )

    @overload
    def __call__(self, pictures: Picture) -> Classification: ...
    @overload
    def __call__(self, pictures: list[Any]) -> tuple[Classification, ...]: ...
    def __call__(
        self, pictures: Picture | list[Any]
    ) -> Classification | tuple[Classification, ...]:
        """Classify a picture, or each of a list.

        Args:
            pictures: A path, the bytes of a file, a picture of Pillow, an array uint8
                [height, width, 3] in RGB; or a list of those.

        Returns:
            A decision, of which ``top(5)`` has the five likeliest classes; for a list as many, in
            its order.

        Raises:
            DataError: Something is no picture, is damaged or too large.
            MissingExtraError: Pillow is needed and not installed.
            NonFiniteError: The engine gave NaN.
        """
        single = not isinstance(pictures, list | tuple)
        given = [pictures] if single else as_batch(pictures, what="picture")
        found = self._answer(lambda prepared: self._classified(given, prepared))
        return found[0] if single else found

    def _classified(
        self, pictures: Sequence[object], prepared: _Prepared
    ) -> tuple[Classification, ...]:
        return tuple(
            classified(outputs[prepared.output][0], prepared.labels, multi_label=self._multi_label)
            for outputs in prepared.runner.run(pictures)
        )
