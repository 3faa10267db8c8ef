"""The sides of a parity check: the float ONNX file and each engine, run on the same samples.

    PyTorch ── exporter ── float ONNX, as written ── runtime kernels ── float ONNX, optimised
                                  │
                                  ├── quantiser ── file, as written ── runtime kernels ── optimised
                                  └── build ── engine of another runtime

Each side knows the side before it and the step between them, so a difference has a place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from equipoise import fs, progress, record
from equipoise.data.store import Rows, write_rows
from equipoise.engines import find_engine
from equipoise.errors import BackendError, UsageError
from equipoise.isolation import run_isolated
from equipoise.parity.precision import Precision, precision_of
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import Session, SessionSettings
from equipoise.runtimes.registry import builder
from equipoise.spec import Array, Feeds
from equipoise.stages import Observer

REFERENCE: Final = "PyTorch"
FLOAT_WRITTEN: Final = "float ONNX, as written"
FLOAT_OPTIMISED: Final = "float ONNX, optimised"
_KERNELS: Final = "runtime kernels"
_STEPS: Final = {
    "float32": "changes to the file",
    "float16": "conversion to half precision",
    "bfloat16": "conversion to half precision",
}
"""What made a file of some precision out of the float one; else the quantiser."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a check.

    Attributes:
        name: For people.
        path: What ``equipoise.engines.find_engine`` takes.
        before: Name of the side that it is made from; of the reference for the first.
        step: What lies between them.
        precision: The lowest that it computes in.
        settings: How it runs.
        build_with: Runtime that it is built with first; empty for an engine as it is.
        given: Whether the user asked for it; the others are there to tell the steps apart.
    """

    name: str
    path: Path
    before: str
    step: str
    precision: str
    settings: SessionSettings = field(default_factory=SessionSettings)
    build_with: str = ""
    given: bool = False


@dataclass(frozen=True, kw_only=True)
class SideSettings:
    """How the sides of a check are run.

    Attributes:
        session: How every session is opened.
        runtime: What ONNX files are built with.
        precision: Of engines that do not say theirs.
    """

    session: SessionSettings = field(default_factory=SessionSettings)
    runtime: str = "onnxruntime"
    precision: Precision | None = None


def sides_of(
    engines: Sequence[Path], float_model: Path, *, reference: str, settings: SideSettings
) -> tuple[Side, ...]:
    """The sides of a check, each after the one that it is made from.

    Args:
        engines: Bundles, engine directories or ONNX files.
        float_model: The float export.
        reference: Name of the reference: ``PyTorch``.
        settings: How they run.

    Raises:
        SourceError: A path holds no engine.
        IntegrityError: An engine is not what its manifest says.
        UsageError: An engine does not say its precision, and ``settings`` do not either.
    """
    written = Side(
        name=FLOAT_WRITTEN,
        path=float_model,
        before=reference,
        step="exporter",
        precision="float32",
        settings=replace(settings.session, optimize="none"),
    )
    optimised = replace(
        written,
        name=FLOAT_OPTIMISED,
        before=FLOAT_WRITTEN,
        step=_KERNELS,
        settings=settings.session,
    )
    sides = [written, optimised]
    for path in engines:
        sides += _sides(path, sides, settings=settings)
    return tuple(sides)


def _sides(path: Path, so_far: Sequence[Side], *, settings: SideSettings) -> Iterator[Side]:
    engine = find_engine(path)
    given = Side(
        name=str(path),
        path=path,
        before=FLOAT_WRITTEN,
        step="",
        precision=settings.precision or _precision(engine, path),
        settings=settings.session,
        given=True,
    )
    if not _runs_as_written(engine):
        alike = [s for s in so_far if (s.precision, s.step) == (given.precision, _step(given))]
        before = alike[-1].name if alike else FLOAT_WRITTEN
        yield replace(given, before=before, step=f"build by {engine.runtime}")
        return
    name = f"{path}, as written"
    plain = replace(settings.session, optimize="none")
    yield replace(given, name=name, step=_step(given), settings=plain, given=False)
    runtime = settings.runtime
    if path.is_dir() or runtime == engine.runtime:
        yield replace(given, before=name, step=_KERNELS)
    else:
        built = f"{path}, built by {runtime}"
        yield replace(
            given, name=built, before=name, step=f"build by {runtime}", build_with=runtime
        )


def _step(side: Side) -> str:
    return _STEPS.get(side.precision, "quantiser")


def _precision(engine: EngineFile, path: Path) -> Precision:
    found = precision_of(engine.file)
    if found is None:
        raise UsageError(
            f"{path} does not say what it computes in",
            hint="Give --precision float32, float16, bfloat16, int8 or int4.",
        )
    return found


def _runs_as_written(engine: EngineFile) -> bool:
    """Whether ONNX Runtime can run it as it is written: on its own CPU kernels, unoptimised."""
    return engine.runtime == "onnxruntime" and not engine.providers


# Running a side in a child process.


@dataclass(frozen=True, kw_only=True)
class SideConfig:
    """What to run.

    Attributes:
        path: The engine.
        samples: Rows of inputs.
        settings: How it runs.
        repeat: How often it is made, and how often each of these runs every sample.
        build_with: Runtime to build it with first; empty for an engine as it is.
    """

    path: Path
    samples: Path
    settings: SessionSettings
    repeat: int = 1
    build_with: str = ""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How far the outputs of one engine are from themselves.

    Attributes:
        output: Output tensor.
        between_runs: Largest difference between two runs of one session.
        between_builds: Largest difference between two engines built, or opened, anew.
        runs: Runs of every sample in each session.
        builds: Number of engines.
        built: What was done anew for each: ``built`` from the ONNX file, or ``opened``.
    """

    output: str
    between_runs: float
    between_builds: float
    runs: int
    builds: int
    built: Literal["built", "opened"]


@dataclass(frozen=True, kw_only=True)
class SideRecord:
    """What a run of a side gave; its outputs are rows in the directory."""

    spreads: tuple[Spread, ...]


def run_side(config: SideConfig, *, output: Path) -> SideRecord:
    """Run an engine on every sample, ``repeat`` times in ``repeat`` sessions; keep the first.

    Raises:
        InputError: The samples do not fit it.
        BackendError: The runtime failed.
    """
    rows = Rows(config.samples)
    spreads = _Spreads(config)
    for build in range(config.repeat):
        with _opened(config) as session:
            for run in range(config.repeat):
                made = (_run(session, feeds) for feeds in rows)
                tracked = progress.track(made, total=len(rows))
                if build == run == 0:
                    write_rows(output / "outputs", tracked)
                else:
                    spreads.add(tracked, kept=Rows(output / "outputs"), same=build == 0)
    return SideRecord(spreads=spreads.result())


class _Spreads:
    """Largest differences of every output from the first run."""

    def __init__(self, config: SideConfig) -> None:
        self._config = config
        self._runs: dict[str, float] = {}
        self._builds: dict[str, float] = {}

    def add(self, made: Iterable[dict[str, Array]], *, kept: Rows, same: bool) -> None:
        """Add a run of every sample, of the same session as the one kept, or of another one."""
        largest = self._runs if same else self._builds
        for outputs, first in zip(made, kept, strict=True):
            for name, array in outputs.items():
                difference = np.abs(array.astype(np.float64) - first[name].astype(np.float64))
                found = float(difference.max(initial=0.0))
                largest[name] = max(largest.get(name, 0.0), found)

    def result(self) -> tuple[Spread, ...]:
        """One entry per output; none without a repetition."""
        return tuple(
            Spread(
                output=name,
                between_runs=found,
                between_builds=self._builds.get(name, 0.0),
                runs=self._config.repeat,
                builds=self._config.repeat,
                built="built" if self._config.build_with else "opened",
            )
            for name, found in self._runs.items()
        )


@contextmanager
def _opened(config: SideConfig) -> Iterator[Session]:
    if not config.build_with:
        with find_engine(config.path).session(config.settings) as session:
            yield session
        return
    with fs.scratch_directory() as folder:
        made = builder(config.build_with).build(config.path, folder, settings=config.settings)
        engine = EngineFile(file=folder / made.file, runtime=config.build_with)
        with engine.session(config.settings) as session:
            yield session


def _run(session: Session, feeds: Feeds) -> dict[str, Array]:
    """Run once; an engine in half precision may want its inputs so."""
    wanted = {spec.name: np.dtype(spec.dtype) for spec in session.inputs}
    cast = {
        name: array.astype(wanted[name]) if _other_float(array, wanted.get(name)) else array
        for name, array in feeds.items()
    }
    return session.run(cast)


def _other_float(array: Array, dtype: np.dtype[np.generic] | None) -> bool:
    return dtype is not None and dtype != array.dtype and dtype.kind == array.dtype.kind == "f"


class SideRunner:
    """Runs sides, each in a child process: a runtime that dies is an error and no end.

    Args:
        samples: Rows of inputs.
        folder: Where outputs are kept.
        observer: Hears of progress.
        time_limit_s: Limit for one side.
    """

    def __init__(
        self, samples: Path, *, folder: Path, observer: Observer, time_limit_s: float = 3600.0
    ) -> None:
        self._samples, self._folder = samples, folder
        self._observer, self._time_limit_s = observer, time_limit_s
        self._count = 0

    def run(self, side: Side, *, repeat: int = 1) -> tuple[Rows, tuple[Spread, ...]]:
        """Outputs of a side on every sample, and how far it is from itself.

        Raises:
            InputError: The samples do not fit it.
            BackendError: The runtime failed or died.
        """
        self._count += 1
        output = fs.make_directory(self._folder / str(self._count))
        config = SideConfig(
            path=side.path.resolve(),
            samples=self._samples,
            settings=side.settings,
            repeat=repeat,
            build_with=side.build_with,
        )
        self._observer.started(side.name)
        try:
            text = run_isolated(
                "equipoise.sides:run_side",
                config,
                output=output,
                on_progress=self._observer.advanced,
                time_limit_s=self._time_limit_s,
            )
        except BaseException:
            self._observer.failed(side.name)
            raise
        self._observer.ended(side.name, cached=False)
        made = record.loads(SideRecord, text, where=side.name, error=BackendError)
        return Rows(output / "outputs"), made.spreads
