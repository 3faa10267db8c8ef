"""One engine on its way into a bundle: what it is, and what it gave here on real inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from equipoise.bundle.chooser import check_fits
from equipoise.bundle.manifest import ENGINES, Engine, Needs, Precision
from equipoise.data.store import Rows
from equipoise.errors import IncompatibleError
from equipoise.parity.record import ParityRecord
from equipoise.parity.tolerance import Tolerance
from equipoise.pipeline import Pipeline
from equipoise.recipe import Recipe
from equipoise.runtimes.device import this_device
from equipoise.runtimes.engine import ENGINE_MANIFEST
from equipoise.runtimes.protocol import Session, SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.serving.batching import batch_dimension
from equipoise.serving.selftest import difference
from equipoise.spec import Array, Feeds, TensorSpec
from equipoise.targets.profile import Target

GOLDEN_SAMPLES: Final = 4
_MOST_PAIRED_ROWS: Final = 256
"""Rows that are looked through for two of equal shapes."""


@dataclass(frozen=True, kw_only=True)
class Specs:
    """Inputs and outputs of an engine."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One engine that is to be packed.

    Attributes:
        name: Its name in the bundle.
        file: The file that its runtime opens, by its name in ``files``.
        files: Name -> file; all in one directory, as its runtime wants them.
        runtime: The runtime.
        settings: How it runs.
        target: Target that it was made for.
        precision: Of its weights.
        needs: What a device has to have.
        fallback: Whether it is the float engine for devices that nothing else fits.
        recipe: How it was made, where that is known.
        specs: Its inputs and outputs, where they are known without opening it.
    """

    name: str
    file: str
    files: Mapping[str, Path]
    runtime: str
    settings: SessionSettings = field(default_factory=SessionSettings)
    target: str = ""
    precision: Precision = "unknown"
    needs: Needs = field(default_factory=Needs)
    fallback: bool = False
    recipe: Recipe | None = None
    specs: Specs | None = None

    def engine(self) -> Engine:
        """What a manifest says of it before it has run."""
        placed = {f"{ENGINES}/{self.name}/{name}": path for name, path in self.files.items()}
        return Engine(
            name=self.name,
            file=f"{ENGINES}/{self.name}/{self.file}",
            files=tuple(sorted(placed)),
            runtime=self.runtime,
            providers=self.settings.providers,
            target=self.target,
            precision=self.precision,
            threads=self.settings.threads,
            hint=self.settings.hint,
            exact_integers=self.settings.exact_integers,
            size_bytes=sum(path.stat().st_size for path in placed.values()),
            needs=self.needs,
            golden_from="reference",
            fallback=self.fallback,
        )

    def open(self) -> Session:
        """Open it where it lies. Raises what its runtime raises."""
        return session_opener(self.runtime)(self.files[self.file], settings=self.settings)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A part, and what it gave here.

    Attributes:
        part: The part.
        engine: What the manifest says of it.
        specs: Its inputs and outputs; None where it could not be opened here and does not say them.
        outputs: Of the golden samples; empty where it could not run here.
        why_not: Why it could not run here; empty where it did.
        parity: Its comparison with the reference.
    """

    part: Part
    engine: Engine
    specs: Specs | None = None
    outputs: tuple[Mapping[str, Array], ...] = ()
    why_not: str = ""
    parity: ParityRecord | None = None


def engine_files(folder: Path, *, file: str) -> dict[str, Path]:
    """The files of a built engine by name.

    The manifest that its builder wrote beside it stays behind where the engine is one file: the
    bundle's own says all of it, and one file can be opened from memory.
    """
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    alone = {name: path for name, path in files.items() if name != ENGINE_MANIFEST}
    return alone if set(alone) == {file} else files


def run_part(part: Part, pipeline: Pipeline, *, stated: Mapping[str, float] | None = None) -> Ran:
    """Run an engine on the golden samples, if it can be run here.

    Args:
        part: The engine.
        pipeline: Of its source and the data.
        stated: Output -> tolerance for an engine that cannot be run here; none is stated when None.

    Raises:
        InputError: It does not take what the source takes.
    """
    engine = part.engine()
    try:
        check_fits(engine, this_device())
        with part.open() as session:
            return _run(part, session, pipeline=pipeline)
    except IncompatibleError as error:
        unjudged = replace(engine, golden_tolerance=dict(stated or {}))
        return Ran(part=part, engine=unjudged, specs=part.specs, why_not=error.message)


def _run(part: Part, session: Session, *, pipeline: Pipeline) -> Ran:
    rows, reference = Rows(pipeline.evaluation), Rows(pipeline.reference.files)
    limits = pipeline.exported.record.proof.tolerances
    count = min(GOLDEN_SAMPLES, len(rows))
    outputs = tuple(session.run(rows[i]) for i in range(count))
    engine = replace(
        part.engine(),
        golden_from="engine",
        golden_tolerance=golden_tolerance(outputs, [reference[i] for i in range(count)], limits),
        batching=_batches(session, rows, limits),
    )
    specs = Specs(inputs=session.inputs, outputs=session.outputs)
    return Ran(part=part, engine=engine, specs=specs, outputs=outputs)


def golden_tolerance(
    outputs: Sequence[Mapping[str, Array]],
    reference: Sequence[Mapping[str, Array]],
    limits: Iterable[Tolerance],
) -> dict[str, float]:
    """Output -> how far another device may be from the golden outputs.

    The tolerance of the float model, plus the engine's own largest difference from the reference:
    another kernel may round otherwise, but not by more than quantisation itself did.
    """
    pairs = list(zip(outputs, reference, strict=True))
    return {
        limit.output: limit.atol
        + max(difference(found[limit.output], wanted[limit.output]) for found, wanted in pairs)
        for limit in limits
    }


def _batches(session: Session, rows: Rows, limits: Iterable[Tolerance]) -> bool:
    """Whether two different samples give together what each gives alone."""
    pair = _pair(rows)
    if pair is None or not batch_dimension(session.inputs, session.outputs):
        return False
    alone = [session.run(feeds) for feeds in pair]
    joined = session.run({n: np.concatenate([feeds[n] for feeds in pair]) for n in pair[0]})
    return all(
        difference(joined[t.output], np.concatenate([each[t.output] for each in alone])) <= t.atol
        for t in limits
    )


def _pair(rows: Rows) -> tuple[Feeds, Feeds] | None:
    """Two samples of equal shapes and other content, the first that there are."""
    seen: dict[tuple[tuple[int, ...], ...], Feeds] = {}
    for index in range(min(len(rows), _MOST_PAIRED_ROWS)):
        row = rows[index]
        other = seen.setdefault(tuple(array.shape for array in row.values()), row)
        if any(not np.array_equal(row[name], other[name]) for name in row):
            return other, row
    return None


def cpu_flags_for(target: Target, precision: Precision) -> tuple[str, ...]:
    """CPU features without which the engine gives wrong numbers.

    On x86 without them, sums of int8 products saturate in 16 bits, unless the scheme allows for it.
    """
    hardware = target.hardware
    x86_only = hardware.kind == "cpu" and hardware.architecture == "x86_64"
    needed = x86_only and precision == "int8" and not target.int8.saturates
    return hardware.any_flag if needed else ()
