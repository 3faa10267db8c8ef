"""The seam of a runtime: a Builder makes an engine from an ONNX file, a Session runs it.

Protocols, so that a runtime from outside need not import equipoise to fit. No framework type
appears here: arrays are NumPy's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from equipoise.spec import Array, Feeds, TensorSpec


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """How a session runs.

    Attributes:
        threads: Threads that share one operator.
        optimize: ``all`` lets the runtime rewrite the graph; ``none`` runs it as written, which
            tells a kernel or rewrite fault from a fault of the model.
        spin: Let idle threads spin between runs. Faster for one session, ruinous when several
            sessions share the cores, as in an interleaved measurement.
    """

    threads: int = 1
    optimize: Literal["all", "none"] = "all"
    spin: bool = False


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Whether a runtime can be used here; if not, why, and which line installs it."""

    available: bool
    version: str = ""
    reason: str = ""
    install: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What a builder made.

    Attributes:
        file: Name of the engine file inside the output directory.
        size_bytes: Bytes on disk of everything the engine loads.
        kernels: Operator type -> count in the graph as the runtime rewrote it. Shows whether a
            quantised operator really runs in integers.
        notes: What the builder noticed, in words.
    """

    file: str
    size_bytes: int
    kernels: dict[str, int]
    notes: tuple[str, ...] = ()


class Session(Protocol):
    """A loaded engine: named arrays in, named arrays out. A context manager."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the inputs, in the engine's order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the outputs, in the engine's order."""

    def run(self, feeds: Feeds, *, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run once.

        Args:
            feeds: One array per input.
            out: Arrays to write outputs into, by name; outputs not named are new arrays.

        Raises:
            InputError: ``feeds`` or ``out`` do not fit the specs.
            BackendError: The runtime failed.
        """

    def close(self) -> None:
        """Free the engine. Running a closed session is a UsageError; closing twice is not."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Builder(Protocol):
    """Makes an engine for one runtime."""

    def availability(self) -> Availability:
        """Whether this runtime can build and run here."""

    def build(self, model: Path, output: Path, *, settings: SessionSettings) -> EngineRecord:
        """Make an engine from ``model`` in the directory ``output`` and prove that it loads.

        Raises:
            SourceError: ``model`` is no ONNX model that this runtime accepts.
            MissingExtraError: The runtime is not installed.
        """


class SessionOpener(Protocol):
    """What the registry finds under a runtime's session name: a callable that opens an engine."""

    def __call__(self, engine: Path, *, settings: SessionSettings) -> Session:
        """Open ``engine``. Raises InputError or MissingExtraError."""
