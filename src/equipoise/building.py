"""Build the engine of a target from an ONNX file: what ``equipoise build`` calls."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from equipoise import fs, onnxio
from equipoise.data.config import DataConfig
from equipoise.data.readers.base import split_form
from equipoise.data.sizes import observed_sizes, size_buckets
from equipoise.data.store import Rows
from equipoise.errors import IncompatibleError, OutputError
from equipoise.pipeline import BUILD, PREPARE
from equipoise.runtimes.build import BuildConfig
from equipoise.runtimes.engine import ENGINE_MANIFEST, EngineManifest, read_engine_manifest
from equipoise.runtimes.protocol import BuildSettings, SessionSettings, SizeRange
from equipoise.runtimes.registry import BUILDERS, builder
from equipoise.stages import Observer, StageRunner, default_cache
from equipoise.targets.machine import detect_machine
from equipoise.targets.profile import Target
from equipoise.targets.profiles import get_target, is_here

_FREE_BYTES: Final = 64 << 20
_MEASURED_SAMPLES: Final = 10_000
"""Samples of data whose sizes are looked at."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build, and for what.

    Attributes:
        model: ``.onnx`` file.
        output: Directory to write.
        target: Name of a target, or a ``.toml`` file.
        options: How it is built; the target's compute capability where it says none.
        settings: How it will run; the target's providers where it says none.
        data: Real inputs whose sizes make the profiles, as ``tune`` takes them; what ``options``
            say of a dimension goes before that.
        tokenizer: ``tokenizer.json`` for texts.
        buckets: Number of profiles from the sizes of the data.
        cache: Directory of stage results; the user's cache when None.
        time_limit_s: Limit for the build.
        fresh: Build even if it was built before.
    """

    model: Path
    output: Path
    target: str = "cpu"
    options: BuildSettings = field(default_factory=BuildSettings)
    settings: SessionSettings = field(default_factory=SessionSettings)
    data: str | None = None
    tokenizer: Path | None = None
    buckets: int = 3
    cache: Path | None = None
    time_limit_s: float = 3600.0
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What was built.

    Attributes:
        manifest: What the output directory holds.
        artefact: What it is, in words.
        here: Whether this machine is the target, so that what is measured here holds there.
    """

    manifest: EngineManifest
    artefact: str
    here: bool


def build_engine(request: BuildRequest, *, observer: Observer | None = None) -> BuildResult:
    """Build, and write the engine with its manifest to ``request.output``, whole or not at all.

    Raises:
        UsageError: There is no such target.
        SourceError: The model is no ONNX file, or the runtime refuses it.
        IncompatibleError: The target's runtime is not one that equipoise builds for, is not
            installed, or cannot build for this device.
        OutputError: The output is there already and is no engine.
    """
    target = get_target(request.target, machine=detect_machine())
    _check(target, request)
    cache = request.cache or default_cache()
    fs.check_writable(cache, needed_bytes=_FREE_BYTES)
    runner = StageRunner(
        cache, observer=observer, time_limit_s=request.time_limit_s, fresh=request.fresh
    )
    config = _config(target, request)
    if request.data is not None:
        profiles = _profiles(request, runner)
        config = replace(config, options=replace(config.options, profiles=profiles))
    made = runner.run(BUILD, config, label=f"build for {target.name}")
    with fs.staged_directory(request.output) as staging:
        for name in sorted(path.name for path in made.files.iterdir()):
            fs.copy_file(made.files / name, staging / name)
    return BuildResult(
        manifest=read_engine_manifest(request.output),
        artefact=target.artefacts[0],
        here=is_here(target, detect_machine()),
    )


def _check(target: Target, request: BuildRequest) -> None:
    if target.runtime not in BUILDERS.names():
        raise IncompatibleError(
            f"equipoise has no builder for the runtime {target.runtime!r} of {target.name!r}; it"
            f" builds for {', '.join(BUILDERS.names())}",
            hint="Quantise for it with `equipoise quantize`, and build with the vendor's tools.",
        )
    found = builder(target.runtime).availability()
    if not found.available:
        raise IncompatibleError(
            f"cannot build for {target.name!r}: {found.reason}", hint=found.install
        )
    output = request.output
    if output.exists() and not (output / ENGINE_MANIFEST).is_file():
        raise OutputError(
            f"{output} exists and is no engine; it is not replaced",
            hint="Choose another output directory, or move it away.",
        )
    onnxio.file_specs(request.model)


def _profiles(request: BuildRequest, runner: StageRunner) -> tuple[dict[str, SizeRange], ...]:
    """One profile for each bucket of the sizes that the data has."""
    inputs, _ = onnxio.file_specs(request.model)
    config = DataConfig(
        data=request.data or "",
        files=split_form(request.data or "")[1],
        tokenizer=request.tokenizer,
        calibration_samples=_MEASURED_SAMPLES,
        accepted=tuple(spec.name for spec in inputs),
        labelled=False,
    )
    rows = Rows(runner.run(PREPARE, config, label="prepare data").files / "calibration")
    asked = {name: r for profile in request.options.profiles for name, r in profile.items()}
    return tuple(
        {name: SizeRange(least=r[0], usual=r[1], largest=r[2]) for name, r in bucket.items()}
        | asked
        for bucket in size_buckets(observed_sizes(inputs, rows), count=request.buckets)
    )


def _config(target: Target, request: BuildRequest) -> BuildConfig:
    options, settings = request.options, request.settings
    capability = target.hardware.compute_capability
    if capability and not options.compute_capabilities:
        options = replace(options, compute_capabilities=(capability,))
    if not settings.providers and target.providers:
        settings = replace(settings, providers=target.providers)
    return BuildConfig(
        model=request.model,
        runtime=target.runtime,
        settings=settings,
        options=options,
        target=target.name,
    )
