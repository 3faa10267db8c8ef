"""The sides of a parity check: the float ONNX file and each engine, run on the same samples.

    PyTorch ── exporter ── float ONNX, as written ── runtime kernels ── float ONNX, optimised
                                  │
                                  ├── quantiser ── file, as written ── runtime kernels ── optimised
                                  └── build ── engine of another runtime

Each side knows the side before it and the step between them, so a difference has a place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from equipoise import onnxio
from equipoise.engines import find_engine
from equipoise.errors import UsageError
from equipoise.parity.precision import Precision, precision_of
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import SessionSettings

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
    if path.suffix == ".onnx":
        onnxio.file_specs(path)  # what is damaged or is no number is said before it runs
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
