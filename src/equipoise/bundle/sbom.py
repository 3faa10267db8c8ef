"""The bill of materials of a bundle: CycloneDX 1.6 in JSON, from its manifest alone.

The bundle is the main component; its engines and files lie inside it. What a device has to install
is ``required``, or ``optional`` where engines of several runtimes are there to choose from; what
made the bundle is ``excluded``, the word of CycloneDX for what is not there at run time. No clock
and no chance: the same manifest gives the same bytes. The serial of the bundle is left out, because
signing raises it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote

from equipoise import record
from equipoise.bundle.manifest import Calibration, Engine, Manifest
from equipoise.record import Json
from equipoise.spec import TensorSpec

SBOM_FILE: Final = "sbom.cdx.json"

_SPEC_VERSION: Final = "1.6"
_MODEL: Final = "model"
_PACKAGE_OF_RUNTIME: Final = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx-cu13",
    "reference": "onnx",
}
"""Runtime -> the package that a device installs for it, as in the table of docs/runtimes.md."""

_MISSING: Final = "missing"
"""The version of a package that was not there when the bundle was made."""

_ALWAYS_NEEDED: Final = ("equipoise", "numpy")


def sbom(manifest: Manifest) -> bytes:
    """The bill of materials as the bytes of its file.

    Args:
        manifest: With every file but the bill itself, which cannot hold its own hash.
    """
    needed = _needed(manifest)
    dependencies: list[Json] = [{"ref": _MODEL, "dependsOn": list[Json](sorted(needed))}]
    dependencies += [{"ref": reference} for reference in sorted(needed)]
    content: dict[str, Json] = {
        "$schema": f"http://cyclonedx.org/schema/bom-{_SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": _SPEC_VERSION,
        "version": 1,
        "metadata": {"component": _model(manifest), "tools": {"components": _tool(manifest)}},
        "components": [*needed.values(), *_makers(manifest, used=needed)],
        "dependencies": dependencies,
    }
    identity = uuid.uuid5(uuid.NAMESPACE_URL, record.dumps(content))
    return record.dumps({**content, "serialNumber": f"urn:uuid:{identity}"}).encode()


def _model(manifest: Manifest) -> dict[str, Json]:
    owned = {name for engine in manifest.engines for name in engine.files}
    rest = [name for name in sorted(manifest.files) if name not in owned]
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": manifest.name,
        **_licence(manifest.licences.model),
        "modelCard": _card(manifest),
        "properties": _properties(
            {
                "licence of the weights it was made from": manifest.licences.weights_from,
                "licence of the data": manifest.licences.data,
            }
        ),
        "components": [
            *(_engine(engine, manifest) for engine in manifest.engines),
            *(_file(name, manifest) for name in rest),
        ],
    }


def _licence(expression: str) -> dict[str, Json]:
    """An SPDX expression; nothing where none was stated."""
    return {"licenses": [{"expression": expression}]} if expression else {}


def _properties(values: Mapping[str, str]) -> list[Json]:
    """Name and value of what CycloneDX has no field for; "not stated" where there is none."""
    return [
        {"name": f"equipoise:{name}", "value": value or "not stated"}
        for name, value in values.items()
    ]


def _engine(engine: Engine, manifest: Manifest) -> dict[str, Json]:
    values = {
        "runtime": engine.runtime,
        "providers": ", ".join(engine.providers) or "the runtime's own CPU",
        "target": engine.target,
        "precision": engine.precision,
        "fallback": "yes" if engine.fallback else "no",
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": f"engine:{engine.name}",
        "name": engine.name,
        "properties": _properties(values),
        "components": [_file(name, manifest) for name in engine.files],
    }


def _file(name: str, manifest: Manifest) -> dict[str, Json]:
    entry = manifest.files[name]
    return {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
        "properties": _properties({"bytes": str(entry.size_bytes)}),
    }


def _card(manifest: Manifest) -> dict[str, Json]:
    """The model card of CycloneDX; README.md of the bundle says the same at length."""
    parameters: dict[str, Json] = {
        "inputs": _formats(manifest.inputs),
        "outputs": _formats(manifest.outputs),
    }
    if manifest.task:
        parameters["task"] = manifest.task
    if manifest.calibration is not None:
        parameters["datasets"] = [_dataset(manifest.calibration)]
    card: dict[str, Json] = {"modelParameters": parameters}
    if manifest.labels:
        card["properties"] = _properties({"labels": ", ".join(manifest.labels)})
    return card


def _formats(specs: Iterable[TensorSpec]) -> list[Json]:
    return [{"format": str(spec)} for spec in specs]


def _dataset(calibration: Calibration) -> dict[str, Json]:
    values = {
        "SHA-256 of the rows": calibration.fingerprint,
        "samples": str(calibration.samples),
    }
    return {
        "type": "dataset",
        "name": calibration.data,
        "description": "Calibration data: it set the ranges of integers.",
        "contents": {"properties": _properties(values)},
    }


def _needed(manifest: Manifest) -> dict[str, Json]:
    """What a device installs, by reference: equipoise, NumPy, and a package for each runtime."""
    found: dict[str, Json] = {}
    for package in _ALWAYS_NEEDED:
        found.update(_package(package, manifest.versions.get(package, ""), scope="required"))
    several = len({engine.runtime for engine in manifest.engines}) > 1
    for engine in manifest.engines:
        known = _PACKAGE_OF_RUNTIME.get(engine.runtime)
        name = known or engine.runtime
        exact = engine.needs.runtime_version and not engine.needs.later_versions
        made_with = manifest.versions.get(name, "")
        version = engine.needs.runtime_version if exact else made_with
        scope = "optional" if several else "required"
        if engine.runtime != "null":
            found.update(_package(name, version, scope=scope, on_pypi=known is not None))
    return found


def _package(name: str, version: str, *, scope: str, on_pypi: bool = True) -> dict[str, Json]:
    """A component under its reference: its purl, or its name where no registry is known."""
    at = f"@{version}" if version else ""
    purl = _purl(name, version)
    reference = purl if on_pypi else f"package:{name}{at}"
    component: dict[str, Json] = {
        "type": "library",
        "bom-ref": reference,
        "name": name,
        "scope": scope,
        **({"version": version} if version else {}),
        **({"purl": purl} if on_pypi else {}),
    }
    return {reference: component}


def _purl(name: str, version: str) -> str:
    """Package URL, https://github.com/package-url/purl-spec. On PyPI, `_` in names is `-`.

    equipoise itself is taken from wherever its user has it.
    """
    kind = "generic" if name == "equipoise" else "pypi"
    at = f"@{quote(version)}" if version else ""
    return f"pkg:{kind}/{quote(name.lower().replace('_', '-'))}{at}"


def _tool(manifest: Manifest) -> list[Json]:
    version = manifest.versions.get("equipoise", "")
    return [
        {
            "type": "application",
            "name": "equipoise",
            **({"version": version} if version else {}),
        }
    ]


def _makers(manifest: Manifest, *, used: Mapping[str, Json]) -> list[Json]:
    """Packages that made the bundle and are not needed on a device."""
    found: dict[str, Json] = {}
    for name, version in sorted(manifest.versions.items()):
        if version != _MISSING:
            found.update(_package(name, version, scope="excluded"))
    return [component for reference, component in found.items() if reference not in used]
