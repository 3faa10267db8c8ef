"""Every command on a real model, from the shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import equipoise as library
from equipoise.bundle.reading import open_bundle
from equipoise.jobs import JobConfig, make_pipeline
from equipoise.pack import pack
from equipoise.report.write import read_result


def test_tune_writes_a_verified_bundle_a_report_and_results(tuned: Path) -> None:
    """The three outputs are there and fit each other, and nothing else is."""
    assert sorted(p.name for p in tuned.iterdir()) == ["bundle", "report.html", "results.json"]
    result = read_result(tuned / "results.json")
    with open_bundle(tuned / "bundle") as bundle:
        bundle.verify()
        assert set(bundle.manifest.files) == {
            f"engines/{result.chosen}/engine.onnx",
            "README.md",
            "golden.npz",
            "parity.json",
            "recipe.json",
            "sbom.cdx.json",
        }
        recipes = json.loads(bundle.read("recipe.json"))
    assert list(recipes) == [result.chosen]
    assert recipes[result.chosen]["name"] == result.chosen


def test_tune_measures_all_kinds_of_candidates(tuned: Path) -> None:
    """Float, weight-only, dynamic and static schemes are measured; fusions do not apply."""
    result = read_result(tuned / "results.json")
    measured = {c.recipe.name for c in result.candidates if c.measurement}
    assert measured >= {"float32", "int8-weights", "int8-dynamic", "int8-static"}
    fused = next(c for c in result.candidates if c.recipe.name == "float32-fused")
    assert fused.verdict == "not applicable"
    assert "fuse" in fused.reason


def test_chosen_engine_is_never_slower_than_float_or_refused(tuned: Path) -> None:
    """The sweet spot was accepted, and its speed interval reaches 1."""
    result = read_result(tuned / "results.json")
    chosen = next(c for c in result.candidates if c.recipe.name == result.chosen)
    assert chosen.verdict in {"accepted", "baseline"}
    assert chosen.measurement is not None
    if chosen.verdict == "accepted":
        assert chosen.measurement.speedup.high >= 1
        assert chosen.measurement.drop.high <= result.goal.max_drop


def test_report_names_every_candidate_and_loads_nothing_from_elsewhere(tuned: Path) -> None:
    """The page is complete and self-contained."""
    page = (tuned / "report.html").read_text(encoding="utf-8")
    for candidate in read_result(tuned / "results.json").candidates:
        assert candidate.recipe.name in page
    assert "<script src=" not in page
    assert "<link" not in page


def test_loaded_bundle_runs_and_passes_its_selftest(tuned: Path) -> None:
    """The library gives the golden outputs again."""
    with library.load(tuned / "bundle") as session:
        assert [spec.name for spec in session.inputs] == ["x"]
        found = session.selftest()
        assert found.passed
        assert found.samples == 4
        batch = np.zeros((3, 16), dtype=np.float32)
        assert session.run({"x": batch})["logits"].shape == (3, 4)


def test_second_run_takes_everything_from_the_cache(workbench, tuned: Path, equipoise) -> None:
    """The same command again changes no figure and makes nothing anew."""
    before = (tuned / "results.json").read_bytes()
    begin = time.monotonic()
    done = equipoise(
        "tune", workbench.model, "--data", workbench.data, "--metric", "accuracy",
        "--max-drop", "0.02", "--threads", "1", "--rounds", "12", "--trials", "7", "-o", tuned,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tuned / "results.json").read_bytes() == before
    assert time.monotonic() - begin < 20


def test_killed_run_leaves_no_output_and_goes_on_where_it_was(workbench, tmp_path: Path) -> None:
    """After SIGKILL in the middle, finished stages are kept and the same command completes."""
    cache, output = tmp_path / "cache", tmp_path / "out"
    command = [
        sys.executable, "-m", "equipoise", "tune", str(workbench.model), "--data",
        str(workbench.data), "--max-drop", "0.02", "--threads", "1", "--rounds", "12", "-q",
        "--trials", "3", "-o", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "EQUIPOISE_CACHE_DIR": str(cache)}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while len(list(cache.glob("build/*/record.json"))) < 2:
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(output.iterdir()) == []
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*/*/record.json")}
    assert kept
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (output / "bundle/manifest.json").is_file()


def test_interrupt_exits_with_130_and_says_how_to_go_on(workbench, tmp_path: Path) -> None:
    """Ctrl-C ends the run with a sentence, not a traceback, and writes no output."""
    command = [
        sys.executable, "-m", "equipoise", "tune", str(workbench.model), "--data",
        str(workbench.data), "-q", "-o", str(tmp_path / "out"), "--cache-dir",
        str(tmp_path / "cache"),
    ]  # fmt: skip
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background hands down an ignored SIGINT, which Python respects.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    while not list((tmp_path / "cache").glob("*/*/record.json")):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "goes on where it was" in stderr
    assert "Traceback" not in stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_check_passes_on_the_bundle_and_on_its_source(workbench, tuned: Path, equipoise) -> None:
    """Parity holds with the reference in the bundle, with the source itself, and on its data."""
    for options in ([], ["--against", workbench.model], [
        "--against", workbench.model, "--data", workbench.data
    ]):  # fmt: skip
        done = equipoise("check", tuned / "bundle", *options)
        assert done.returncode == 0, done.stderr
        assert "PASSED" in done.stdout


def test_a_float_fallback_ships_beside_the_chosen_engine(workbench, tuned, tmp_path) -> None:
    """Last, so that a device that fits nothing else still has an engine."""
    config = JobConfig(
        source=str(workbench.model), data=str(workbench.data), metric="accuracy",
        threads=1, rounds=12,
    )  # fmt: skip
    result = replace(read_result(tuned / "results.json"), chosen="int8-static")
    pack(make_pipeline(config), result, output=tmp_path / "bundle", fallback=True)
    with open_bundle(tmp_path / "bundle") as bundle:
        bundle.verify()
        engines = bundle.manifest.engines
    assert [(e.name, e.precision, e.fallback) for e in engines] == [
        ("int8-static", "int8", False), ("float32", "float32", True)
    ]  # fmt: skip


def test_check_fails_with_exit_6_against_another_model(tmp_path: Path, tuned, equipoise) -> None:
    """A source with other weights is not what the bundle was made from."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(tuned.parent / "model.onnx")
    weight = numpy_helper.to_array(model.graph.initializer[1]) * -1
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "head"))
    onnx.save(model, tmp_path / "other.onnx")
    done = equipoise("check", tuned / "bundle", "--against", tmp_path / "other.onnx")
    assert done.returncode == 6
    assert "largest difference of logits" in done.stderr


def test_changed_engine_is_refused_with_exit_4(tuned: Path, tmp_path: Path, equipoise) -> None:
    """One flipped byte in the engine stops every command that would run it."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tuned / "bundle", bundle)
    (file,) = bundle.rglob("engine.onnx")
    engine = bytearray(file.read_bytes())
    engine[-20] ^= 1
    file.write_bytes(engine)
    for arguments in (
        ["check", bundle], ["run", bundle, "--selftest"], ["bench", bundle], ["inspect", bundle],
    ):  # fmt: skip
        done = equipoise(*arguments)
        assert done.returncode == 4
        assert "engine.onnx" in done.stderr


def test_export_of_an_onnx_source_proves_and_writes_it(workbench, tmp_path: Path, equipoise):
    """export gives a file that check accepts with the tolerance of floats."""
    output = tmp_path / "model.onnx"
    done = equipoise("export", workbench.model, "--data", workbench.data, "-o", output)
    assert done.returncode == 0, done.stderr
    assert "parity" in done.stdout
    against = ["--against", workbench.model, "--data", workbench.data]
    done = equipoise("check", output, *against, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sides"][-1]["outputs"][0]["max_abs"] <= 1e-5


def test_quantize_writes_a_smaller_file(workbench, tmp_path: Path, equipoise):
    """Weights in 8 bits alone; check tells it from its source when asked for more."""
    output = tmp_path / "int8.onnx"
    arguments = ["quantize", workbench.model, "--data", workbench.data, "-o", output]
    done = equipoise(*arguments, "--scheme", "weights")
    assert done.returncode == 0, done.stderr
    assert output.stat().st_size < workbench.model.stat().st_size * 0.6
    against = ["--against", workbench.model, "--data", workbench.data, "--no-blame"]
    assert equipoise("check", output, *against, "--atol", "1e-4").returncode == 6
    assert equipoise("check", output, *against, "--atol", "0.2").returncode == 0


def test_bench_compares_two_engines(workbench, tuned: Path, equipoise) -> None:
    """bench prints a median and a ratio for each thread count."""
    done = equipoise(
        "bench", workbench.model, tuned / "bundle", "--rounds", "12", "--threads", "1,2", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert [r["threads"] for r in records] == [1, 1, 2, 2]
    assert all(r["latency_ms"]["value"] > 0 for r in records)
    assert records[1]["speedup"]["low"] <= records[1]["speedup"]["high"]


def test_run_takes_arrays_and_writes_arrays(workbench, tuned: Path, tmp_path: Path, equipoise):
    """run gives what the library gives."""
    x = np.load(workbench.data)["x"][:2]
    np.savez(tmp_path / "in.npz", x=x)
    done = equipoise("run", tuned / "bundle", tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    with library.load(tuned / "bundle") as session:
        expected = session.run({"x": x})["logits"]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["logits"], expected)


def test_inspect_counts_the_multiply_accumulates(workbench, tuned: Path, equipoise) -> None:
    """16x64 + 64x4 products, and as many parameters."""
    done = equipoise("inspect", workbench.model, "--json")
    found = json.loads(done.stdout)
    assert found["multiply_accumulates"] == 16 * 64 + 64 * 4
    assert found["parameters"] == 16 * 64 + 64 * 4
    assert found["weight_bytes"] == 4 * (16 * 64 + 64 * 4)
    done = equipoise("inspect", workbench.model, "--dim", "batch=8", "--json")
    assert json.loads(done.stdout)["multiply_accumulates"] == 8 * (16 * 64 + 64 * 4)
    shown = equipoise("inspect", tuned / "bundle").stdout
    for word in ("operators", "not signed", "runs here", "golden.npz", "model not stated"):
        assert word in shown
    done = equipoise("inspect", tuned / "bundle", "--json")
    viewed = json.loads(done.stdout)
    assert viewed["cost"]["multiply_accumulates"] == found["multiply_accumulates"]
    assert viewed["manifest"]["format"] == 2


def test_doctor_and_targets_describe_this_machine(equipoise) -> None:
    """doctor lists packages and runtimes; targets lists this CPU among the others."""
    found = json.loads(equipoise("doctor", "--json").stdout)
    assert found["runtimes"]["onnxruntime"]["available"]
    assert any(p["module"] == "torch" and p["version"] for p in found["packages"])
    assert equipoise("doctor").returncode == 0
    targets = json.loads(equipoise("targets", "--json").stdout)
    assert {"cpu", "tensorrt", "openvino"} <= {t["name"] for t in targets}
    assert "this machine with ONNX Runtime" in equipoise("targets").stdout
    shown = equipoise("targets", "show", "jetson-orin-nano").stdout
    assert re.search(r"bandwidth +102 GB/s \(brojo", shown)
    assert "compute" in shown
    found = json.loads(equipoise("targets", "detect", "--json").stdout)
    assert "cpu" in found["targets"]
    assert found["machine"]["cores"] <= found["cores_present"]


def test_version_is_printed(equipoise) -> None:
    """--version names the package and its version."""
    assert equipoise("--version").stdout.strip() == f"equipoise {library.__version__}"
