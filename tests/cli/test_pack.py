"""``equipoise pack``: engines of several runtimes in one bundle, from the shell and from Python."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import equipoise as library
from equipoise import testing
from equipoise.assembly import parts
from equipoise.bundle.golden import GOLDEN_FILE, parse_golden
from equipoise.bundle.manifest import Licences, Needs
from equipoise.bundle.reading import open_bundle
from equipoise.errors import (
    IncompatibleError,
    InputError,
    IntegrityError,
    OutputError,
    UsageError,
)
from equipoise.packing import PackRequest, pack_engines
from equipoise.runtimes.build import BuildConfig, build
from equipoise.runtimes.protocol import SessionSettings


@pytest.fixture(scope="module")
def engines(workbench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories as ``equipoise build`` writes them."""
    folder = tmp_path_factory.mktemp("engines")
    for runtime in ("onnxruntime", "openvino"):
        (folder / runtime).mkdir()
        settings = SessionSettings(threads=1)
        config = BuildConfig(
            model=workbench.model, runtime=runtime, settings=settings, target="cpu"
        )
        build(config, output=folder / runtime)
    return {name: folder / name for name in ("onnxruntime", "openvino")}


@pytest.fixture
def request_of(workbench, engines: dict[str, Path], tmp_path: Path):
    """A request that can be met."""
    return PackRequest(
        engines=(f"ov={engines['openvino']}", str(engines["onnxruntime"])),
        output=tmp_path / "bundle",
        against=str(workbench.model),
        data=str(workbench.data),
        samples=20,
    )


def test_pack_writes_a_bundle_that_runs(
    workbench, engines: dict[str, Path], tmp_path: Path, equipoise
) -> None:
    """Each engine passes its self-test; what was stated is in it; inspect and run read it."""
    output = tmp_path / "bundle.zip"
    done = equipoise(
        "pack", f"ov={engines['openvino']}", engines["onnxruntime"], "--float-fallback",
        "--against", workbench.model, "--data", workbench.data, "--samples", "40",
        "--name", "classifier", "--serial", "4", "--licence", "Apache-2.0",
        "--data-licence", "CC0-1.0", "--zip", "-o", tmp_path / "bundle",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "logits differs from the source by at most" in done.stdout
    with open_bundle(output) as bundle:
        bundle.verify()
        manifest, card = bundle.manifest, bundle.read("README.md").decode()
        assert set(json.loads(bundle.read("parity.json"))) == {"ov", "onnxruntime", "float32"}
        assert json.loads(bundle.read("sbom.cdx.json"))["bomFormat"] == "CycloneDX"
    assert [e.name for e in manifest.engines] == ["ov", "onnxruntime", "float32"]
    assert [e.fallback for e in manifest.engines] == [False, False, True]
    assert all(e.batching and e.golden_from == "engine" for e in manifest.engines)
    assert (manifest.name, manifest.serial) == ("classifier", 4)
    assert manifest.licences == Licences(model="Apache-2.0", data="CC0-1.0")
    assert manifest.inputs[0].shape[0] == "batch"
    assert "Apache-2.0" in card
    x = np.load(workbench.data)["x"][:3]
    answers = []
    for engine in manifest.engines:
        with library.load(output, engine=engine.name) as session:
            assert session.selftest().passed
            answers.append(session.run({"x": x})["logits"])
    np.testing.assert_allclose(answers[0], answers[2], atol=1e-4)
    np.savez(tmp_path / "in.npz", x=x)
    done = equipoise("run", output, tmp_path / "in.npz", "--engine", "float32", "--json")
    np.testing.assert_allclose(json.loads(done.stdout)["logits"], answers[2], atol=1e-5)
    done = equipoise("run", output, "--selftest")
    assert "self-test passed" in done.stdout
    shown = equipoise("inspect", output).stdout
    assert "ov (float32" in shown
    assert "runs here" in shown


def test_an_engine_that_cannot_run_here_says_so(
    request_of: PackRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its golden outputs are the reference's; no tolerance is made up, and a stated one is kept."""
    here = parts.this_device()
    monkeypatch.setattr(parts, "this_device", lambda: replace(here, check_runtime=_no_openvino))
    result = pack_engines(request_of)
    ov, ort = result.manifest.engines
    assert result.not_run == {"ov": "no openvino here"}
    assert (ov.golden_from, ov.golden_tolerance, ov.batching) == ("reference", {}, False)
    assert (ort.golden_from, set(ort.golden_tolerance)) == ("engine", {"logits"})
    with open_bundle(result.bundle) as bundle:
        vectors = parse_golden(bundle.read(GOLDEN_FILE), where="")
        assert "Not measured" in bundle.read("README.md").decode()
    assert [set(v.outputs) for v in vectors] == [{"onnxruntime"}] * 4
    np.testing.assert_array_equal(
        vectors[0].expected("ov")["logits"], vectors[0].reference["logits"]
    )
    with library.load(request_of.output) as session:
        found = session.selftest()
        assert session.engine.name == "ov"
        assert found.outputs[0].max_abs < 1e-3
        assert not found.passed
    stated = pack_engines(replace(request_of, tolerances={"logits": 0.05}))
    assert stated.manifest.engines[0].golden_tolerance == {"logits": 0.05}
    with library.load(request_of.output) as session:
        assert session.selftest().passed


def _no_openvino(name: str) -> None:
    if name == "openvino":
        raise IncompatibleError("no openvino here")


def test_an_onnx_file_is_packed_with_its_external_data(workbench, tmp_path: Path) -> None:
    """Under a name of its own; a second one of the same name gets a number."""
    import onnx

    model = onnx.load(workbench.model)
    path = tmp_path / "Big Model.onnx"
    onnx.save(
        model, path, save_as_external_data=True, location="Big Model.onnx.data", size_threshold=0
    )
    request = PackRequest(
        engines=(str(path), str(path)),
        output=tmp_path / "bundle.zip",
        against=str(workbench.model),
        data=str(workbench.data),
        samples=10,
    )
    manifest = pack_engines(request).manifest
    assert [e.name for e in manifest.engines] == ["big-model", "big-model-2"]
    assert manifest.engines[0].files == ("engines/big-model/engine.onnx",)
    assert manifest.engines[0].size_bytes > path.with_name("Big Model.onnx.data").stat().st_size
    with library.load(request.output) as session:
        assert session.selftest().passed


@pytest.mark.slow
def test_what_a_compiled_engine_holds_for_is_in_the_manifest(tmp_path: Path) -> None:
    """Of TensorRT-RTX, built for other GPUs than there are here."""
    pytest.importorskip("tensorrt_rtx")
    from equipoise.runtimes.protocol import BuildSettings

    testing.write_model(tmp_path / "model.onnx")
    (tmp_path / "rtx").mkdir()
    config = BuildConfig(
        model=tmp_path / "model.onnx",
        runtime="tensorrt-rtx",
        settings=SessionSettings(),
        options=BuildSettings(compute_capabilities=("8.9",)),
    )
    made = build(config, output=tmp_path / "rtx")
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        x=random.normal(size=(12, 4)).astype(np.float32),
        ids=np.zeros(12, np.int64),
    )
    request = PackRequest(
        engines=(str(tmp_path / "rtx"), str(tmp_path / "model.onnx")),
        output=tmp_path / "bundle",
        against=str(tmp_path / "model.onnx"),
        data=str(tmp_path / "data.npz"),
    )
    result = pack_engines(request)
    needs = result.manifest.engines[0].needs
    assert (needs.runtime_version, needs.compute_capabilities) == (made.version, ("8.9",))
    assert needs.platform.startswith("linux-")
    assert result.manifest.engines[1].needs == Needs()
    if result.not_run:
        with library.load(request.output) as session:
            assert session.engine.name == "model"
        with pytest.raises(IncompatibleError, match=r"compute capability 8\.9"):
            library.load(request.output, engine="rtx")


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"engines": ()}, UsageError, "nothing to pack"),
        ({"against": ""}, UsageError, "--against SOURCE and --data DATA"),
        ({"data": ""}, UsageError, "--against SOURCE and --data DATA"),
        ({"serial": -1}, UsageError, "--serial is -1"),
        ({"tolerances": {"y": -1.0}}, UsageError, "--tolerance y=-1"),
        ({"engines": ("Bad Name=missing",)}, UsageError, "the name of an engine"),
        ({"engines": ("missing.onnx",)}, InputError, "no such engine: missing.onnx"),
        ({"name": "a\nb"}, IntegrityError, "name has to be"),
    ],
)
def test_what_cannot_be_packed_is_named(
    request_of: PackRequest, change: dict[str, object], kind: type[Exception], words: str
) -> None:
    """And nothing is written."""
    with pytest.raises(kind, match=words):
        pack_engines(replace(request_of, **change))  # type: ignore[arg-type]
    assert not request_of.output.exists()


def test_engines_of_other_models_are_not_packed_together(
    request_of: PackRequest, linear_onnx: Path
) -> None:
    """They take other inputs."""
    with pytest.raises(InputError, match="'x'"):
        pack_engines(replace(request_of, engines=(str(linear_onnx),)))


def test_a_changed_engine_is_not_packed(
    request_of: PackRequest, engines: dict[str, Path], tmp_path: Path
) -> None:
    """Its own hash is checked first; and what is no bundle is not replaced."""
    import shutil

    copy = tmp_path / "changed"
    shutil.copytree(engines["onnxruntime"], copy)
    with (copy / "engine.onnx").open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(IntegrityError, match=r"engine\.onnx"):
        pack_engines(replace(request_of, engines=(str(copy),)))
    request_of.output.mkdir()
    (request_of.output / "thesis.txt").write_text("kept")
    with pytest.raises(OutputError, match="is no bundle"):
        pack_engines(request_of)


def test_bad_options_of_pack_are_usage_errors(workbench, tmp_path: Path, equipoise) -> None:
    """From the shell."""
    common = ["pack", workbench.model, "-o", tmp_path / "b"]
    assert equipoise(*common).returncode == 2
    done = equipoise(*common, "--tolerance", "logits")
    assert done.returncode == 2
    assert "OUTPUT=VALUE" in done.stderr
