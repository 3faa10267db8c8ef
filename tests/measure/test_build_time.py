"""How long building took is in the record of the stage, and not in the engine's manifest."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from equipoise import record
from equipoise.runtimes import build as building
from equipoise.runtimes.build import BuildConfig, build
from equipoise.runtimes.engine import ENGINE_MANIFEST, read_engine_manifest
from equipoise.runtimes.protocol import EngineRecord, SessionSettings
from equipoise.runtimes.registry import builder


def config_of(model: Path) -> BuildConfig:
    return BuildConfig(model=model, runtime="onnxruntime", settings=SessionSettings())


def test_building_is_timed(
    monkeypatch: pytest.MonkeyPatch, linear_onnx: Path, tmp_path: Path
) -> None:
    """All that the builder does, and no more than passed."""

    class Slow:
        def build(self, *args: object, **options: object) -> EngineRecord:
            time.sleep(0.2)
            return builder("onnxruntime").build(*args, **options)

    monkeypatch.setattr(building, "builder", lambda _name: Slow())
    begin = time.monotonic()
    made = build(config_of(linear_onnx), output=tmp_path)
    assert 0.2 <= made.build_s <= time.monotonic() - begin
    assert record.loads(EngineRecord, record.dumps(made), where="build") == made


def test_same_engine_has_the_same_manifest(linear_onnx: Path, tmp_path: Path) -> None:
    """Byte by byte, however long it took; so what is keyed by it is not made anew."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        assert build(config_of(linear_onnx), output=folder).build_s > 0
    one, two = ((folder / ENGINE_MANIFEST).read_bytes() for folder in folders)
    assert one == two
    assert read_engine_manifest(folders[0]).engine.build_s == 0.0


def test_record_from_before_is_still_read() -> None:
    """It has no such field."""
    old = '{"file": "engine.onnx", "size_bytes": 5, "kernels": {"Add": 1}}'
    assert record.loads(EngineRecord, old, where="old").build_s == 0.0
