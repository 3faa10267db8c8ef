"""The bill of materials: valid CycloneDX, complete, and the same for the same manifest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from equipoise.bundle.manifest import (
    Calibration,
    Engine,
    FileEntry,
    Licences,
    Manifest,
    Needs,
)
from equipoise.bundle.sbom import sbom
from equipoise.spec import TensorSpec

VERSIONS = {
    "equipoise": "0.1.0",
    "numpy": "2.4.6",
    "onnxruntime": "1.32.0",
    "torch": "2.13.0+cpu",
    "ml_dtypes": "0.6.0",
    "transformers": "missing",
}


def entry(digit: str) -> FileEntry:
    return FileEntry(size_bytes=int(digit, 16), sha256=digit * 64)


def engine(name: str, **changes: Any) -> Engine:
    file = f"engines/{name}/engine.onnx"
    made = Engine(name=name, file=file, files=(file,), runtime="onnxruntime", size_bytes=10)
    return replace(made, **changes)


MANIFEST = Manifest(
    name="digits",
    engines=(engine("int8", precision="int8", target="cpu"), engine("float", fallback=True)),
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    files={
        "engines/int8/engine.onnx": entry("a"),
        "engines/float/engine.onnx": entry("b"),
        "golden/int8.npz": entry("c"),
    },
    task="sequence-classification",
    labels=("zero", "one"),
    calibration=Calibration(fingerprint="d" * 64, samples=128, data="digits"),
    licences=Licences(model="Apache-2.0", data="CC-BY-4.0 OR MIT"),
    versions=VERSIONS,
)
BARE = Manifest(
    name="bare",
    engines=(engine("only", runtime="null"),),
    inputs=(),
    outputs=(),
    files={"engines/only/engine.onnx": entry("e")},
)
OTHERS = replace(
    MANIFEST,
    engines=(
        engine("gpu", runtime="tensorrt-rtx", needs=Needs(runtime_version="1.7.1.116")),
        engine("npu", runtime="their own", providers=("NPU",)),
        engine("float", fallback=True),
    ),
    files={f"engines/{name}/engine.onnx": entry("f") for name in ("gpu", "npu", "float")},
)


def bill(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sbom(manifest))
    return found


def packages(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {component["name"]: component for component in bill(manifest)["components"]}


def files_in(component: dict[str, Any]) -> dict[str, str]:
    """Every file inside a component, with its hash."""
    found = {}
    for inner in component.get("components", []):
        if inner["type"] == "file":
            found[inner["name"]] = inner["hashes"][0]["content"]
        found |= files_in(inner)
    return found


@pytest.mark.parametrize("manifest", [MANIFEST, BARE, OTHERS], ids=lambda m: m.name)
def test_it_is_valid_cyclonedx(manifest: Manifest) -> None:
    """By the JSON schema of CycloneDX 1.6, strictly."""
    validators = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validators.JsonStrictValidator(schema.SchemaVersion.V1_6)
    assert validator.validate_str(sbom(manifest).decode()) is None


def test_the_validator_finds_a_fault() -> None:
    """The test above could fail."""
    validators = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validators.JsonStrictValidator(schema.SchemaVersion.V1_6)
    wrong = bill(MANIFEST)
    wrong["metadata"]["component"]["modelCard"]["weights"] = "unknown key"
    assert validator.validate_str(json.dumps(wrong)) is not None


@pytest.mark.parametrize("manifest", [MANIFEST, BARE, OTHERS], ids=lambda m: m.name)
def test_every_file_is_in_it_with_its_hash(manifest: Manifest) -> None:
    """Those of engines inside their engine, the others beside them, none twice or left out."""
    expected = {name: entry.sha256 for name, entry in manifest.files.items()}
    assert files_in(bill(manifest)["metadata"]["component"]) == expected


def test_references_are_unique_and_lead_somewhere() -> None:
    """Every dependency is a component of the bill."""
    for manifest in (MANIFEST, BARE, OTHERS):
        found = bill(manifest)
        references = [c["bom-ref"] for c in found["components"]]
        assert len(set(references)) == len(references)
        main, *others = found["dependencies"]
        assert main["ref"] == found["metadata"]["component"]["bom-ref"]
        assert sorted(main["dependsOn"]) == sorted(d["ref"] for d in others)
        assert set(main["dependsOn"]) <= set(references)


def test_what_a_device_needs_is_told_from_what_made_it() -> None:
    """onnxruntime, NumPy and equipoise run it; torch made it; what was missing made nothing."""
    scopes = {name: package["scope"] for name, package in packages(MANIFEST).items()}
    assert scopes == {
        "equipoise": "required",
        "numpy": "required",
        "onnxruntime": "required",
        "torch": "excluded",
        "ml_dtypes": "excluded",
    }


def test_one_of_several_runtimes_is_enough() -> None:
    """Each is optional, with the version that its engine holds for; none is made up."""
    found = packages(OTHERS)
    assert found["tensorrt-rtx-cu13"]["scope"] == "optional"
    assert found["tensorrt-rtx-cu13"]["purl"] == "pkg:pypi/tensorrt-rtx-cu13@1.7.1.116"
    assert found["onnxruntime"]["scope"] == "optional"
    assert "purl" not in found["their own"]
    assert "version" not in found["their own"]


def test_package_urls_are_read_by_others() -> None:
    """By the reference library, with local parts of versions and underscores of names."""
    package_url = pytest.importorskip("packageurl").PackageURL
    for component in packages(MANIFEST).values():
        read = package_url.from_string(component["purl"])
        assert read.to_string() == component["purl"]
        assert read.version == VERSIONS[component["name"]]
    assert package_url.from_string(packages(MANIFEST)["ml_dtypes"]["purl"]).name == "ml-dtypes"


def test_licences_are_stated_or_said_not_to_be() -> None:
    """The expression of the model; the two others in words."""
    model = bill(MANIFEST)["metadata"]["component"]
    assert model["licenses"] == [{"expression": "Apache-2.0"}]
    said = {p["name"]: p["value"] for p in model["properties"]}
    assert said["equipoise:licence of the data"] == "CC-BY-4.0 OR MIT"
    assert said["equipoise:licence of the weights it was made from"] == "not stated"
    assert "licenses" not in bill(BARE)["metadata"]["component"]


def test_the_model_card_says_what_goes_in_and_what_set_the_ranges() -> None:
    """Specs, task, calibration data with its fingerprint."""
    card = bill(MANIFEST)["metadata"]["component"]["modelCard"]["modelParameters"]
    assert card["inputs"] == [{"format": "x: float32[batch, 4]"}]
    assert card["task"] == "sequence-classification"
    (data,) = card["datasets"]
    assert data["name"] == "digits"
    assert {p["value"] for p in data["contents"]["properties"]} == {"d" * 64, "128"}
    assert "datasets" not in bill(BARE)["metadata"]["component"]["modelCard"]["modelParameters"]


def test_the_same_manifest_gives_the_same_bytes() -> None:
    """No clock, no chance; signing raises the serial and changes nothing here."""
    assert sbom(MANIFEST) == sbom(MANIFEST) == sbom(replace(MANIFEST, serial=7))
    assert b"timestamp" not in sbom(MANIFEST)


def test_other_content_has_another_identity() -> None:
    """The serial number of the bill follows from what it says."""
    changed = replace(MANIFEST, files={**MANIFEST.files, "golden/int8.npz": entry("9")})
    assert bill(changed)["serialNumber"] != bill(MANIFEST)["serialNumber"]
