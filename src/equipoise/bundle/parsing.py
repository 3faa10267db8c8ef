"""Bytes to a manifest that is canonical and does not contradict itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Final

from equipoise import record
from equipoise.bundle.manifest import (
    ENGINES,
    FORMAT,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Engine,
    Manifest,
)
from equipoise.bundle.names import ENGINE_NAME, check_names
from equipoise.errors import DataError, IncompatibleError, IntegrityError
from equipoise.spec import TensorSpec

MOST_MANIFEST_BYTES: Final = 8 << 20
_MOST_DEPTH: Final = 16
_MOST_NAME: Final = 256
_MOST_ENGINES: Final = 64
_MOST_SERIAL: Final = 2**63 - 1
_MOST_THREADS: Final = 4096
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_HINT: Final = "Copy the bundle again; do not run it."


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Read a manifest.

    Args:
        data: The bytes of ``manifest.json``.
        where: Its path, for messages.

    Raises:
        IntegrityError: It is no manifest, is not canonical, or contradicts itself.
        IncompatibleError: It is of another format.
    """
    parsed = _plain(data, where=where)
    _check_format(parsed, where=where)
    try:
        manifest = record.from_json(Manifest, parsed)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{where}: {error}", hint=_HINT) from error
    except DataError as error:  # steps of preprocessing that contradict each other
        raise IntegrityError(f"{where}: {error.message}", hint=_HINT) from error
    if manifest_bytes(manifest) != data:
        raise IntegrityError(
            f"{where} is not canonical JSON: its keys are not sorted, one that has its usual value"
            " is left out, or its spaces or numbers are spelled otherwise",
            hint="Make the bundle anew; a manifest is not to be edited by hand.",
        )
    check_manifest(manifest, where=where)
    return manifest


def manifest_bytes(manifest: Manifest) -> bytes:
    """The one form in which a manifest is written."""
    return record.dumps(manifest).encode()


def _plain(data: bytes, *, where: str) -> record.Json:
    if len(data) > MOST_MANIFEST_BYTES:
        raise IntegrityError(
            f"{where} has {len(data):,} bytes; at most {MOST_MANIFEST_BYTES:,} are allowed"
        )
    try:
        parsed = record.parse(data.decode("utf-8"))
        # A half of a surrogate pair can be escaped in JSON, and in no UTF-8.
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where} is no JSON: {error}", hint=_HINT) from error
    _check_depth(parsed, where=where)
    return parsed


def _check_depth(parsed: record.Json, *, where: str) -> None:
    level = [parsed]
    for _ in range(_MOST_DEPTH):
        level = [child for value in level for child in _children(value)]
    if level:
        raise IntegrityError(f"{where} is nested deeper than {_MOST_DEPTH} levels")


def _children(value: record.Json) -> Iterable[record.Json]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_format(parsed: record.Json, *, where: str) -> None:
    version = parsed.get("format") if isinstance(parsed, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version == FORMAT:
        return
    if version > FORMAT:
        raise IncompatibleError(
            f"{where} has format {version}; this equipoise reads format {FORMAT}",
            hint="Update equipoise on this device.",
        )
    raise IncompatibleError(
        f"{where} has format {version}, which was never released; this equipoise reads format"
        f" {FORMAT}",
        hint="Make the bundle anew with `equipoise tune` or `equipoise pack`.",
    )


def check_manifest(manifest: Manifest, *, where: str) -> None:
    """Check that what a manifest says can be true.

    Raises:
        IntegrityError: Names what cannot.
    """
    problem = next(_problems(manifest), "")
    if problem:
        raise IntegrityError(f"{where}: {problem}", hint=_HINT)
    check_names((MANIFEST_FILE, SIGNATURE_FILE, *manifest.files), where=where)


def _problems(manifest: Manifest) -> Iterator[str]:
    if manifest.format != FORMAT:
        yield f"format is {manifest.format}, not {FORMAT}"
    if not manifest.name.isprintable() or not 0 < len(manifest.name) <= _MOST_NAME:
        yield f"name has to be 1 to {_MOST_NAME} printable characters"
    if not 0 <= manifest.serial <= _MOST_SERIAL:
        yield f"serial is {manifest.serial}; it has to be 0 to {_MOST_SERIAL}"
    if manifest.max_length < 1:
        yield f"max_length is {manifest.max_length}; it has to be at least 1"
    if manifest.tokenizer is not None and manifest.tokenizer not in manifest.files:
        yield f"the tokenizer {manifest.tokenizer!r} is not among its files"
    yield from _file_problems(manifest)
    yield from _spec_problems("input", manifest.inputs)
    yield from _spec_problems("output", manifest.outputs)
    yield from _engines_problems(manifest)
    if manifest.calibration and not _HASH.fullmatch(manifest.calibration.fingerprint):
        yield "calibration.fingerprint is no SHA-256 in lower-case hexadecimal"


def _file_problems(manifest: Manifest) -> Iterator[str]:
    for name, entry in manifest.files.items():
        if name in {MANIFEST_FILE, SIGNATURE_FILE}:
            yield f"{name} cannot vouch for itself"
        if not _HASH.fullmatch(entry.sha256):
            yield f"the hash of {name!r} is no SHA-256 in lower-case hexadecimal"
        if not 0 <= entry.size_bytes <= _MOST_SERIAL:
            yield f"the size of {name!r} is {entry.size_bytes}"


def _spec_problems(kind: str, specs: tuple[TensorSpec, ...]) -> Iterator[str]:
    names = [spec.name for spec in specs]
    if not names or len(set(names)) != len(names):
        yield f"there has to be an {kind}, and no two of one name"
    for spec in specs:
        if any(isinstance(dim, int) and dim < 0 for dim in spec.shape):
            yield f"{kind} {spec.name!r} has a negative size"


def _engines_problems(manifest: Manifest) -> Iterator[str]:
    engines = manifest.engines
    names = [engine.name for engine in engines]
    if not 0 < len(engines) <= _MOST_ENGINES:
        yield f"it has {len(engines)} engines; 1 to {_MOST_ENGINES} are allowed"
    if len(set(names)) != len(names):
        yield "two engines have one name"
    if any(engine.fallback for engine in engines[:-1]):
        yield "a fallback that is not the last engine"
    outputs = {spec.name for spec in manifest.outputs}
    for engine in engines:
        yield from (f"engine {engine.name!r:.80}: {p}" for p in _engine_problems(engine, manifest))
        if engine.golden_tolerance and set(engine.golden_tolerance) != outputs:
            yield f"engine {engine.name!r:.80}: its golden tolerances are not for the outputs"
    owned = [file for engine in engines for file in engine.files]
    below = sorted(name for name in manifest.files if name.startswith(f"{ENGINES}/"))
    if sorted(owned) != below:
        yield f"the files below {ENGINES}/ are not those of its engines"


def _engine_problems(engine: Engine, manifest: Manifest) -> Iterator[str]:
    if not ENGINE_NAME.fullmatch(engine.name):
        yield "a name has to be 1 to 64 of a-z, 0-9, '.', '_' and '-', a letter or digit outside"
    if engine.file not in engine.files or list(engine.files) != sorted(set(engine.files)):
        yield "its file is not among its files, or these are not sorted"
    if not all(name.startswith(f"{ENGINES}/{engine.name}/") for name in engine.files):
        yield f"a file of it is not below {ENGINES}/{engine.name}/"
    elif not set(engine.files) <= set(manifest.files):
        yield "a file of it has no hash"
    elif sum(manifest.files[name].size_bytes for name in engine.files) != engine.size_bytes:
        yield "its size is not that of its files"
    if not engine.runtime.isprintable() or not engine.runtime:
        yield "it names no runtime"
    if not 1 <= engine.threads <= _MOST_THREADS:
        yield f"threads is {engine.threads}; 1 to {_MOST_THREADS} are allowed"
    if not all(0 <= value < math.inf for value in engine.golden_tolerance.values()):
        yield "a golden tolerance is negative"
    if engine.golden_from == "engine" and not engine.golden_tolerance:
        yield "it was run where it was packed, and has no golden tolerance"
