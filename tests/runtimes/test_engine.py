"""A directory with an engine is what its manifest says, or nothing of it is opened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from equipoise import testing
from equipoise.errors import IncompatibleError, IntegrityError
from equipoise.runtimes import engine as engines
from equipoise.runtimes.build import BuildConfig, build
from equipoise.runtimes.engine import (
    ENGINE_MANIFEST,
    manifest_sha256,
    open_engine,
    read_engine_manifest,
)
from equipoise.runtimes.protocol import SessionSettings


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A directory with an engine of ONNX Runtime."""
    testing.write_model(tmp_path / "model.onnx")
    (tmp_path / "engine").mkdir()
    config = BuildConfig(
        model=tmp_path / "model.onnx",
        runtime="onnxruntime",
        settings=SessionSettings(threads=2),
        target="cpu",
    )
    build(config, output=tmp_path / "engine")
    return tmp_path / "engine"


def test_the_manifest_says_what_was_built_and_how_it_runs(engine: Path) -> None:
    """Target, runtime, settings, and the hash of every file."""
    found = read_engine_manifest(engine)
    assert (found.target, found.runtime, found.settings.threads) == ("cpu", "onnxruntime", 2)
    assert set(found.files) == {path.name for path in engine.iterdir()} - {ENGINE_MANIFEST}
    with open_engine(engine) as session:
        feeds = testing.sample_feeds(3)
        np.testing.assert_allclose(
            session.run(feeds)["y"], testing.expected_outputs(feeds)["y"], atol=1e-4
        )


def _no_session(_name: str) -> object:
    pytest.fail("a runtime was asked for an engine that had not passed")


def _changed(engine: Path) -> None:
    path = engine / "engine.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def _edited(engine: Path, **fields: object) -> None:
    """Change the manifest as somebody would who knows of its own hash."""
    path = engine / ENGINE_MANIFEST
    found = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({**found, "sha256": manifest_sha256(found)}))


def _silently(engine: Path) -> None:
    path = engine / ENGINE_MANIFEST
    path.write_text(path.read_text().replace('"threads": 2', '"threads": 3'))


@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (_changed, IntegrityError, "engine.onnx is not what its hash says"),
        (lambda e: (e / "engine.onnx").write_bytes(b""), IntegrityError, "not what its hash says"),
        (lambda e: (e / "engine.onnx").unlink(), IntegrityError, "engine.onnx is missing"),
        (lambda e: (e / "more.so").write_bytes(b"x"), IntegrityError, "more.so is not listed"),
        (lambda e: (e / "link").symlink_to(e / "engine.onnx"), IntegrityError, "link is a link"),
        (lambda e: (e / ENGINE_MANIFEST).unlink(), IntegrityError, "has no engine.json"),
        (lambda e: (e / ENGINE_MANIFEST).write_text("{"), IntegrityError, "engine.json"),
        (lambda e: (e / ENGINE_MANIFEST).write_text("[1]"), IntegrityError, "its own hash"),
        (_silently, IntegrityError, "its own hash"),
        (lambda e: _edited(e, format=99), IncompatibleError, "format 99"),
        (lambda e: _edited(e, colour="red"), IntegrityError, "unknown key 'colour'"),
        (lambda e: _edited(e, files={}), IntegrityError, "not listed"),
    ],
)
def test_what_is_not_as_it_was_is_never_opened(
    engine: Path, harm, kind, words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed, cut, missing, extra, linked; no manifest, a broken, a later or an edited one."""
    harm(engine)
    monkeypatch.setattr(engines, "session_opener", _no_session)
    with pytest.raises(kind) as caught:
        open_engine(engine)
    assert words in str(caught.value)


def test_a_manifest_of_a_bundle_excuses_nothing(engine: Path) -> None:
    """A bundle keeps each engine in a directory of its own, with nothing else in it."""
    (engine / "manifest.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"manifest\.json is not listed"):
        read_engine_manifest(engine)
