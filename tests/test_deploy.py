"""Loading and running a bundle."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.bundle.making import FILE, engine_of, linear_model, make_bundle

import equipoise
from equipoise.bundle import signature
from equipoise.bundle.manifest import Engine, Manifest, Needs
from equipoise.bundle.reading import Bundle, read_manifest
from equipoise.bundle.writer import write_bundle
from equipoise.cli.main import main
from equipoise.deploy import BundleSession, OutputCheck, SelfTest
from equipoise.errors import (
    EquipoiseError,
    IncompatibleError,
    InputError,
    IntegrityError,
    MissingExtraError,
    OutputError,
    ParityError,
    SignatureError,
    SourceError,
    UsageError,
)
from equipoise.runtimes import device
from equipoise.serving import opening
from equipoise.serving.stats import UNTIMED, WINDOW, Recorder
from equipoise.signing import SignConfig, sign_bundle
from equipoise.spec import TensorSpec

ONE = {"x": np.ones((1, 4), np.float32)}
FORMS = ("bundle", "bundle.zip")


@pytest.fixture(params=FORMS)
def bundle(request: pytest.FixtureRequest, tmp_path: Path, linear_onnx: Path) -> Path:
    """A real bundle in either form."""
    return make_bundle(tmp_path / request.param, linear_onnx, engines={"float": {"batching": True}})


@pytest.fixture(scope="module")
def constants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models; the first always answers 1, and the second 2."""
    folder = tmp_path_factory.mktemp("constants")
    return tuple(linear_model(folder / f"{n}.onnx", constant=n) for n in (1, 2))  # type: ignore[return-value]


# Running.


def test_three_lines_run_a_bundle(bundle: Path) -> None:
    """Path or text; named arrays in and out, at any batch size."""
    with equipoise.load(str(bundle)) as session:
        for batch in (1, 5):
            assert session.run({"x": np.ones((batch, 4), np.float32)})["y"].shape == (batch, 3)
        assert session.inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),)
        assert [spec.name for spec in session.outputs] == ["y"]
        assert session.directory == bundle
        assert session.engine == session.manifest.engines[0]
    for attempt in (
        lambda: session.run(ONE), session.stats, session.selftest, lambda: session.manifest,
        lambda: session.run_batch([ONE]), lambda: session.read("golden.npz"),
        lambda: session.reload(bundle),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="closed"):
            attempt()
    session.close()


def test_outputs_go_into_the_buffers_of_the_caller(bundle: Path) -> None:
    """No allocation on the device's hot path."""
    buffer = np.full((2, 3), -1, dtype=np.float32)
    with equipoise.load(bundle) as session:
        found = session.run({"x": np.ones((2, 4), np.float32)}, out={"y": buffer})
        expected = session.run({"x": np.ones((2, 4), np.float32)})
    assert found["y"] is buffer
    np.testing.assert_array_equal(buffer, expected["y"])


def test_feeds_that_do_not_fit_are_named(bundle: Path) -> None:
    """The tensor, what was given and what is allowed; it counts as an error."""
    with equipoise.load(bundle) as session:
        with pytest.raises(InputError, match=r"'x' is float64\[1, 4\].*float32\[batch, 4\]"):
            session.run({"x": np.ones((1, 4))})
        stats = session.stats()
    assert (stats.requests, stats.errors) == (0, 1)


def test_threads_of_none_are_refused(bundle: Path) -> None:
    """As is a number below 1."""
    with pytest.raises(UsageError, match="threads is 0"):
        equipoise.load(bundle, threads=0)


# Self-test.


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
    with equipoise.load(make_bundle(tmp_path / "bundle", linear_onnx, shift=0.5)) as session:
        found = session.selftest()
    assert not found.passed
    assert found.outputs[0].max_abs == pytest.approx(0.5, abs=1e-4)
    assert "FAILED" in str(found)
    assert "allowed 0.0001" in str(found)


def test_selftest_fails_on_nan(tmp_path: Path, linear_onnx: Path) -> None:
    """NaN is no agreement, wherever it stands; nor is no sample at all."""
    with equipoise.load(make_bundle(tmp_path / "bundle", linear_onnx, shift=np.nan)) as session:
        assert not session.selftest().passed
    nan = OutputCheck(name="y", max_abs=float("nan"), allowed=1.0)
    good = OutputCheck(name="z", max_abs=0.0, allowed=1.0)
    assert not SelfTest(samples=1, outputs=(good, nan)).passed
    assert not SelfTest(samples=0, outputs=(good,)).passed
    assert SelfTest(samples=1, outputs=(good,)).passed


def test_selftest_of_an_engine_that_was_not_run_where_it_was_packed(
    tmp_path: Path, linear_onnx: Path
) -> None:
    """It is compared with the reference; without a stated tolerance it cannot pass."""
    engine = {"golden_from": "reference", "golden_tolerance": {}}
    bundle = make_bundle(tmp_path / "bundle", linear_onnx, engines={"float": engine})
    with equipoise.load(bundle) as session:
        found = session.selftest()
    assert found.outputs[0].max_abs == 0
    assert not found.passed
    assert "not run where it was packed" in str(found)


# What is refused.


def test_a_changed_engine_is_not_opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash is checked first, on the bytes that are used: the runtime never sees them."""
    data = bytearray((bundle / FILE).read_bytes() if bundle.is_dir() else bundle.read_bytes())
    at = data.find(b"MatMul")
    data[at] ^= 1
    (bundle / FILE if bundle.is_dir() else bundle).write_bytes(data)
    monkeypatch.setattr(opening, "bytes_opener", lambda _name: _never)
    with pytest.raises(IntegrityError, match=r"engine\.onnx is not what its"):
        equipoise.load(bundle)


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the runtime was given bytes that were not checked")


def test_the_bytes_that_were_hashed_are_those_that_run(
    tmp_path: Path, linear_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is changed after everything was verified is not run either."""
    bundle = make_bundle(tmp_path / "bundle", linear_onnx)
    real = Bundle.verify

    def then_change(self: Bundle, **kwargs: Any) -> None:
        real(self, **kwargs)
        data = bytearray((bundle / FILE).read_bytes())
        data[data.find(b"MatMul")] ^= 1
        (bundle / FILE).write_bytes(data)

    monkeypatch.setattr(Bundle, "verify", then_change)
    with pytest.raises(IntegrityError, match=r"engine\.onnx"):
        equipoise.load(bundle)


def test_the_check_can_be_left_to_somebody_else(tmp_path: Path, linear_onnx: Path) -> None:
    """Hashes are not computed; which files there are, and how large, is looked at even so."""
    bundle = make_bundle(tmp_path / "bundle", linear_onnx, documents={"notes.txt": b"kept"})
    (bundle / "notes.txt").write_bytes(b"KEPT")
    with pytest.raises(IntegrityError, match=r"notes\.txt is not what its hash says"):
        equipoise.load(bundle)
    with equipoise.load(bundle, check=False) as session:
        assert session.selftest().passed
        with pytest.raises(IntegrityError):
            session.read("notes.txt")
    (bundle / "extra").write_text("")
    with pytest.raises(IntegrityError, match="extra is not listed"):
        equipoise.load(bundle, check=False)


def test_a_broken_engine_that_is_not_checked_is_a_source_error(
    tmp_path: Path, linear_onnx: Path
) -> None:
    """It names the engine file."""
    bundle = make_bundle(tmp_path / "bundle", linear_onnx)
    size = (bundle / FILE).stat().st_size
    (bundle / FILE).write_bytes(b"n" * size)
    with pytest.raises(SourceError, match=r"engine\.onnx"):
        equipoise.load(bundle, check=False)


def test_no_bundle_is_an_integrity_error(tmp_path: Path) -> None:
    """It names the path, whether something is there or not."""
    with pytest.raises(IntegrityError, match=r"no such bundle: .*nothing"):
        equipoise.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntegrityError, match="empty is no bundle"):
        equipoise.load(tmp_path / "empty")


def test_an_engine_that_is_not_what_the_manifest_says_is_refused(
    tmp_path: Path, linear_onnx: Path
) -> None:
    """Other tensors than the manifest has, for whatever reason."""
    bundle = make_bundle(tmp_path / "bundle", linear_onnx)
    manifest = read_manifest(bundle)
    other = TensorSpec(name="x", dtype="float32", shape=("batch", 5))
    write_bundle(
        bundle, replace(manifest, inputs=(other,)), copies={FILE: linear_onnx}, documents={}
    )
    with pytest.raises(IntegrityError, match=r"input x: float32\[batch, 4\]; the manifest says"):
        equipoise.load(bundle)


def test_weights_outside_the_bundle_are_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that names a file beside it finds none, not even in the working directory."""
    import onnx

    model = onnx.load(linear_model(tmp_path / "model.onnx", constant=1))
    onnx.save(
        model, tmp_path / "outside.onnx", save_as_external_data=True, location="w.bin",
        size_threshold=0,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    specs = [
        TensorSpec(name=n, dtype="float32", shape=("batch", s)) for n, s in (("x", 4), ("y", 64))
    ]
    manifest = Manifest(
        name="m",
        engines=(engine_of(tmp_path / "outside.onnx"),),
        inputs=(specs[0],),
        outputs=(specs[1],),
    )
    write_bundle(
        tmp_path / "bundle", manifest, copies={FILE: tmp_path / "outside.onnx"}, documents={}
    )
    assert (tmp_path / "w.bin").is_file()
    with pytest.raises(SourceError, match=r"engine\.onnx"):
        equipoise.load(tmp_path / "bundle")


@pytest.mark.parametrize("form", FORMS)
def test_an_engine_of_several_files_runs_from_a_directory_of_its_own(
    tmp_path: Path, form: str
) -> None:
    """With its weights beside it; the directory is private, and gone afterwards."""
    import onnx

    model = onnx.load(linear_model(tmp_path / "model.onnx", constant=1))
    onnx.save(
        model, tmp_path / "engine.onnx", save_as_external_data=True, location="engine.onnx.data",
        size_threshold=0,
    )  # fmt: skip
    files = {f"engines/float/{n}": tmp_path / n for n in ("engine.onnx", "engine.onnx.data")}
    engine = Engine(
        name="float",
        file=FILE,
        files=tuple(sorted(files)),
        runtime="onnxruntime",
        size_bytes=sum(p.stat().st_size for p in files.values()),
        golden_tolerance={"y": 1e-4},
    )
    specs = [
        TensorSpec(name=n, dtype="float32", shape=("batch", s)) for n, s in (("x", 4), ("y", 64))
    ]
    manifest = Manifest(name="m", engines=(engine,), inputs=(specs[0],), outputs=(specs[1],))
    write_bundle(tmp_path / form, manifest, copies=files, documents={})
    seen: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "session_opener", lambda name: _noting(name, seen))
        session = equipoise.load(tmp_path / form)
    assert seen[0].stat().st_mode & 0o777 == 0o700
    assert (session.run(ONE)["y"] == 1).all()
    session.close()
    assert not seen[0].exists()


def _noting(name: str, seen: list[Path]) -> Callable[..., Any]:
    from equipoise.runtimes.registry import session_opener

    def opened(engine: Path, **kwargs: Any) -> Any:
        seen.append(engine.parents[2])
        return session_opener(name)(engine, **kwargs)

    return opened


# The choice among engines.


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend to be another device."""

    def pretend(**fields: Any) -> None:
        other = replace(device.this_device(), **fields)
        monkeypatch.setattr(opening, "this_device", lambda: other)

    return pretend


ENGINES = {
    "orin": {"needs": Needs(compute_capabilities=("8.7",))},
    "vnni": {"needs": Needs(platform="linux-x86_64", any_cpu_flag=("avx512_vnni", "avx_vnni"))},
    "new": {"needs": Needs(runtime_version="99.1", later_versions=True)},
    "float": {"fallback": True},
}


def test_the_first_engine_that_fits_is_run(
    tmp_path: Path, linear_onnx: Path, here: Callable[..., None]
) -> None:
    """By platform, CPU features, runtime version and compute capability."""
    bundle = make_bundle(tmp_path / "bundle", linear_onnx, engines=ENGINES)

    def chosen(**fields: Any) -> str:
        usual = {
            "platform": "linux-x86_64",
            "cpu_flags": lambda: frozenset({"avx2"}),
            "compute_capability": lambda: "",
            "runtime_version": lambda _name: "1.28.0",
        }
        here(**{**usual, **fields})
        with equipoise.load(bundle) as session:
            assert session.selftest().passed
            return session.stats().engine

    assert chosen() == "float"
    assert chosen(cpu_flags=lambda: frozenset({"avx2", "avx_vnni"})) == "vnni"
    vnni = frozenset({"avx_vnni"})
    assert chosen(platform="linux-aarch64", cpu_flags=lambda: vnni) == "float"
    assert chosen(runtime_version=lambda _name: "99.1") == "new"
    assert chosen(runtime_version=lambda _name: "100.0.1") == "new"
    assert chosen(runtime_version=lambda _name: "99.0.9") == "float"
    assert chosen(compute_capability=lambda: "8.7") == "orin"
    assert chosen(compute_capability=lambda: "8.9") == "float"


def test_an_engine_is_asked_for_by_name(tmp_path: Path, linear_onnx: Path) -> None:
    """It runs, or the error is its own; an unknown name gets the nearest."""
    bundle = make_bundle(tmp_path / "bundle", linear_onnx, engines=ENGINES)
    with equipoise.load(bundle, engine="float") as session:
        assert session.engine.name == "float"
    with pytest.raises(IncompatibleError, match=r"'new': it is for .* 99\.1 or later; 1\."):
        equipoise.load(bundle, engine="new")
    with pytest.raises(UsageError, match="unknown engine 'flaot'") as caught:
        equipoise.load(bundle, engine="flaot")
    assert "'float'" in caught.value.hint


def test_where_none_fits_every_reason_is_said(tmp_path: Path, linear_onnx: Path) -> None:
    """One line for each engine."""
    engines = {
        "jetson": {"needs": Needs(platform="linux-riscv64")},
        "lite": {"runtime": "tflite"},
        "npu": {"providers": ("QNNExecutionProvider",)},
    }
    bundle = make_bundle(tmp_path / "bundle", linear_onnx, engines=engines)
    with pytest.raises(IncompatibleError, match="none of its 3 engines") as caught:
        equipoise.load(bundle)
    lines = caught.value.message.splitlines()[1:]
    assert len(lines) == 3
    assert "linux-riscv64" in lines[0]
    assert "unknown runtime 'tflite'" in lines[1]
    assert "QNNExecutionProvider" in lines[2]
    assert caught.value.exit_code == 5


def test_a_missing_package_is_named_with_its_line(
    tmp_path: Path, linear_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and as one of several reasons."""
    monkeypatch.setattr(device.extras, "installed", lambda _module: False)
    with pytest.raises(MissingExtraError, match="'onnxruntime'") as caught:
        equipoise.load(make_bundle(tmp_path / "one", linear_onnx))
    assert 'pip install "equipoise[ort]"' in caught.value.hint
    two = {"a": {}, "b": {"runtime": "tensorrt"}}
    with pytest.raises(IncompatibleError) as both:
        equipoise.load(make_bundle(tmp_path / "two", linear_onnx, engines=two))
    assert "tensorrt-cu13" in both.value.hint
    assert "equipoise[ort]" in both.value.hint


def test_a_compiled_engine_that_changed_never_reaches_its_runtime(
    tmp_path: Path, linear_onnx: Path, here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan is code, even where everything else would let it run."""
    engines = {"trt": {"runtime": "tensorrt", "needs": Needs(compute_capabilities=("8.7",))}}
    bundle = make_bundle(tmp_path / "bundle", linear_onnx, engines=engines)
    here(compute_capability=lambda: "8.7", check_runtime=lambda _name: None)
    monkeypatch.setattr(opening, "session_opener", lambda _name: _never)
    file = bundle / "engines/trt/engine.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="is not what its hash says"):
        equipoise.load(bundle)


# Batches, tasks of asyncio, counts.


def test_a_batch_gives_what_single_runs_give(bundle: Path) -> None:
    """In the order of the samples, whatever their own numbers of rows, in few runs."""
    random = np.random.default_rng(7)
    feeds = [{"x": random.normal(size=(n, 4)).astype(np.float32)} for n in (1, 3, 1, 2, 9, 1, 1)]
    with equipoise.load(bundle) as session:
        single = [session.run(sample) for sample in feeds]
        before = session.stats().requests
        for most, runs in ((64, 1), (4, 4), (1, 7)):
            together = session.run_batch(feeds, most=most)
            for one, other in zip(single, together, strict=True):
                np.testing.assert_allclose(one["y"], other["y"], rtol=1e-5, atol=1e-6)
            assert session.stats().requests - before == runs
            before = session.stats().requests
        assert session.run_batch([]) == []
        with pytest.raises(UsageError, match="most is 0"):
            session.run_batch(feeds, most=0)
        with pytest.raises(InputError, match="float64"):
            session.run_batch([*feeds, {"x": np.ones((1, 4))}])
        assert session.stats().requests == before, "nothing runs where a sample does not fit"


def test_samples_of_other_shapes_are_run_apart(tmp_path: Path) -> None:
    """And still come back in their order."""
    import onnx

    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        add (float[batch, length] x, float[batch, length] z) => (float[batch, length] y) {
            y = Add(x, z)
        }
        """
    )
    onnx.save(model, tmp_path / "m.onnx")
    specs = [TensorSpec(name=n, dtype="float32", shape=("batch", "length")) for n in "xzy"]
    engine = engine_of(tmp_path / "m.onnx", batching=True)
    manifest = Manifest(name="m", engines=(engine,), inputs=tuple(specs[:2]), outputs=(specs[2],))
    write_bundle(tmp_path / "b", manifest, copies={FILE: tmp_path / "m.onnx"}, documents={})
    random = np.random.default_rng(8)
    shapes = [(1, 5), (1, 7), (2, 5), (1, 7), (1, 1)]
    feeds = [{n: random.normal(size=s).astype(np.float32) for n in "xz"} for s in shapes]
    with equipoise.load(tmp_path / "b") as session:
        found = session.run_batch(feeds)
        assert session.stats().requests == 3
    for sample, outputs in zip(feeds, found, strict=True):
        np.testing.assert_array_equal(outputs["y"], sample["x"] + sample["z"])
        assert not isinstance(outputs["y"].base, np.ndarray), (
            "an answer does not keep the others in memory"
        )


def test_an_engine_whose_batches_were_not_shown_to_be_equal_runs_singly(
    tmp_path: Path, linear_onnx: Path
) -> None:
    """As one that takes its ranges from what it is given."""
    with equipoise.load(make_bundle(tmp_path / "b", linear_onnx)) as session:
        session.run_batch([ONE] * 5)
        assert session.stats().requests == 5


def test_many_are_awaited_at_once(bundle: Path) -> None:
    """Each gets its own answer; an error reaches whoever awaits it."""
    random = np.random.default_rng(9)
    feeds = [{"x": random.normal(size=(1, 4)).astype(np.float32)} for _ in range(40)]

    async def all_of(session: BundleSession) -> Sequence[Any]:
        wrong = session.run_async({"x": np.ones((1, 4))})
        return await asyncio.gather(
            *(session.run_async(f) for f in feeds), wrong, return_exceptions=True
        )

    with equipoise.load(bundle) as session:
        *found, error = asyncio.run(all_of(session))
        expected = [session.run(f)["y"] for f in feeds]
    assert isinstance(error, InputError)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one["y"], other)


def test_counts_are_exact_under_threads() -> None:
    """And looking at them does not change them."""
    recorder = Recorder()
    look = lambda: recorder.stats(engine="e", serial=1, reloads=0)  # noqa: E731

    def work(_: int) -> None:
        for index in range(5000):
            recorder.took(1_000_000)
            if index % 1000 == 0:
                look()
                recorder.number()
                recorder.failed()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    found = look()
    assert (found.requests, found.errors) == (40_000, 40)
    assert (found.p50_ms, found.p95_ms, found.p99_ms) == (1.0, 1.0, 1.0)
    assert look().requests == 40_000


def test_percentiles_are_of_the_latest_runs() -> None:
    """A window that is full forgets the oldest."""
    recorder = Recorder()
    empty = recorder.stats(engine="e", serial=1, reloads=0)
    assert (empty.requests, empty.p50_ms, empty.p99_ms) == (0, 0.0, 0.0)
    for taken in (*[9_000_000] * WINDOW, *range(10_000, 10_000 + WINDOW * 1000, 1000)):
        for _ in range(1 + UNTIMED):
            recorder.took(taken)
    found = recorder.stats(engine="e", serial=1, reloads=0)
    expected = 0.01 + np.array([0.5, 0.95, 0.99]) * (WINDOW - 1) / 1000
    np.testing.assert_allclose([found.p50_ms, found.p95_ms, found.p99_ms], expected, rtol=1e-6)


def test_stats_say_what_runs(tmp_path: Path, linear_onnx: Path) -> None:
    """The engine, the serial, how long."""
    with equipoise.load(make_bundle(tmp_path / "b", linear_onnx, serial=7)) as session:
        session.run(ONE)
        found = session.stats()
    assert (found.requests, found.engine, found.serial, found.reloads) == (1, "float", 7, 0)
    assert 0 < found.p50_ms <= found.p95_ms <= found.p99_ms < 1000
    assert 0 < found.uptime_s < 60


# Trust.


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Private and public key files of two signers."""
    folder = tmp_path_factory.mktemp("keys")
    found = {}
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        pem = serialization.Encoding.PEM
        private = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        spki = serialization.PublicFormat.SubjectPublicKeyInfo
        paths = folder / f"{name}.key", folder / f"{name}.pem"
        for path, data in zip(
            paths, (private, key.public_key().public_bytes(pem, spki)), strict=True
        ):
            path.write_bytes(data)
        found[name] = paths
    return found


def test_only_bundles_of_trusted_keys_are_loaded(
    bundle: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    """Unsigned and signed by another are both refused; keys are paths or bytes."""
    private, public = keys["ours"]
    with pytest.raises(SignatureError, match="not signed"):
        equipoise.load(bundle, trust=[public])
    sign_bundle(bundle, SignConfig(key=keys["theirs"][0]))
    with pytest.raises(SignatureError) as caught:
        equipoise.load(bundle, trust=[public])
    assert caught.value.exit_code == 4
    sign_bundle(bundle, SignConfig(key=private))
    for trust in ([public], (str(public),), public, [public.read_bytes()], public.read_bytes()):
        with equipoise.load(bundle, trust=trust) as session:
            assert session.selftest().passed
    with equipoise.load(bundle) as session:
        assert session.selftest().passed


@pytest.mark.parametrize("name", [FILE, "golden.npz", "manifest.json", "model.sig"])
def test_a_change_after_signing_is_refused(
    tmp_path: Path, linear_onnx: Path, keys: dict[str, tuple[Path, Path]], name: str
) -> None:
    """Of any file, the manifest with hashes that were made to fit included."""
    bundle = make_bundle(tmp_path / "bundle", linear_onnx)
    private, public = keys["ours"]
    sign_bundle(bundle, SignConfig(key=private))
    kept = (bundle / "model.sig").read_bytes()
    if name == "manifest.json":
        make_bundle(bundle, linear_onnx, name="other")
        (bundle / "model.sig").write_bytes(kept)
    else:
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        equipoise.load(bundle, trust=[public])
    assert caught.value.exit_code == 4


def test_trust_needs_keys_that_can_be_read(bundle: Path, tmp_path: Path) -> None:
    """And hashes that are compared."""
    with pytest.raises(InputError, match="cannot read the public key"):
        equipoise.load(bundle, trust=[tmp_path / "missing.pem"])
    with pytest.raises(UsageError, match="trust without check"):
        equipoise.load(bundle, trust=[b"key"], check=False)
    with pytest.raises(EquipoiseError):
        equipoise.load(bundle, trust=[b"no key"])


def test_a_verifier_that_says_no_stops_every_path(
    tmp_path: Path,
    linear_onnx: Path,
    keys: dict[str, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing goes around it: each way in ends with exit code 4 where it refuses."""
    private, public = keys["ours"]
    bundles = [make_bundle(tmp_path / form, linear_onnx) for form in FORMS]
    for bundle in bundles:
        sign_bundle(bundle, SignConfig(key=private))
    sessions = [equipoise.load(bundle, trust=[public]) for bundle in bundles]

    def no(*_: Any, **__: Any) -> str:
        raise SignatureError("no", kind="invalid")

    monkeypatch.setattr(signature, "verify_signature", no)
    monkeypatch.setattr("equipoise.signing.verify_signature", no)
    for bundle, session in zip(bundles, sessions, strict=True):
        for attempt in (
            lambda b=bundle: equipoise.load(b, trust=[public]),
            lambda b=bundle: equipoise.load(b, trust=[public], engine="float"),
            lambda b=bundle, s=session: s.reload(b),
        ):
            with pytest.raises(IntegrityError) as caught:
                attempt()
            assert caught.value.exit_code == 4
        for command in (
            ["run", str(bundle), "--selftest", "--trust", str(public)],
            ["run", str(bundle), "--selftest", "--engine", "float", "--trust", str(public)],
            ["verify", str(bundle), "--trust", str(public)],
        ):
            monkeypatch.setattr(sys, "argv", ["equipoise", *command])
            with pytest.raises(SystemExit) as stopped:
                main()
            assert stopped.value.code == 4, command
        assert session.selftest().passed, "what ran before goes on"
        session.close()
    assert "no" in capsys.readouterr().err


# Serials.


def test_an_older_bundle_is_refused(bundle: Path, tmp_path: Path, linear_onnx: Path) -> None:
    """Once a newer one of its name has run here; the file is the device's."""
    seen = tmp_path / "state" / "serials.json"
    old = tmp_path / f"old{bundle.suffix}"
    make_bundle(old, linear_onnx, serial=1)
    make_bundle(bundle, linear_onnx, serial=2)
    for path in (old, bundle, bundle):
        equipoise.load(path, serials=seen).close()
    assert json.loads(seen.read_text()) == {"highest": {"linear": 2}}
    with pytest.raises(SignatureError, match="serial 1; one with serial 2") as caught:
        equipoise.load(old, serials=str(seen))
    assert caught.value.kind == "rollback"
    other = make_bundle(tmp_path / "other", linear_onnx, serial=0, name="other")
    equipoise.load(other, serials=seen).close()
    assert json.loads(seen.read_text()) == {"highest": {"linear": 2, "other": 0}}
    equipoise.load(old).close()


@pytest.mark.parametrize("content", [b"", b"{}x", b"\xff", b'{"highest": {"linear": "2"}}', b"[]"])
def test_a_record_of_serials_that_cannot_be_read_accepts_nothing(
    bundle: Path, tmp_path: Path, content: bytes
) -> None:
    """What it held is lost."""
    seen = tmp_path / "serials.json"
    seen.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"serials\.json"):
        equipoise.load(bundle, serials=seen)
    assert seen.read_bytes() == content


def test_a_record_of_serials_that_cannot_be_written_accepts_nothing(
    bundle: Path, tmp_path: Path
) -> None:
    """The next start would know nothing of it."""
    (tmp_path / "file").write_text("")
    with pytest.raises((OutputError, IntegrityError)):
        equipoise.load(bundle, serials=tmp_path / "file" / "serials.json")


# Hot swap.


def test_a_hundred_swaps_under_eight_threads(tmp_path: Path, constants: tuple[Path, Path]) -> None:
    """L4: every answer is wholly of one version, no request fails, and no engine stays behind."""
    versions = [
        make_bundle(tmp_path / f"v{n}.zip", model, name="swapped")
        for n, model in enumerate(constants)
    ]
    session, stop = equipoise.load(versions[0]), threading.Event()
    held = weakref.WeakSet([session._running])
    counts = {1.0: 0, 2.0: 0}
    lock = threading.Lock()

    def ask() -> int:
        failed = 0
        while not stop.wait(0.0005):
            answer = session.run(ONE)["y"]
            values = set(answer.ravel().tolist())
            if len(values) != 1 or not values <= counts.keys():
                failed += 1
            with lock:
                counts[values.pop()] += 1
        return failed

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        for number in range(100):
            session.reload(versions[(number + 1) % 2])
            held.add(session._running)
        stop.set()
        assert sum(each.result() for each in asking) == 0
    stats = session.stats()
    assert (stats.reloads, stats.errors, stats.requests) == (100, 0, sum(counts.values()))
    assert min(counts.values()) > 0
    gc.collect()
    assert list(held) == [session._running]
    session.close()
    gc.collect()
    assert not held


def test_an_old_engine_is_closed_after_its_last_run(
    tmp_path: Path, constants: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that has begun ends with the engine that it began with."""
    first, second = (
        make_bundle(tmp_path / f"v{n}", model, name="swapped") for n, model in enumerate(constants)
    )
    session = equipoise.load(first)
    running = session._running
    assert running is not None
    inside, go, closed = threading.Event(), threading.Event(), threading.Event()
    real, close = running.run, running.session.close

    def slow(feeds: Any, *, out: Any = None) -> Any:
        inside.set()
        assert go.wait(10)
        assert not closed.is_set()
        return real(feeds, out=out)

    running.run = slow
    monkeypatch.setattr(
        type(running.session), "close",
        lambda self, own=running.session: (self is own and closed.set(), close()),
    )  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(session.run, ONE)
        assert inside.wait(10)
        session.reload(second)
        assert (session.run(ONE)["y"] == 2).all()
        assert not closed.is_set()
        go.set()
        assert (answer.result()["y"] == 1).all()


def test_a_bundle_that_cannot_replace_keeps_the_old_one(
    tmp_path: Path, constants: tuple[Path, Path], linear_onnx: Path
) -> None:
    """Twenty times, whatever is wrong with it: the old one goes on, and the error says why."""
    first = make_bundle(tmp_path / "v1", constants[0], serial=5)
    changed = make_bundle(tmp_path / "changed", constants[1], serial=6)
    with (changed / FILE).open("r+b") as file:
        file.write(b"\x00")
    cases: list[tuple[Path, type[EquipoiseError], str]] = [
        (changed, IntegrityError, "not what its hash says"),
        (make_bundle(tmp_path / "old", constants[1], serial=4), SignatureError, "serial 4"),
        (make_bundle(tmp_path / "wrong", constants[1], shift=1, serial=6), ParityError, "FAILED"),
        (make_bundle(tmp_path / "other", linear_onnx, serial=6), IncompatibleError, "other inputs"),
        (tmp_path / "missing", IntegrityError, "no such bundle"),
    ]
    with equipoise.load(first) as session:
        for _ in range(4):
            for path, kind, words in cases:
                with pytest.raises(kind, match=words):
                    session.reload(path)
                assert (session.run(ONE)["y"] == 1).all()
        stats = session.stats()
        assert (stats.serial, stats.reloads, stats.requests) == (5, 0, 20)
        session.reload(make_bundle(tmp_path / "good", constants[1], serial=5))
        assert (session.run(ONE)["y"] == 2).all()


def test_a_reload_keeps_what_was_asked_for_at_first(
    tmp_path: Path, constants: tuple[Path, Path], keys: dict[str, tuple[Path, Path]]
) -> None:
    """Trusted keys, serials and the name of the engine."""
    private, public = keys["ours"]
    seen = tmp_path / "serials.json"
    engines: dict[str, dict[str, Any]] = {"a": {}, "b": {}}
    first = make_bundle(tmp_path / "v1", constants[0], engines=engines)
    unsigned = make_bundle(tmp_path / "v2", constants[1], engines=engines, serial=8)
    sign_bundle(first, SignConfig(key=private))
    with equipoise.load(first, engine="b", trust=[public], serials=seen) as session:
        with pytest.raises(SignatureError, match="not signed"):
            session.reload(unsigned)
        sign_bundle(unsigned, SignConfig(key=private))
        session.reload(unsigned)
        assert session.engine.name == "b"
    assert json.loads(seen.read_text()) == {"highest": {"linear": 9}}


def test_a_session_that_threads_may_not_share_is_run_by_one_at_a_time(
    tmp_path: Path, linear_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its runtime, the bundle's session is thread safe."""
    from equipoise.runtimes.onnxruntime.session import OnnxRuntimeSession

    inside, most = 0, 0
    real = OnnxRuntimeSession.run

    def counted(self: Any, feeds: Any, **kwargs: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        os.sched_yield()
        found = real(self, feeds, **kwargs)
        inside -= 1
        return found

    monkeypatch.setattr(OnnxRuntimeSession, "concurrent", False)
    monkeypatch.setattr(OnnxRuntimeSession, "run", counted)
    with (
        equipoise.load(make_bundle(tmp_path / "b", linear_onnx)) as session,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(lambda _: session.run(ONE), range(400)))
        running = weakref.ref(session._running)
    assert most == 1
    assert running() is None, "a lock makes no circle that would keep the engine open"


FIRST_LOADS = """
import sys, threading
import numpy as np
import equipoise

paths, answers, errors = sys.argv[1:], [], []
barrier = threading.Barrier(8)

def first(number):
    try:
        barrier.wait()
        with equipoise.load(paths[number % len(paths)]) as session:
            x = np.full((1, 4), number, np.float32)
            answers.append((number, session.run({"x": x})["y"].tolist()))
            assert session.selftest().passed
    except BaseException as error:
        errors.append(repr(error))

threads = [threading.Thread(target=first, args=(n,)) for n in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
import json
print(json.dumps({"answers": sorted(answers), "errors": errors}))
"""


def test_eight_threads_load_first_at_once(tmp_path: Path, linear_onnx: Path) -> None:
    """L6: in a new process, where nothing is imported yet."""
    paths = [make_bundle(tmp_path / form, linear_onnx) for form in FORMS]
    child = subprocess.run(
        [sys.executable, "-c", FIRST_LOADS, *map(str, paths)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["errors"] == []
    with equipoise.load(paths[0]) as session:
        for number, answer in found["answers"]:
            expected = session.run({"x": np.full((1, 4), number, np.float32)})["y"]
            np.testing.assert_allclose(answer, expected, rtol=1e-5)
    assert [number for number, _ in found["answers"]] == list(range(8))
