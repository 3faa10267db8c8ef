"""``equipoise build``, ``compare``, ``prewarm`` and ``fit`` from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

TARGETS = {
    "cpu": True,
    "x86-avx2": True,
    "x86-vnni": True,
    "arm64": True,
    "raspberry-pi-4": True,
    "raspberry-pi-5": True,
    "openvino": True,
    "rtx-ampere": False,
    "rtx-ada": False,
    "rtx-blackwell": False,
}
"""Target -> whether its engine can be loaded on a machine without a GPU."""


@pytest.fixture(scope="module")
def built(workbench, equipoise, tmp_path_factory: pytest.TempPathFactory):
    """``target -> (process, directory)``, built once."""
    folder, made = tmp_path_factory.mktemp("built"), {}

    def build(target: str):
        if target not in made:
            output = folder / target
            done = equipoise(
                "build", workbench.model, "--target", target, "-o", output, "--json",
                "--cache-dir", folder / "cache",
            )  # fmt: skip
            made[target] = done, output
        return made[target]

    return build


@pytest.mark.parametrize("target", TARGETS)
def test_ten_targets_from_one_model(built, target: str) -> None:
    """What each artefact is, and whether it was loaded here or only built."""
    done, output = built(target)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    engine = found["manifest"]["engine"]
    assert engine["loaded"] == TARGETS[target]
    assert found["manifest"]["target"] == target
    assert found["artefact"]
    assert (output / engine["file"]).stat().st_size > 500
    assert (target == "cpu") <= found["here"]
    if target.startswith("rtx"):
        assert len(engine["compute_capabilities"]) == 1


def test_engines_are_compared_benched_and_warmed(built, workbench, equipoise, tmp_path) -> None:
    """By the directories that build wrote; outputs, latencies and sizes."""
    np.savez(tmp_path / "in.npz", x=np.load(workbench.data)["x"][:4])
    ours, other = built("cpu")[1], built("openvino")[1]
    options = ["--inputs", tmp_path / "in.npz", "--rounds", "12"]
    done = equipoise("compare", ours, other, *options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [output["name"] for output in found["outputs"]] == ["logits"]
    assert found["outputs"][0]["max_abs"] < 1e-3
    assert found["latencies"][1]["speedup"]["value"] > 0
    assert "differs by at most" in equipoise("compare", ours, other, *options).stdout
    done = equipoise("bench", workbench.model, ours, other, *options, "--json")
    assert len(json.loads(done.stdout)) == 3
    warm = json.loads(equipoise("prewarm", ours, "--json").stdout)
    assert warm["later_ms"] <= warm["first_ms"] + warm["open_ms"]


def test_profiles_come_from_the_sizes_of_real_inputs(equipoise, tmp_path: Path) -> None:
    """One engine with a profile for each bucket; what is said of a dimension goes first."""
    rng = np.random.default_rng(0)
    helper, info = onnx.helper, onnx.helper.make_tensor_value_info
    weight = rng.normal(size=(8, 8)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [info("x", onnx.TensorProto.FLOAT, ["batch", "sequence", 8])],
        [info("y", onnx.TensorProto.FLOAT, ["batch", "sequence", 8])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    model = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), model)
    (tmp_path / "lengths.py").write_text(
        "import numpy as np\n"
        "def rows():\n"
        "    return [{'x': np.ones((1, n, 8), np.float32)} for n in range(1, 91)]\n"
    )
    done = equipoise(
        "build", model, "-o", tmp_path / "engine", "--target", "rtx-ada", "--data",
        "python:lengths:rows", "--profile", "batch=1:4:16", "--quiet", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    profiles = json.loads((tmp_path / "engine" / "plan.json").read_text())["profiles"]
    assert [profile["sequence"]["largest"] for profile in profiles] == [30, 60, 90]
    assert {profile["batch"]["largest"] for profile in profiles} == {16}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target", "jetson-orin-nano"], (5, "cannot build for 'jetson-orin-nano'")),
        (["--target", "rk3588"], (5, "no builder for the runtime 'rknn'")),
        (["--target", "rtx-amper"], (2, "Did you mean 'rtx-ampere'")),
        (["--target", "none.toml"], (3, "no such file: none.toml")),
        (["--profile", "batch=0"], (2, "expected NAME=LEAST:USUAL:LARGEST")),
        (["--profile", "batch=4:2:8"], (2, "expected NAME=LEAST:USUAL:LARGEST")),
        (["--hint", "speed"], (2, "latency or throughput")),
        (["--target", "rtx-ada", "--compute-capability", "8.7"], (5, "8.7")),
    ],
)
def test_what_cannot_be_built_is_said(workbench, equipoise, tmp_path, arguments, expected):
    """A missing library, a target without a builder, a wrong name, size or GPU."""
    code, words = expected
    done = equipoise("build", workbench.model, "-o", tmp_path / "engine", "--quiet", *arguments)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "engine").exists()


def test_wrong_files_and_places_are_refused(workbench, equipoise, tmp_path: Path) -> None:
    """A file that is no model; an output that holds something else."""
    done = equipoise("build", workbench.data, "-o", tmp_path / "engine")
    assert done.returncode == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    done = equipoise("build", workbench.model, "-o", tmp_path / "mine")
    assert done.returncode == 7
    assert "is no engine; it is not replaced" in done.stderr
    done = equipoise("prewarm", tmp_path / "nothing")
    assert done.returncode == 3


def test_a_session_without_a_gpu_says_what_to_do(built, equipoise) -> None:
    """Exit 5: copy it to the device."""
    done = equipoise("prewarm", built("rtx-ampere")[1])
    assert done.returncode == 5, done.stderr
    assert "GPU" in done.stderr


def test_fit_estimates_and_says_what_it_rests_on(workbench, equipoise) -> None:
    """This machine by measured peaks; a device by stated ones; one without figures not at all."""
    here = json.loads(equipoise("fit", workbench.model, "--json").stdout)
    assert here["fits"]
    assert here["operators_checked"].startswith("onnxruntime 1.")
    assert "measured here" in here["estimate"]["peak"]["source"]
    shown = equipoise("fit", workbench.model, "--target", "jetson-orin-nano").stdout
    assert "ms estimated" in shown
    assert "102 GB/s (brojo" in shown
    assert "not checked" in shown
    shown = equipoise("fit", workbench.model, "--target", "web-wasm").stdout
    assert "not estimated: no figures" in shown


def _saved(workbench, path: Path, **changes: int) -> Path:
    model = onnx.load(workbench.model)
    model.ir_version = changes.get("ir_version", model.ir_version)
    model.opset_import[0].version = changes.get("opset", model.opset_import[0].version)
    onnx.save(model, path)
    return path


def test_fit_finds_what_will_not_work(workbench, equipoise, tmp_path: Path) -> None:
    """Dynamic shapes, IR version, opset, types and integers of another target; exit 5."""
    done = equipoise("fit", workbench.model, "--target", "qnn-htp-v75")
    assert done.returncode == 5
    assert "dynamic dimensions (batch)" in done.stdout
    assert "--static batch=SIZE" in done.stdout
    assert "are in float32, which qnn-htp-v75 computes in float16" in done.stdout
    late = _saved(workbench, tmp_path / "late.onnx", ir_version=12)
    done = equipoise("fit", late, "--target", "t4")
    assert (done.returncode, "IR version 12; t4 reads up to 10" in done.stdout) == (5, True)
    done = equipoise("fit", workbench.model, "--target", "t4")
    assert (done.returncode, "of opset 20; t4 is known" in done.stdout) == (0, True)
    other = tmp_path / "cpu.onnx"
    done = equipoise(
        "quantize", workbench.model, "--data", workbench.data, "-o", other, "--quiet", "--min-sqnr",
        "5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = equipoise("fit", other, "--target", "rtx-ampere")
    assert done.returncode == 5
    assert "the Q/DQ pairs are for another target" in done.stdout
    assert equipoise("fit", other, "--target", "cpu").returncode == 0
