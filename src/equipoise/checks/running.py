"""Running the sides of a check on the same samples, in child processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from equipoise import fs, progress, record
from equipoise.checks.sides import Side
from equipoise.data.store import Rows, write_rows
from equipoise.engines import find_engine
from equipoise.errors import BackendError, EquipoiseError
from equipoise.isolation import Failure, run_isolated
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import Session, SessionSettings
from equipoise.runtimes.registry import builder
from equipoise.spec import Array, Feeds
from equipoise.stages import Observer


@dataclass(frozen=True, kw_only=True)
class SideConfig:
    """What to run.

    Attributes:
        path: The engine.
        settings: How it runs.
        repeat: How often it is made, and how often each of these runs every sample.
        build_with: Runtime to build it with first; empty for an engine as it is.
    """

    path: Path
    settings: SessionSettings
    repeat: int = 1
    build_with: str = ""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Sides to run, one after the other.

    Attributes:
        samples: Rows of inputs.
        sides: What to run.
    """

    samples: Path
    sides: tuple[SideConfig, ...]


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
    """What a run of a side gave; its outputs are rows in a directory.

    Attributes:
        spreads: How far it is from itself; empty without repetition.
        failure: Why it did not run; None when it did.
    """

    spreads: tuple[Spread, ...] = ()
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What the sides gave, in their order."""

    sides: tuple[SideRecord, ...]


def run_sides(config: RunConfig, *, output: Path) -> RunRecord:
    """Run every side on every sample; its outputs are rows in ``output/<index>``.

    One that fails with an error of ours does not keep the others from running.
    """
    rows = Rows(config.samples)
    found = []
    for index, side in enumerate(config.sides):
        try:
            made = _run_side(side, rows, output / str(index))
        except EquipoiseError as error:
            made = SideRecord(failure=Failure.of(error))
        found.append(made)
        progress.report(index + 1, len(config.sides))
    return RunRecord(sides=tuple(found))


def _run_side(config: SideConfig, rows: Rows, output: Path) -> SideRecord:
    """Run an engine ``repeat`` times in ``repeat`` sessions; keep the outputs of the first run."""
    spreads = _Spreads(config)
    for build in range(config.repeat):
        with _opened(config) as session:
            for run in range(config.repeat):
                made = (_run(session, feeds) for feeds in rows)
                if build == run == 0:
                    write_rows(output, made)
                else:
                    spreads.add(made, kept=Rows(output), same=build == 0)
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


@dataclass(frozen=True, kw_only=True)
class SideRun:
    """What a side gave.

    Attributes:
        outputs: A row for each sample; None when it did not run.
        spreads: How far it is from itself.
        error: Why it did not run; None when it did.
    """

    outputs: Rows | None
    spreads: tuple[Spread, ...] = ()
    error: EquipoiseError | None = None


class SideRunner:
    """Runs sides in a child process: a runtime that dies is an error and no end.

    Args:
        samples: Rows of inputs.
        folder: Where outputs are kept.
        observer: Hears of progress.
        time_limit_s: Limit for all sides of a run.
    """

    def __init__(
        self, samples: Path, *, folder: Path, observer: Observer, time_limit_s: float = 3600.0
    ) -> None:
        self._samples, self._folder = samples, folder
        self._observer, self._time_limit_s = observer, time_limit_s
        self._runs = 0

    def run(self, sides: Sequence[Side], *, repeat: int = 1) -> tuple[SideRun, ...]:
        """Run all sides; those that the user asked for ``repeat`` times.

        They share a process, which imports a runtime once. If it dies, each runs in its own, so
        that the one that died can be told.

        Raises:
            ResourceError: The time limit passed.
        """
        configs = [
            SideConfig(
                path=side.path.resolve(),
                settings=side.settings,
                repeat=repeat if side.given else 1,
                build_with=side.build_with,
            )
            for side in sides
        ]
        label = f"run {len(sides)} sides"
        try:
            return self._together(configs, label=label)
        except BackendError as error:
            if len(sides) == 1:
                return (SideRun(outputs=None, error=error),)
        return tuple(run for side in sides for run in self.run([side], repeat=repeat))

    def _together(self, configs: Sequence[SideConfig], *, label: str) -> tuple[SideRun, ...]:
        self._runs += 1
        output = fs.make_directory(self._folder / f"run{self._runs}")
        self._observer.started(label)
        try:
            text = run_isolated(
                "equipoise.checks.running:run_sides",
                RunConfig(samples=self._samples, sides=tuple(configs)),
                output=output,
                on_progress=self._observer.advanced,
                time_limit_s=self._time_limit_s,
            )
        except BaseException:
            self._observer.failed(label)
            raise
        self._observer.ended(label, cached=False)
        made = record.loads(RunRecord, text, where=label, error=BackendError)
        return tuple(_side_run(one, output / str(i)) for i, one in enumerate(made.sides))


def _side_run(made: SideRecord, output: Path) -> SideRun:
    if made.failure is not None:
        return SideRun(outputs=None, error=made.failure.raised())
    return SideRun(outputs=Rows(output), spreads=made.spreads)
