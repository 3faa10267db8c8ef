"""The build stage: an ONNX file to an engine of one runtime, proved to load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equipoise.runtimes.protocol import EngineRecord, SessionSettings
from equipoise.runtimes.registry import builder


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build.

    Attributes:
        model: ONNX file.
        runtime: Name of the runtime.
        settings: How the engine will run.
    """

    model: Path
    runtime: str
    settings: SessionSettings


def build(config: BuildConfig, *, output: Path) -> EngineRecord:
    """Build the engine in ``output``.

    Raises:
        SourceError: The model is none that the runtime accepts.
        UsageError: There is no such runtime.
    """
    return builder(config.runtime).build(config.model, output, settings=config.settings)
