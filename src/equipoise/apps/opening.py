"""What every application does alike: open a bundle, see that it fits, keep up with it, close it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final, Generic, Protocol, TypeVar

from equipoise.bundle.manifest import Engine, Manifest
from equipoise.deploy import Keys, load
from equipoise.errors import InputError, UsageError
from equipoise.runtimes.base import Closing
from equipoise.spec import Array, Feeds, TensorSpec

S = TypeVar("S")
T = TypeVar("T")

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
    def engine(self) -> Engine:
        """The engine that runs."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the inputs."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the outputs."""

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Named arrays in, named arrays out."""

    def run_batch(self, feeds: Sequence[Feeds], *, most: int) -> Sequence[dict[str, Array]]:
        """Samples, those of equal shapes together where that was shown to give the same."""

    def read(self, name: str) -> bytes:
        """A document of the bundle, its hash verified."""

    def preprocess(self, image: Array) -> dict[str, Array]:
        """A picture, uint8 [height, width, 3], as what the engine takes."""

    def close(self) -> None:
        """Free the engine."""


class Application(Closing, Generic[S]):
    """Something that a bundle does. A context manager; threads may share it.

    Args:
        bundle: Path of a bundle, which is opened and closed here; or an open one, which stays open.
        trust: Public keys, for a path; see :func:`equipoise.load`.
        threads: Threads per operator, for a path.

    Raises:
        InputError: The bundle is for something else.
        UsageError: ``trust`` or ``threads`` for a bundle that is open already.
        IntegrityError: It is no bundle, is not signed, or a file is not what its hash says.
    """

    tasks: ClassVar[frozenset[str]]
    """Tasks of a manifest that this is for; a manifest that names none is tried."""

    def __init__(
        self, bundle: str | Path | OpenBundle, *, trust: Keys, threads: int | None
    ) -> None:
        self._owned = isinstance(bundle, str | Path)
        self.session = _opened(bundle, trust=trust, threads=threads)
        try:
            manifest = self.session.manifest
            self._made = manifest, self._checked(manifest)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _prepare(self) -> S:
        """What calls need of the bundle. Raises InputError when it does not fit."""

    def _answer(self, compute: Callable[[S], T]) -> T:
        """What ``compute`` makes, of one bundle from beginning to end.

        The open bundle may be replaced by another while it runs (``reload``), which may have
        another tokenizer and other labels. What was half of each is thrown away.
        """
        while True:
            manifest = self.session.manifest
            if self._made[0] is not manifest:
                self._made = manifest, self._checked(manifest)
            made = self._made
            found = compute(made[1])
            if made[0] is self.session.manifest:
                return found

    def _checked(self, manifest: Manifest) -> S:
        if manifest.task and manifest.task not in self.tasks:
            other = _FOR_TASK.get(manifest.task)
            raise InputError(
                f"the bundle {manifest.name!r} is for {manifest.task};"
                f" {type(self).__name__} takes {', '.join(sorted(self.tasks))}",
                hint=f"Use {other}." if other else "Give its arrays to equipoise.load(...).run.",
            )
        return self._prepare()

    def close(self) -> None:
        """Free the engine, if it was opened here."""
        if self._owned:
            self.session.close()


def _opened(bundle: str | Path | OpenBundle, *, trust: Keys, threads: int | None) -> OpenBundle:
    if isinstance(bundle, str | Path):
        return load(bundle, trust=trust, threads=threads)
    if trust or threads is not None:
        raise UsageError(
            "trust and threads count when a bundle is opened, and this one is open",
            hint="Give them to equipoise.load, or give a path.",
        )
    return bundle


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
