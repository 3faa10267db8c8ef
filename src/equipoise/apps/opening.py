"""What every application does alike: open a bundle, see that it fits, close it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final, Protocol, cast

from equipoise.bundle.manifest import Manifest
from equipoise.deploy import load
from equipoise.errors import InputError
from equipoise.runtimes.base import Closing
from equipoise.spec import Array, Feeds, TensorSpec

_FOR_TASK: Final = {
    "sequence-classification": "TextClassifier",
    "token-classification": "TokenClassifier",
    "image-classification": "ImageClassifier",
    "feature-extraction": "Embedder",
    "text-embedding": "Embedder",
    "image-embedding": "Embedder",
}


class OpenBundle(Protocol):
    """An open bundle, as :class:`equipoise.BundleSession` is one."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle holds."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the inputs."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the outputs."""

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Named arrays in, named arrays out."""

    def run_batch(self, feeds: Sequence[Feeds]) -> Sequence[dict[str, Array]]:
        """Samples of batch size 1 and equal shapes, together where that gives the same."""

    def read(self, name: str) -> bytes:
        """A document of the bundle, its hash verified."""

    def preprocess(self, image: Array) -> dict[str, Array]:
        """A picture, uint8 [height, width, 3], as what the engine takes."""

    def close(self) -> None:
        """Free the engine."""


class Application(Closing):
    """Something that a bundle does. A context manager.

    Args:
        bundle: Path of a bundle, which is opened and closed here; or an open one, which stays open.
        threads: Threads per operator, for a path.

    Raises:
        InputError: The bundle is for something else.
        IntegrityError: It is no bundle, or a file is not what its hash says.
    """

    tasks: ClassVar[frozenset[str]]
    """Tasks of a manifest that this is for; a manifest that names none is tried."""

    def __init__(self, bundle: str | Path | OpenBundle, *, threads: int | None) -> None:
        self._owned = isinstance(bundle, str | Path)
        self.session = (
            cast("OpenBundle", load(bundle, threads=threads))
            if isinstance(bundle, str | Path)
            else bundle
        )
        try:
            self._check_task()
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """Look at the bundle, and make what calls need. Raises InputError when it does not fit."""
        raise NotImplementedError

    def _check_task(self) -> None:
        task, mine = self.session.manifest.task, type(self).__name__
        if not task or task in self.tasks:
            return
        other = _FOR_TASK.get(task)
        raise InputError(
            f"the bundle {self.session.manifest.name!r} is for {task};"
            f" {mine} takes {', '.join(sorted(self.tasks))}",
            hint=f"Use {other}." if other else "Give its arrays to equipoise.load(...).run.",
        )

    def close(self) -> None:
        """Free the engine, if it was opened here."""
        if self._owned:
            self.session.close()


def output_of(bundle: OpenBundle, *, rank: int, what: str) -> str:
    """The output with ``rank`` axes that is called ``logits``, or the first one.

    Raises:
        InputError: There is none.
    """
    fitting = [spec.name for spec in bundle.outputs if len(spec.shape) == rank]
    if not fitting:
        raise InputError(
            f"the bundle {bundle.manifest.name!r} gives no {what}, but"
            f" {'; '.join(map(str, bundle.outputs))}",
            hint="Give its arrays to equipoise.load(...).run, and read the outputs yourself.",
        )
    return "logits" if "logits" in fitting else fitting[0]
