"""Pack engines that are there already: what ``equipoise pack`` calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from equipoise import fs, onnxio
from equipoise.assembly.parts import Part, Ran, Specs, cpu_flags_for, engine_files, run_part
from equipoise.assembly.writing import About, exported_parity, write_parts
from equipoise.bundle.manifest import Licences, Manifest, Needs
from equipoise.bundle.writer import check_replaceable, is_archive_name
from equipoise.data.store import Rows
from equipoise.errors import InputError, UsageError
from equipoise.jobs import JobConfig, make_pipeline
from equipoise.parity.compare import Comparison
from equipoise.parity.precision import precision_of
from equipoise.parity.record import ParityRecord
from equipoise.pipeline import Pipeline
from equipoise.runtimes.engine import ENGINE_MANIFEST, EngineManifest, read_engine_manifest
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.tensorrt.plan import PLAN_FILE, Plan, read_plan
from equipoise.stages import Observer, versions_of
from equipoise.targets.machine import detect_machine
from equipoise.targets.profile import Target
from equipoise.targets.profiles import get_target, target_names

_ENGINE_FILE: Final = "engine.onnx"
_FALLBACK: Final = "float32"
_SHOWN_TEXT: Final = re.compile(r"[^a-z0-9._-]+")
_PACKAGES: Final = (
    "equipoise", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch",
    "transformers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PackRequest:
    """What to pack, and what is known of it.

    Attributes:
        engines: Directories that ``equipoise build`` wrote, or ``.onnx`` files, in order of
            preference; ``NAME=PATH`` gives a name.
        output: The bundle; an archive if it ends in ``.zip``.
        against: The trained model, as ``tune`` takes it.
        data: Evaluation data: golden inputs are its first samples.
        weights: Weights of a factory or timm model.
        task: Head of a transformers model.
        samples: Only the first so many samples.
        max_length: Most tokens per text.
        tokenizer: ``tokenizer.json`` for texts.
        labels: Class names in index order.
        float_fallback: Put the exported float model last, for devices that nothing else fits.
        name: Name of the bundle; that of the source when empty.
        serial: Its serial.
        licences: What is stated about licences.
        tolerances: Output -> largest difference from the reference, for engines that cannot be run
            here; without it their self-test cannot pass.
        threads: Threads per operator; as built, or all usable cores for an ``.onnx`` file.
        cache: Directory of stage results; the user's cache when None.
        time_limit_s: Limit for one stage.
    """

    engines: tuple[str, ...]
    output: Path
    against: str
    data: str
    weights: Path | None = None
    task: str = ""
    samples: int | None = None
    max_length: int = 512
    tokenizer: Path | None = None
    labels: tuple[str, ...] = ()
    float_fallback: bool = False
    name: str = ""
    serial: int = 0
    licences: Licences = field(default_factory=Licences)
    tolerances: dict[str, float] = field(default_factory=dict)
    threads: int | None = None
    cache: Path | None = None
    time_limit_s: float = 3600.0


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What was packed.

    Attributes:
        bundle: Where.
        manifest: What it holds.
        not_run: Engine -> why it could not be run here, and so was not compared.
        parity: Engine -> its comparison with the source on all samples.
    """

    bundle: str
    manifest: Manifest
    not_run: dict[str, str]
    parity: dict[str, ParityRecord]


def pack_engines(request: PackRequest, *, observer: Observer | None = None) -> PackResult:
    """Compare engines with their source, and write them as one bundle, whole or not at all.

    Raises:
        UsageError: Nothing to pack, or options that do not go together.
        InputError: An engine or the source cannot be used, or the engines take different things.
        IntegrityError: An engine is not what its manifest says.
        OutputError: The output is there already and is no bundle, or cannot be written.
    """
    _check(request)
    check_replaceable(request.output)
    pipeline = make_pipeline(_job_config(request), observer=observer)
    with fs.scratch_directory() as folder:
        parts = _parts(request, pipeline, folder=folder)
        ran = [_compared(part, pipeline, stated=request.tolerances) for part in parts]
        about = About(
            name=request.name or pipeline.job.source.name,
            serial=request.serial,
            licences=request.licences,
            versions=versions_of(_PACKAGES),
        )
        manifest = write_parts(pipeline, ran, output=request.output, about=about)
    return PackResult(
        bundle=str(request.output),
        manifest=manifest,
        not_run={each.part.name: each.why_not for each in ran if each.why_not},
        parity={each.part.name: each.parity for each in ran if each.parity is not None},
    )


def _check(request: PackRequest) -> None:
    if not request.engines:
        raise UsageError("nothing to pack: give an engine directory or an .onnx file")
    if not request.against or not request.data:
        raise UsageError(
            "packing needs --against SOURCE and --data DATA",
            hint="Golden vectors are what the source makes of real inputs. The source may be the"
            " float .onnx file that the engines were made from.",
        )
    if request.serial < 0:
        raise UsageError(f"--serial is {request.serial}; it must be at least 0")
    if is_archive_name(request.output) and request.output.is_dir():
        raise UsageError(f"{request.output} is a directory; an archive does not replace it")
    for name, value in request.tolerances.items():
        if not 0 <= value < float("inf"):
            raise UsageError(f"--tolerance {name}={value:g}; it must be at least 0")


def _job_config(request: PackRequest) -> JobConfig:
    return JobConfig(
        source=request.against,
        data=request.data,
        weights=request.weights,
        task=request.task,
        samples=request.samples,
        max_length=request.max_length,
        tokenizer=request.tokenizer,
        labels=request.labels,
        threads=request.threads,
        time_limit_s=request.time_limit_s,
        cache=request.cache,
        labelled=False,
    )


def _parts(request: PackRequest, pipeline: Pipeline, *, folder: Path) -> list[Part]:
    """The engines under names of their own, the float one last where it is asked for."""
    parts: list[Part] = []
    for text in request.engines:
        name, path = _named(text)
        taken = {part.name for part in parts} | ({_FALLBACK} if request.float_fallback else set())
        parts.append(_part(path, name=_free(name, taken), request=request, folder=folder))
    if request.float_fallback:
        own = _of_file(pipeline.float_model, name=_FALLBACK, request=request, folder=folder)
        parts.append(replace(own, fallback=True))
    return parts


def _named(text: str) -> tuple[str, Path]:
    """Name and path of ``PATH`` or ``NAME=PATH``."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return _as_name(Path(text).resolve().stem), Path(text)
    if _as_name(name) != name:
        raise UsageError(
            f"{text!r}: the name of an engine is of a-z, 0-9, '.', '_' and '-'; {name!r} is not"
        )
    return name, Path(path)


def _as_name(text: str) -> str:
    return _SHOWN_TEXT.sub("-", text.lower())[:60].strip("._-") or "engine"


def _free(name: str, taken: set[str]) -> str:
    """``name``, or with a number where it is taken."""
    names = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3)))
    return next(each for each in names if each not in taken)


def _part(path: Path, *, name: str, request: PackRequest, folder: Path) -> Part:
    if path.is_dir() and (path / ENGINE_MANIFEST).is_file():
        return _of_directory(path, name=name, threads=request.threads)
    if not path.is_file():
        raise InputError(
            f"no such engine: {path}",
            hint="Give a directory that `equipoise build` wrote, or an .onnx file.",
        )
    return _of_file(path, name=name, request=request, folder=folder)


def _of_file(path: Path, *, name: str, request: PackRequest, folder: Path) -> Part:
    """An ONNX file, which ONNX Runtime runs; its external data come along."""
    inputs, outputs = onnxio.file_specs(path)
    place = fs.make_directory(folder / name)
    onnxio.copy_model(path, place / _ENGINE_FILE)
    return Part(
        name=name,
        file=_ENGINE_FILE,
        files=engine_files(place, file=_ENGINE_FILE),
        runtime="onnxruntime",
        settings=SessionSettings(threads=request.threads or detect_machine().cores),
        precision=precision_of(path) or "unknown",
        specs=Specs(inputs=inputs, outputs=outputs),
    )


def _of_directory(path: Path, *, name: str, threads: int | None) -> Part:
    """What ``equipoise build`` wrote; every file has been checked against its hash."""
    built = read_engine_manifest(path)
    plan = read_plan(path) if (path / PLAN_FILE).is_file() else None
    precision = precision_of(path / built.engine.file) or "unknown"
    target = _target(built.target)
    return Part(
        name=name,
        file=built.engine.file,
        files=engine_files(path, file=built.engine.file),
        runtime=built.runtime,
        settings=replace(built.settings, threads=threads or built.settings.threads),
        target=built.target,
        precision=precision,
        needs=replace(
            _needs(built, plan),
            any_cpu_flag=()
            if target is None or built.settings.exact_integers
            else cpu_flags_for(target, precision),
        ),
        specs=Specs(inputs=plan.inputs, outputs=plan.outputs) if plan else None,
    )


def _target(name: str) -> Target | None:
    """A known target; one of the user's own is not known here any more."""
    return get_target(name, machine=detect_machine()) if name in target_names() else None


def _needs(built: EngineManifest, plan: Plan | None) -> Needs:
    """What a compiled engine holds for; a file that its runtime compiles holds everywhere."""
    compiled = plan is not None
    return Needs(
        platform=built.platform if compiled else "",
        runtime_version=built.engine.version if compiled else "",
        later_versions=plan.later_versions if plan else False,
        compute_capabilities=built.engine.compute_capabilities,
        later_gpus=plan.later_gpus if plan else False,
    )


def _compared(part: Part, pipeline: Pipeline, *, stated: Mapping[str, float]) -> Ran:
    """Run it on the golden samples, and compare it with the source on all of them."""
    ran = run_part(part, pipeline, stated=stated)
    if ran.why_not:
        return ran
    rows, reference = Rows(pipeline.evaluation), Rows(pipeline.reference.files)
    comparison = Comparison()
    with part.open() as session:
        for index in range(len(rows)):
            comparison.add(reference[index], session.run(rows[index]))
    parity = replace(exported_parity(pipeline), samples=len(rows), engine=comparison.result())
    return replace(ran, parity=parity)
