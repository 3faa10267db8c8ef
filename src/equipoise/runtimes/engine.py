"""A built engine on disk: what it is, what it holds for, and the hash of every file.

A compiled engine is code. Nothing of it is given to a runtime before its manifest has been read and
its bytes have been checked.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from equipoise import fs, record
from equipoise.errors import IntegrityError
from equipoise.runtimes.protocol import EngineRecord, Session, SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.vouching import check_files, check_format, files_below

ENGINE_MANIFEST: Final = "engine.json"
FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class EngineManifest:
    """What a directory with an engine holds.

    Attributes:
        format: Version of this form.
        target: Name of the target that it was built for; empty for none.
        runtime: The runtime that opens it.
        engine: What its builder said.
        platform: System and architecture of the machine that built it.
        settings: How it runs.
        files: File name -> SHA-256 of every other file.
        sha256: Of all the other fields, in canonical JSON: a bit that turned over in the manifest
            itself is found. It is no signature: who can write the directory can write this too.
    """

    format: int = FORMAT
    target: str
    runtime: str
    engine: EngineRecord
    platform: str
    settings: SessionSettings = field(default_factory=SessionSettings)
    files: dict[str, str]
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """An engine, and what opens it.

    Attributes:
        file: Engine file.
        runtime: The runtime that opens it.
        providers: Where it runs; see :class:`~equipoise.runtimes.protocol.SessionSettings`.
    """

    file: Path
    runtime: str = "onnxruntime"
    providers: tuple[str, ...] = ()

    def session(self, settings: SessionSettings) -> Session:
        """Open it. Raises what the runtime raises."""
        own = replace(settings, providers=self.providers or settings.providers)
        return session_opener(self.runtime)(self.file, settings=own)


def this_platform() -> str:
    """System and architecture of this machine: ``linux-x86_64``."""
    return f"{platform.system().lower()}-{platform.machine()}"


def write_engine_manifest(
    directory: Path, made: EngineRecord, *, target: str, runtime: str, settings: SessionSettings
) -> EngineManifest:
    """Write the manifest of the engine that a builder left in ``directory``."""
    names = files_below(directory) - {ENGINE_MANIFEST}
    manifest = EngineManifest(
        target=target,
        runtime=runtime,
        engine=made,
        platform=this_platform(),
        settings=settings,
        files={name: fs.sha256_file(directory / name) for name in sorted(names)},
    )
    manifest = replace(manifest, sha256=manifest_sha256(manifest))
    fs.write_json(directory / ENGINE_MANIFEST, manifest)
    return manifest


def manifest_sha256(manifest: EngineManifest | Mapping[str, record.Json]) -> str:
    """SHA-256 of every field but its own, whatever the format: ``sha256`` of a manifest."""
    fields = record.to_json(manifest)
    assert isinstance(fields, dict)  # noqa: S101  of a dataclass or a mapping
    text = record.dumps({name: value for name, value in fields.items() if name != "sha256"})
    return hashlib.sha256(text.encode()).hexdigest()


def read_engine_manifest(directory: Path) -> EngineManifest:
    """Read the manifest of an engine, and check that every file is what its hash says.

    Raises:
        IntegrityError: There is none, it is not as it was written, or a file is missing, extra, a
            link, or different.
        IncompatibleError: It is of a later format.
    """
    path = directory / ENGINE_MANIFEST
    if not path.is_file():
        raise IntegrityError(
            f"{directory} has no {ENGINE_MANIFEST}, so nothing says what its engine is",
            hint="Give the directory that `equipoise build` wrote, whole.",
        )
    text = fs.read_text(path, error=IntegrityError)
    _check_itself(text, path)
    check_format(text, path, newest=FORMAT)
    found = record.loads(EngineManifest, text, where=str(path), error=IntegrityError)
    _check_files(directory, found)
    return found


def open_engine(directory: Path, *, settings: SessionSettings | None = None) -> Session:
    """Open the engine in ``directory``; as it was built to run when ``settings`` is None.

    Raises:
        IntegrityError: It is not what its manifest says.
        IncompatibleError: It is for another machine, or its runtime is not installed.
    """
    manifest = read_engine_manifest(directory)
    engine = directory / manifest.engine.file
    return session_opener(manifest.runtime)(engine, settings=settings or manifest.settings)


def _check_itself(text: str, path: Path) -> None:
    """Before its format: a digit that turned over there does not make it one of the future."""
    try:
        found = record.parse(text)
        expected = manifest_sha256(found) if isinstance(found, dict) else ""
    except ValueError as error:  # no JSON, or text that is no Unicode
        raise IntegrityError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("sha256") != expected:
        raise IntegrityError(
            f"{path} is not what it was: its own hash says something else",
            hint="Build the engine again; do not run it.",
        )


def _check_files(directory: Path, manifest: EngineManifest) -> None:
    present = files_below(directory) - {ENGINE_MANIFEST}
    hint = "Build the engine again; do not run it."
    check_files(directory, manifest.files, present=present, hint=hint)
    if manifest.engine.file not in manifest.files:
        raise IntegrityError(f"{directory}: no hash for the engine {manifest.engine.file}")
