"""``equipoise check``: sides, limits, reports, and where a fault lies."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def int8(workbench, equipoise) -> Path:
    """The classifier in 8 bits."""
    output = workbench.folder / "int8.onnx"
    arguments = ["quantize", workbench.model, "--data", workbench.data, "-o", output, "-q"]
    done = equipoise(*arguments)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def damaged(workbench) -> Path:
    """The classifier with the weights of its second product turned round."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(workbench.model)
    tensor = model.graph.initializer[1]
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    output = workbench.folder / "damaged.onnx"
    onnx.save(model, output)
    return output


def against(workbench) -> list[Any]:
    return ["--against", workbench.model, "--data", workbench.data, "--quiet"]


def found(done: Any) -> dict[str, Any]:
    return json.loads(done.stdout)


def test_every_side_is_compared_with_the_reference_and_with_the_side_before(
    workbench, int8: Path, equipoise
) -> None:
    """The export, the file as written and as the runtime rewrites it."""
    done = equipoise("check", int8, *against(workbench), "--json", "-")
    assert done.returncode == 0, done.stderr
    record = found(done)
    steps = [(side["side"]["name"], side["side"]["step"]) for side in record["sides"]]
    assert steps == [
        ("float ONNX, as written", "exporter"),
        ("float ONNX, optimised", "runtime kernels"),
        (f"{int8}, as written", "quantiser"),
        (str(int8), "runtime kernels"),
    ]
    by_step = [side["by_step"][0]["sqnr_db"] for side in record["sides"]]
    assert by_step[2] < 60
    assert all(decibels is None or decibels > 60 for decibels in (*by_step[:2], by_step[3]))
    assert record["floors"]["logits"] > 0
    assert record["verdict"].startswith(f"PASSED: {int8} agrees with float ONNX on ")


def test_a_limit_is_a_gate_and_the_verdict_says_where_it_fails(
    workbench, int8: Path, equipoise
) -> None:
    done = equipoise("check", int8, *against(workbench), "--min-sqnr", "80")
    assert done.returncode == 6
    assert f"FAILED: {int8} on " in done.stderr
    assert "allowed at least 80 dB" in done.stderr
    assert "They part by the quantiser, between float ONNX, as written and" in done.stderr
    assert "equipoise diagnose" in done.stderr


def test_a_fault_in_the_file_is_named_with_its_node(
    workbench, damaged: Path, tmp_path: Path, equipoise
) -> None:
    """And its reproducer fails by itself."""
    import subprocess
    import sys

    done = equipoise("check", damaged, *against(workbench), "--repro", tmp_path / "repro")
    assert done.returncode == 6
    assert "They part by the changes to the file" in done.stderr
    assert "The first node that departs is second (MatMul)" in done.stderr
    script = tmp_path / "repro/reproduce.py"
    assert script.is_file()
    again = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert again.returncode == 1, again.stderr


def test_several_engines_are_checked_at_once(
    workbench, int8: Path, damaged: Path, equipoise
) -> None:
    """One that fails makes the check fail; the others are told apart from it."""
    done = equipoise("check", int8, damaged, *against(workbench), "--no-blame", "--json", "-")
    assert done.returncode == 6
    words = found(done)["verdict"].splitlines()
    assert [line.split(":")[0] for line in words] == ["FAILED", "PASSED"]
    assert "first node" not in words[0]


def test_the_metric_is_a_gate_with_its_bound(workbench, int8: Path, equipoise) -> None:
    """A bound that these samples cannot show is not met, and more samples are the advice."""
    arguments = ["check", int8, *against(workbench)]
    done = equipoise(*arguments, "--max-drop", "0.05", "--json", "-")
    assert done.returncode == 0, done.stderr
    last = found(done)["sides"][-1]
    assert last["metric"]["name"] == "accuracy"
    assert last["findings"] == []  # the task decides, where nothing is said of the numbers
    done = equipoise(*arguments, "--max-drop", "0.0001")
    assert done.returncode == 6
    assert "accuracy drops by" in done.stderr


def test_a_pipeline_gets_its_reports_whether_it_passes_or_not(
    workbench, int8: Path, tmp_path: Path, equipoise
) -> None:
    reports = tmp_path / "reports"
    (tmp_path / "summary.md").write_text("# Before\n")
    for limit, code in (("10", 0), ("80", 6)):
        done = equipoise(
            "check", int8, *against(workbench), "--min-sqnr", limit,
            "--junit", reports / "junit.xml", "--json", reports / "check.json",
            "--summary", tmp_path / "summary.md",
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        suite = ET.parse(reports / "junit.xml").getroot()
        assert suite.get("failures") == str(int(code == 6))
        record = json.loads((reports / "check.json").read_text())
        assert record["verdict"].startswith("FAILED" if code else "PASSED")
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# Before\n")
    assert summary.count("✅") > 2
    assert "❌" in summary


def test_repetition_tells_how_far_an_engine_is_from_itself(
    workbench, int8: Path, equipoise
) -> None:
    done = equipoise("check", int8, *against(workbench), "--repeat", "3", "--json", "-")
    assert done.returncode == 0, done.stderr
    spread = found(done)["sides"][-1]["spreads"][0]
    assert (spread["runs"], spread["builds"], spread["built"]) == (3, 3, "opened")
    assert spread["between_runs"] == 0.0
    assert spread["between_builds"] == 0.0


def test_an_engine_of_another_runtime_is_a_side_of_its_own(
    workbench, int8: Path, equipoise
) -> None:
    """Built here, anew for each repetition."""
    pytest.importorskip("openvino")
    done = equipoise(
        "check", int8, *against(workbench), "--target", "openvino", "--repeat", "2",
        "--json", "-",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = found(done)["sides"][-1]
    assert last["side"]["step"] == "build by openvino"
    assert last["side"]["before"] == f"{int8}, as written"
    assert last["spreads"][0]["built"] == "built"


def test_a_plan_that_does_not_say_its_precision_has_to_be_told(
    workbench, tmp_path: Path, equipoise
) -> None:
    (tmp_path / "engine.plan").write_bytes(b"no plan")
    done = equipoise("check", tmp_path / "engine.plan", *against(workbench))
    assert done.returncode == 2
    assert "--precision" in done.stderr


def test_half_precision_may_differ_by_more_than_float(workbench, tmp_path: Path, equipoise):
    """And a float file that is off by as much as half precision may be does not pass."""
    import onnx
    from onnx import numpy_helper

    half = tmp_path / "half.onnx"
    arguments = ["quantize", workbench.model, "--data", workbench.data, "-o", half, "-q"]
    done = equipoise(*arguments, "--scheme", "float16")
    assert done.returncode == 0, done.stderr
    model = onnx.load(workbench.model)
    for tensor in model.graph.initializer:
        rounded = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    onnx.save(model, tmp_path / "float.onnx")
    assert equipoise("check", half, *against(workbench)).returncode == 0
    assert equipoise("check", tmp_path / "float.onnx", *against(workbench)).returncode == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "needs --against SOURCE and --data DATA"),
        (["--data", "{data}"], "needs --against"),
        (["--against", "{model}"], "needs --against SOURCE and --data DATA"),
        (["--against", "{model}", "--data", "{data}", "--repeat", "0"], "--repeat is 0"),
        (["--against", "{model}", "--data", "{data}", "--max-flips", "2"], "--max-flips is 2"),
        (["--against", "{model}", "--data", "{data}", "--metric", "bleu"], "'bleu'"),
        (["--against", "{model}", "--data", "{data}", "--precision", "int3"], "int3"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(workbench, equipoise, options, words) -> None:
    filled = [o.format(model=workbench.model, data=workbench.data) for o in options]
    done = equipoise("check", workbench.model, *filled)
    assert done.returncode == 2
    assert words in done.stderr
