"""A bundle against the reference outputs that it carries, or against its source on its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Final

from equipoise import fs
from equipoise.checks.running import SideRunner
from equipoise.checks.sides import Side
from equipoise.checks.verdict import CheckedSide, CheckRecord, verdict
from equipoise.data.store import Rows, write_rows
from equipoise.deploy import BundleSession, load
from equipoise.errors import BackendError
from equipoise.export.reference import ReferenceConfig
from equipoise.parity.compare import Comparison
from equipoise.parity.limits import Limits, judge
from equipoise.parity.tolerance import Allowed
from equipoise.pipeline import REFERENCE
from equipoise.runtimes.protocol import SessionSettings
from equipoise.sources.source import Source
from equipoise.spec import Array
from equipoise.stages import Observer, StageRunner

_KEPT: Final = "the reference outputs in the bundle"
_WHY: Final = "the bundle: golden tolerance, beside what the engine differed by when it was packed"


@dataclass(frozen=True, kw_only=True)
class GoldenSettings:
    """How golden inputs are checked.

    Attributes:
        source: The trained model, to compute the reference anew; None takes the reference outputs
            that a bundle carries, which needs no PyTorch.
        limits: The user's; the tolerance of the bundle where they say nothing.
        repeat: How often an engine is opened, and run each time.
        session: How engines run.
    """

    source: Source | None
    limits: Limits
    repeat: int
    session: SessionSettings


def check_golden(
    bundles: Sequence[Path], settings: GoldenSettings, *, runner: StageRunner, observer: Observer
) -> CheckRecord:
    """Run the golden inputs of bundles on this device and compare.

    Args:
        bundles: Their paths; every file is checked first.
        settings: What they are compared with, and how.
        runner: Runs the source in a child process.
        observer: Hears of progress.

    Raises:
        IntegrityError: A bundle is not what its manifest says.
        IncompatibleError: No engine of a bundle fits this machine.
    """
    sides, samples = [], 0
    for path in bundles:
        with (
            fs.scratch_directory() as folder,
            load(path, threads=settings.session.threads) as bundle,
        ):
            write_rows(folder / "inputs", [vector.inputs for vector in bundle.golden()])
            reference = _references(bundle, folder, source=settings.source, runner=runner)
            side = _side(bundle, path, settings=settings.session)
            run = SideRunner(folder / "inputs", folder=folder, observer=observer)
            found = run.run([side], repeat=settings.repeat)[0]
            if found.outputs is None:
                raise found.error or BackendError(f"{path} gave nothing")
            checked = _checked(
                side, reference, found.outputs, limits=settings.limits, bundle=bundle
            )
            sides.append(replace(checked, spreads=found.spreads))
            samples += len(reference)
    source = settings.source
    record = CheckRecord(
        reference=source.name if source else _KEPT,
        source=source.name if source else ", ".join(map(str, bundles)),
        samples=samples,
        data="golden inputs",
        sides=tuple(sides),
    )
    return replace(record, verdict=verdict(record))


def _references(
    bundle: BundleSession, folder: Path, *, source: Source | None, runner: StageRunner
) -> Sequence[Mapping[str, Array]]:
    if source is None:
        return [vector.reference for vector in bundle.golden()]
    names = tuple(spec.name for spec in bundle.inputs)
    config = ReferenceConfig(source=source, samples=folder / "inputs", names=names)
    return Rows(runner.run(REFERENCE, config, label="run the source").files)


def _side(bundle: BundleSession, path: Path, *, settings: SessionSettings) -> Side:
    return Side(
        name=str(path),
        path=path,
        before=_KEPT,
        step=f"engine {bundle.engine.name} on this device",
        precision=bundle.engine.precision,
        settings=settings,
        given=True,
    )


def _checked(
    side: Side,
    reference: Sequence[Mapping[str, Array]],
    outputs: Sequence[Mapping[str, Array]],
    *,
    limits: Limits,
    bundle: BundleSession,
) -> CheckedSide:
    comparison = Comparison(rtol=limits.rtol or 0.0)
    for wanted, found in zip(reference, outputs, strict=True):
        comparison.add(wanted, found)
    compared, allowed = comparison.result(), _allowed(bundle)
    findings = (
        judge(parity, limits, allowed=Allowed(atol=allowed.get(parity.name, 0.0), why=_WHY))
        for parity in compared
    )
    return CheckedSide(
        side=side,
        outputs=compared,
        by_step=compared,
        allowed=allowed,
        findings=tuple(chain(*findings)),
    )


def _allowed(bundle: BundleSession) -> dict[str, float]:
    """Output -> largest difference from the reference.

    A device may be off the engine's own golden outputs by the tolerance of the bundle, and those
    are off the reference by what packing it measured.
    """
    engine, own = bundle.engine, Comparison()
    for vector in bundle.golden():
        own.add(vector.reference, vector.expected(engine.name))
    return {p.name: engine.golden_tolerance.get(p.name, 0.0) + p.max_abs for p in own.result()}
