"""Loading and running a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import equipoise
from equipoise.bundle.golden import GOLDEN_FILE, Golden, golden_bytes
from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.writer import write_bundle
from equipoise.deploy import OutputCheck, SelfTest
from equipoise.errors import InputError, IntegrityError, SourceError, UsageError
from equipoise.runtimes.onnxruntime.session import open_session
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import TensorSpec


def make(
    directory: Path, engine: Path, *, shift: float = 0.0, runtime: str = "onnxruntime"
) -> Path:
    """A bundle of ``engine`` whose golden outputs are off by ``shift``."""
    random = np.random.default_rng(4)
    with open_session(engine, settings=SessionSettings()) as session:
        inputs, outputs = session.inputs, session.outputs
        samples = [random.normal(size=(n, 4)).astype(np.float32) for n in (1, 3)]
        results = [session.run({"x": x}) for x in samples]
    vectors = [
        Golden(inputs={"x": x}, outputs={"y": r["y"] + np.float32(shift)}, reference=r)
        for x, r in zip(samples, results, strict=True)
    ]
    manifest = Manifest(
        name="linear",
        target="cpu",
        engine=Engine(file="engine.onnx", runtime=runtime, threads=1, size_bytes=1),
        inputs=inputs,
        outputs=outputs,
        files={},
        golden_tolerance={"y": 1e-4},
        versions={},
    )
    documents = {GOLDEN_FILE: golden_bytes(vectors)}
    write_bundle(directory, manifest, copies={"engine.onnx": engine}, documents=documents)
    return directory


@pytest.fixture
def bundle(tmp_path: Path, linear_onnx: Path) -> Path:
    """A real bundle."""
    return make(tmp_path / "bundle", linear_onnx)


def test_three_lines_run_a_bundle(bundle: Path) -> None:
    """Path or text; named arrays in and out, at any batch size."""
    with equipoise.load(str(bundle)) as session:
        for batch in (1, 5):
            assert session.run({"x": np.ones((batch, 4), np.float32)})["y"].shape == (batch, 3)
        assert session.inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),)
        assert [spec.name for spec in session.outputs] == ["y"]
    with pytest.raises(UsageError, match="closed"):
        session.run({"x": np.ones((1, 4), np.float32)})


def test_outputs_go_into_the_buffers_of_the_caller(bundle: Path) -> None:
    """No allocation on the device's hot path."""
    buffer = np.full((2, 3), -1, dtype=np.float32)
    with equipoise.load(bundle) as session:
        found = session.run({"x": np.ones((2, 4), np.float32)}, out={"y": buffer})
        expected = session.run({"x": np.ones((2, 4), np.float32)})
    assert found["y"] is buffer
    np.testing.assert_array_equal(buffer, expected["y"])


def test_selftest_passes_where_the_engine_gives_the_golden_outputs(bundle: Path) -> None:
    """On all samples, whatever their batch, and it says so."""
    with equipoise.load(bundle, threads=2) as session:
        found = session.selftest()
        assert len(session.golden()) == 2
    assert found.passed
    assert found.samples == 2
    assert str(found).startswith("self-test passed on 2 golden samples: y differs by at most")


def test_selftest_fails_where_it_does_not(tmp_path: Path, linear_onnx: Path) -> None:
    """A device whose kernels give other numbers is told from one that is right."""
    with equipoise.load(make(tmp_path / "bundle", linear_onnx, shift=0.5)) as session:
        found = session.selftest()
    assert not found.passed
    assert found.outputs[0].max_abs == pytest.approx(0.5, abs=1e-4)
    assert "FAILED" in str(found)
    assert "allowed 0.0001" in str(found)


def test_selftest_fails_on_nan(tmp_path: Path, linear_onnx: Path) -> None:
    """NaN is no agreement, wherever it stands."""
    with equipoise.load(make(tmp_path / "bundle", linear_onnx, shift=np.nan)) as session:
        assert not session.selftest().passed
    nan = OutputCheck(name="y", max_abs=float("nan"), allowed=1.0)
    good = OutputCheck(name="z", max_abs=0.0, allowed=1.0)
    assert not SelfTest(samples=1, outputs=(good, nan)).passed


def test_a_changed_engine_is_not_opened(bundle: Path) -> None:
    """The hash is checked first."""
    with (bundle / "engine.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(IntegrityError, match=r"engine\.onnx is not what its hash says"):
        equipoise.load(bundle)


def test_the_check_can_be_left_to_somebody_else(bundle: Path) -> None:
    """Where the hashes have been verified already, an extra file does not matter."""
    (bundle / "notes.txt").write_text("kept by the operator")
    with pytest.raises(IntegrityError, match=r"notes\.txt is not listed"):
        equipoise.load(bundle)
    with equipoise.load(bundle, check=False) as session:
        assert session.selftest().passed


def test_a_broken_engine_that_is_not_checked_is_a_source_error(bundle: Path) -> None:
    """It names the engine file."""
    (bundle / "engine.onnx").write_bytes(b"noise")
    with pytest.raises(SourceError, match=r"engine\.onnx"):
        equipoise.load(bundle, check=False)


def test_no_bundle_is_an_integrity_error(tmp_path: Path) -> None:
    """It names the directory."""
    with pytest.raises(IntegrityError, match="nothing is no bundle"):
        equipoise.load(tmp_path / "nothing")


def test_an_unknown_runtime_is_named(tmp_path: Path, linear_onnx: Path) -> None:
    """A bundle of a runtime that this installation does not know."""
    bundle = make(tmp_path / "bundle", linear_onnx, runtime="tflite")
    with pytest.raises(UsageError, match="unknown runtime 'tflite'"):
        equipoise.load(bundle)


def test_feeds_that_do_not_fit_are_named(bundle: Path) -> None:
    """The tensor, what was given and what is allowed."""
    with (
        equipoise.load(bundle) as session,
        pytest.raises(InputError, match=r"'x' is float64\[1, 4\].*float32\[batch, 4\]"),
    ):
        session.run({"x": np.ones((1, 4))})
