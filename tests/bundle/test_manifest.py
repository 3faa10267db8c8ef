"""A manifest is canonical and makes sense, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from equipoise import record
from equipoise.bundle.manifest import (
    FORMAT,
    Calibration,
    Engine,
    FileEntry,
    Licences,
    Manifest,
    Needs,
)
from equipoise.bundle.parsing import MOST_MANIFEST_BYTES, manifest_bytes, parse_manifest
from equipoise.errors import IncompatibleError, IntegrityError
from equipoise.spec import TensorSpec

FILE = "engines/int8/engine.onnx"
MANIFEST = Manifest(
    name="model",
    serial=3,
    engines=(
        Engine(
            name="int8",
            file=FILE,
            files=(FILE,),
            runtime="onnxruntime",
            size_bytes=6,
            precision="int8",
            needs=Needs(any_cpu_flag=("avx512_vnni",)),
            golden_tolerance={"y": 1e-5},
        ),
    ),
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    files={FILE: FileEntry(size_bytes=6, sha256="0" * 64)},
    labels=("zero", "one"),
    calibration=Calibration(fingerprint="a" * 64, samples=128, data="digits"),
    licences=Licences(model="MIT"),
    versions={"equipoise": "0.1.0"},
)


def parse(data: bytes) -> Manifest:
    return parse_manifest(data, where="bundle/manifest.json")


def test_a_manifest_comes_back() -> None:
    """And its bytes are those of its text."""
    data = manifest_bytes(MANIFEST)
    assert data == record.dumps(MANIFEST).encode()
    assert parse(data) == MANIFEST
    assert MANIFEST.engine("int8") is MANIFEST.engines[0]
    assert MANIFEST.engine("int4") is None


def _written(change: Callable[[dict[str, Any]], object]) -> bytes:
    data = json.loads(manifest_bytes(MANIFEST))
    change(data)
    return record.dumps(data).encode()


def _engine(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["engines"][0].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("engines"), "missing key 'engines'"),
        (lambda d: d.update(tokeniser="t"), "unknown key 'tokeniser'; did you mean 'tokenizer'"),
        (lambda d: d.update(files=[]), "Manifest.files: expected dict"),
        (_engine(threads="2"), r"Manifest.engines\[0\].threads: expected int"),
        (lambda d: d.update(format="2"), "Manifest.format"),
        (lambda d: d.pop("labels"), "not canonical"),
        (lambda d: d.update(name=""), "name has to be"),
        (lambda d: d.update(name="a\nb"), "name has to be"),
        (lambda d: d.update(serial=-1), "serial is -1"),
        (lambda d: d.update(serial=2**63), "serial is"),
        (lambda d: d.update(max_length=0), "max_length is 0"),
        (lambda d: d.update(tokenizer="t.json"), "the tokenizer 't.json' is not among its files"),
        (lambda d: d.update(inputs=[]), "there has to be an input"),
        (lambda d: d.update(outputs=d["outputs"] * 2), "no two of one name"),
        (lambda d: d["inputs"][0].update(shape=[-1, 4]), "negative size"),
        (lambda d: d.update(engines=[]), "it has 0 engines"),
        (lambda d: d.update(engines=d["engines"] * 2), "two engines have one name"),
        (_engine(name="../up"), "a name has to be"),
        (_engine(name="Int8"), "a name has to be"),
        (_engine(file="engines/int8/other"), "its file is not among its files"),
        (_engine(files=[FILE, FILE]), "its file is not among its files, or these are not sorted"),
        (_engine(file="golden.npz", files=["golden.npz"]), "not below engines/int8/"),
        (_engine(size_bytes=7), "its size is not that of its files"),
        (_engine(threads=0), "threads is 0"),
        (_engine(runtime=""), "it names no runtime"),
        (_engine(golden_tolerance={"y": -1.0}), "a golden tolerance is negative"),
        (_engine(golden_tolerance={"z": 1.0}), "golden tolerances are not for the outputs"),
        (_engine(golden_tolerance={}), "has no golden tolerance"),
        (_engine(precision="int3"), "'int3' is not one of"),
        (lambda d: d["files"].update({"manifest.json": d["files"][FILE]}), "cannot vouch"),
        (lambda d: d["files"].update({"engines/a/b": d["files"][FILE]}), "not those of its"),
        (lambda d: d["files"].update({"../up": d["files"][FILE]}), "is refused"),
        (lambda d: d["files"].update({"A": d["files"][FILE], "a": d["files"][FILE]}), "one file"),
        (lambda d: d["files"][FILE].update(sha256="A" * 64), "no SHA-256"),
        (lambda d: d["files"][FILE].update(size_bytes=-1), "the size of"),
        (lambda d: d["calibration"].update(fingerprint="?"), "calibration.fingerprint"),
    ],
)
def test_what_cannot_be_is_an_integrity_error(change: Any, message: str) -> None:
    """It names the file, and what is wrong in it."""
    with pytest.raises(IntegrityError, match=message) as caught:
        parse(_written(change))
    assert "bundle/manifest.json" in caught.value.message


def test_a_fallback_is_the_last_engine() -> None:
    """A device would never get to what comes after it."""
    first = replace(MANIFEST.engines[0], fallback=True)
    file = "engines/b/engine.onnx"
    second = replace(first, name="b", file=file, files=(file,), fallback=False)
    files = {**MANIFEST.files, file: MANIFEST.files[FILE]}
    for engines, right in (((second, first), True), ((first, second), False)):
        data = manifest_bytes(replace(MANIFEST, engines=engines, files=files))
        if right:
            assert parse(data).engines == engines
            continue
        with pytest.raises(IntegrityError, match="a fallback that is not the last"):
            parse(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("  ", " "),
        lambda text: text.strip(),
        lambda text: text + "\n",
        lambda text: text.replace("1e-05", "0.00001"),
        lambda text: text.replace('"model"', '"m\\u006fdel"', 1),
        lambda text: json.dumps(json.loads(text)),
        lambda text: json.dumps(dict(reversed(json.loads(text).items())), indent=2) + "\n",
    ],
)
def test_another_spelling_of_the_same_is_refused(change: Callable[[str], str]) -> None:
    """One manifest has one text, so it has one hash."""
    text = manifest_bytes(MANIFEST).decode()
    assert change(text) != text
    with pytest.raises(IntegrityError, match="not canonical"):
        parse(change(text).encode())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"format": 2, "format": 2}',
        b'{"format": NaN}',
        b"[" * 100_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b'{"name": "\\ud800"}',
        b'{"format": ' + b"9" * 5000 + b"}",
        b" " * (MOST_MANIFEST_BYTES + 1),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_what_is_no_json_is_an_integrity_error(content: bytes) -> None:
    """It names the file."""
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        parse(content)


def test_another_format_is_incompatible_and_not_broken() -> None:
    """Whatever keys it has; the hint says what to do."""
    later = json.dumps({"format": FORMAT + 1, "what": "is to come"}).encode()
    with pytest.raises(IncompatibleError, match=f"format {FORMAT + 1}; .* format {FORMAT}") as new:
        parse(later)
    assert "Update equipoise" in new.value.hint
    earlier = json.dumps({"format": 1, "engine": {}}).encode()
    with pytest.raises(IncompatibleError, match="format 1, which was never released") as old:
        parse(earlier)
    assert "Make the bundle anew" in old.value.hint
