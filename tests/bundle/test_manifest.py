"""A bundle is what its manifest says, or it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equipoise import fs
from equipoise.bundle.manifest import FORMAT, Engine, Manifest, read_manifest, verify
from equipoise.bundle.writer import check_replaceable, write_bundle
from equipoise.errors import IncompatibleError, InputError, IntegrityError, OutputError
from equipoise.spec import TensorSpec

MANIFEST = Manifest(
    name="model.onnx",
    target="cpu",
    engine=Engine(file="engine.onnx", runtime="onnxruntime", threads=2, size_bytes=6),
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    files={},
    golden_tolerance={"y": 1e-5},
    labels=("zero", "one"),
    versions={"equipoise": "0.1.0"},
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of three files; their content does not matter here."""
    source = tmp_path / "engine.onnx"
    source.write_bytes(b"engine")
    documents = {"golden.npz": b"golden", "recipe.json": b"{}"}
    directory = tmp_path / "out" / "bundle"
    write_bundle(directory, MANIFEST, copies={"engine.onnx": source}, documents=documents)
    return directory


def test_a_manifest_comes_back_with_the_hash_of_every_file(bundle: Path) -> None:
    """And with nothing else changed."""
    found = read_manifest(bundle)
    assert replace(found, files={}) == MANIFEST
    assert found.files == {
        name: fs.sha256_file(bundle / name) for name in ("engine.onnx", "golden.npz", "recipe.json")
    }
    verify(bundle, found)


@pytest.mark.parametrize("name", ["engine.onnx", "golden.npz", "recipe.json"])
def test_a_changed_file_is_named(bundle: Path, name: str) -> None:
    """One byte is enough."""
    (bundle / name).write_bytes((bundle / name).read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match=f"{name} is not what its hash says") as caught:
        verify(bundle, read_manifest(bundle))
    assert caught.value.exit_code == 4
    assert caught.value.hint


def test_a_missing_file_is_named(bundle: Path) -> None:
    """Whatever it is for."""
    (bundle / "recipe.json").unlink()
    with pytest.raises(IntegrityError, match=r"recipe\.json is missing"):
        verify(bundle, read_manifest(bundle))


@pytest.mark.parametrize("name", ["extra.bin", "deep/extra.bin", ".hidden"])
def test_a_file_that_is_not_listed_is_named(bundle: Path, name: str) -> None:
    """In folders below and with a hidden name too."""
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"")
    with pytest.raises(IntegrityError, match=f"{name} is not listed"):
        verify(bundle, read_manifest(bundle))


def test_a_link_is_named(bundle: Path, tmp_path: Path) -> None:
    """Even one to the right content, which may change behind the hash."""
    (tmp_path / "elsewhere").write_bytes(b"engine")
    (bundle / "engine.onnx").unlink()
    (bundle / "engine.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match=r"engine\.onnx is a link"):
        verify(bundle, read_manifest(bundle))


def test_a_linked_folder_is_named(bundle: Path, tmp_path: Path) -> None:
    """Nothing of a bundle lies elsewhere, listed or not."""
    (tmp_path / "elsewhere").mkdir()
    (bundle / "folder").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(IntegrityError, match="folder is a link"):
        verify(bundle, read_manifest(bundle))


def test_a_name_that_leads_out_of_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    """A manifest cannot vouch for files elsewhere."""
    secret = tmp_path / "out" / "secret"
    secret.write_bytes(b"secret")
    manifest = read_manifest(bundle)
    files = {**manifest.files, "../secret": fs.sha256_file(secret)}
    with pytest.raises(IntegrityError, match="secret is missing"):
        verify(bundle, replace(manifest, files=files))


def test_a_directory_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    """Missing or empty, the error names it and says what to give."""
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(IntegrityError, match=f"{directory} is no bundle") as caught:
            read_manifest(directory)
        assert "bundle directory" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("engine"), "missing key 'engine'"),
        (
            lambda data: data.update(tokeniser="t"),
            "unknown key 'tokeniser'; did you mean 'tokenizer'",
        ),
        (lambda data: data.update(files=[]), "Manifest.files: expected dict"),
        (lambda data: data["engine"].update(threads="2"), "Manifest.engine.threads: expected int"),
        (lambda data: data.update(format="1"), "Manifest.format"),
    ],
)
def test_a_manifest_of_another_form_is_an_integrity_error(
    bundle: Path, change: Any, message: str
) -> None:
    """It names the file and the key."""
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match=r"manifest\.json") as caught:
        read_manifest(bundle)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1, "format": 1}'])
def test_a_manifest_that_is_no_json_is_an_integrity_error(bundle: Path, content: bytes) -> None:
    """It names the file."""
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        read_manifest(bundle)


def test_a_later_format_is_incompatible_and_not_broken(bundle: Path) -> None:
    """Whatever keys it has by then; the hint says what to update."""
    text = json.dumps({"format": FORMAT + 1, "what": "is to come"})
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(IncompatibleError, match=f"format {FORMAT + 1}.*up to {FORMAT}") as caught:
        read_manifest(bundle)
    assert "Update equipoise" in caught.value.hint


def test_a_bundle_replaces_a_bundle_whole(bundle: Path) -> None:
    """No file of the old one stays."""
    write_bundle(bundle, MANIFEST, copies={}, documents={"engine.onnx": b"new"})
    assert sorted(path.name for path in bundle.iterdir()) == ["engine.onnx", "manifest.json"]
    verify(bundle, read_manifest(bundle))


def test_something_else_is_never_replaced(tmp_path: Path) -> None:
    """A directory that is no bundle, or a file, stays as it is."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("kept")
    for place in (home, file):
        with pytest.raises(OutputError, match=f"{place} exists and is no bundle"):
            check_replaceable(place)
        with pytest.raises(OutputError, match=f"{place} exists and is no bundle"):
            write_bundle(place, MANIFEST, copies={}, documents={})
    assert (home / "thesis.txt").read_text() == "years of work"
    assert file.read_text() == "kept"


def test_a_copy_that_fails_keeps_the_old_bundle(bundle: Path, tmp_path: Path) -> None:
    """A file to copy that is not there leaves the old bundle whole and nothing beside it."""
    with pytest.raises(InputError, match="missing"):
        write_bundle(bundle, MANIFEST, copies={"a": tmp_path / "missing"}, documents={})
    verify(bundle, read_manifest(bundle))
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
