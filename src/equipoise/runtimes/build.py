"""The build stage: an ONNX file to an engine of one runtime, with its manifest."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from equipoise.runtimes.engine import write_engine_manifest
from equipoise.runtimes.protocol import BuildSettings, EngineRecord, SessionSettings
from equipoise.runtimes.registry import builder


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build.

    Attributes:
        model: ONNX file.
        runtime: Name of the runtime.
        settings: How the engine will run.
        options: How it is built.
        target: Name of the target that it is for; empty for none.
    """

    model: Path
    runtime: str
    settings: SessionSettings
    options: BuildSettings = field(default_factory=BuildSettings)
    target: str = ""


def build(config: BuildConfig, *, output: Path) -> EngineRecord:
    """Build the engine in ``output``; the record says how long that took.

    The manifest beside the engine does not: the same engine has the same manifest.

    Raises:
        SourceError: The model is none that the runtime accepts.
        IncompatibleError: It cannot be built for what the options ask for.
        UsageError: There is no such runtime.
    """
    chosen = builder(config.runtime)
    begin = time.monotonic()
    made = chosen.build(config.model, output, settings=config.settings, options=config.options)
    build_s = time.monotonic() - begin
    write_engine_manifest(
        output, made, target=config.target, runtime=config.runtime, settings=config.settings
    )
    return replace(made, build_s=build_s)
