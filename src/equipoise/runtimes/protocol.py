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
        providers: Execution providers or devices to run on, in order, and no others; the runtime's
            own CPU when empty.
        hint: What to be fast at: one request at a time, or many at once.
        exact_integers: Add int8 products in 32 bits on CPUs without VNNI too, where kernels would
            saturate in 16; slower.
    """

    threads: int = 1
    optimize: Literal["all", "none"] = "all"
    spin: bool = False
    providers: tuple[str, ...] = ()
    hint: Literal["latency", "throughput"] = "latency"
    exact_integers: bool = False


@dataclass(frozen=True, kw_only=True)
class SizeRange:
    """The sizes that a dynamic dimension takes.

    Attributes:
        least: The smallest.
        usual: The one to be fastest at.
        largest: The largest.
    """

    least: int
    usual: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How an engine is built, for runtimes that compile one.

    Attributes:
        profiles: Dynamic dimension -> its sizes; the engine has kernels for each profile.
        compute_capabilities: Of the NVIDIA GPUs that it is for, such as ``8.6``; those of the GPU
            here when empty.
        timing_cache: File in which kernel timings are kept between builds.
        version_compatible: Let later versions of the runtime load it.
        hardware_compatible: Let other GPUs of the same generation and later ones load it.
        strip_weights: Leave the weights out; they are put in from the ONNX file when it is opened.
    """

    profiles: tuple[dict[str, SizeRange], ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False


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
        version: Of the runtime that made it, where the engine holds for that one alone.
        compute_capabilities: Of the NVIDIA GPUs that it holds for.
        loaded: Whether it was loaded here; an engine for another device is only built.
        build_s: How long building it took, the import of its runtime included; 0 where that was
            not measured.
    """

    file: str
    size_bytes: int
    kernels: dict[str, int]
    notes: tuple[str, ...] = ()
    version: str = ""
    compute_capabilities: tuple[str, ...] = ()
    loaded: bool = True
    build_s: float = 0.0


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

    def build(
        self,
        model: Path,
        output: Path,
        *,
        settings: SessionSettings,
        options: BuildSettings | None = None,
    ) -> EngineRecord:
        """Make an engine from ``model`` in the directory ``output``; load it where it can be.

        Raises:
            SourceError: ``model`` is no ONNX model that this runtime accepts.
            MissingExtraError: The runtime is not installed.
            IncompatibleError: It cannot be built for what ``options`` ask for.
        """

    def refusals(self, model: Path) -> tuple[str, ...] | None:
        """What of ``model`` this runtime would refuse, node by node; None if that is not known.

        Nothing is built. Raises SourceError when it is no ONNX model.
        """


class SessionOpener(Protocol):
    """What the registry finds under a runtime's session name: a callable that opens an engine."""

    def __call__(self, engine: Path, *, settings: SessionSettings) -> Session:
        """Open ``engine``. Raises InputError or MissingExtraError."""


class BytesOpener(Protocol):
    """What opens an engine of one file from its content, for runtimes that need no file."""

    def __call__(self, data: bytes | Path, *, settings: SessionSettings, where: Path) -> Session:
        """Open the engine ``data``, which came from ``where``. Raises as :class:`SessionOpener`.

        A path is that of a copy, which goes away once the engine is open.
        """
