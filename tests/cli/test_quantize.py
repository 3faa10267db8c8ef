"""``equipoise quantize`` from the shell."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from equipoise import record
from equipoise.quantizing import QuantizeResult


@pytest.fixture(scope="module")
def unlabelled(workbench) -> Path:
    """The samples without labels, some for calibration and some to come."""
    x = np.load(workbench.data)["x"]
    np.savez(workbench.folder / "calibration.npz", x=x[:64])
    np.savez(workbench.folder / "alike.npz", x=x[64:128])
    np.savez(workbench.folder / "unlike.npz", x=x[64:128] * 20)
    return workbench.folder / "calibration.npz"


def quantized(equipoise, workbench, output: Path, *options: object) -> QuantizeResult:
    done = equipoise("quantize", workbench.model, "-o", output, "--json", *options)
    assert done.returncode == 0, done.stderr
    return record.loads(QuantizeResult, done.stdout, where="output")


def test_no_label_and_no_list_of_nodes_is_needed(
    workbench, equipoise, unlabelled: Path, tmp_path: Path
) -> None:
    """The record says what was kept, what was done, and whether the samples were enough."""
    made = quantized(equipoise, workbench, tmp_path / "q.onnx", "--data", unlabelled)
    assert made.samples == 64
    assert not made.synthetic
    assert made.quantized.optimized_sqnr_db is not None
    assert made.quantized.optimized_sqnr_db > 25
    assert made.quantized.quantized["QuantizeLinear"] == 2
    assert made.size_bytes < made.float_bytes
    assert any("from 32 to 64 calibration samples" in note for note in made.notes)
    onnx.checker.check_model(onnx.load(tmp_path / "q.onnx"))


def test_data_to_come_is_compared_with_what_was_seen(
    workbench, equipoise, unlabelled: Path, tmp_path: Path
) -> None:
    """Twenty times the range is not what calibration saw."""
    said = {}
    for name in ("alike", "unlike"):
        evaluation = workbench.folder / f"{name}.npz"
        options = ("--data", unlabelled, "--evaluation", evaluation)
        said[name] = quantized(equipoise, workbench, tmp_path / "q.onnx", *options).notes
    assert said["alike"] != said["unlike"]
    assert any("unlike" in note for note in said["unlike"])


def test_saved_ranges_are_taken_again_for_the_same_data_alone(
    workbench, equipoise, unlabelled: Path, tmp_path: Path
) -> None:
    """The same file comes out; a changed range changes it; other data is refused."""
    ranges = tmp_path / "ranges.json"
    quantized(
        equipoise, workbench, tmp_path / "a.onnx", "--data", unlabelled, "--save-ranges", ranges,
        "--no-outliers", "--no-smoothing", "--no-clipping",
    )  # fmt: skip
    load = ("--load-ranges", ranges, "--no-outliers", "--no-smoothing", "--no-clipping")
    quantized(equipoise, workbench, tmp_path / "b.onnx", "--data", unlabelled, *load)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    held = json.loads(ranges.read_text())
    held["ranges"]["x"] = [-9.0, 9.0]
    ranges.write_text(json.dumps(held))
    quantized(equipoise, workbench, tmp_path / "c.onnx", "--data", unlabelled, *load)
    assert (tmp_path / "a.onnx").read_bytes() != (tmp_path / "c.onnx").read_bytes()
    other = workbench.folder / "alike.npz"
    done = equipoise("quantize", workbench.model, "--data", other, "-o", tmp_path / "d.onnx", *load)
    assert done.returncode == 4
    assert "other calibration data" in done.stderr


def test_random_samples_are_called_by_their_name(workbench, equipoise, tmp_path: Path) -> None:
    """In the record and in words."""
    made = quantized(equipoise, workbench, tmp_path / "q.onnx", "--synthetic", 40)
    assert made.synthetic
    assert made.samples == 40
    assert "random numbers, not on data" in made.notes[0]


@pytest.mark.parametrize(
    "way",
    [
        (("--scheme", "blocks", "--bits", "4", "--rounding", "gptq"), "MatMulNBits"),
        (("--scheme", "blocks", "--bits", "8", "--qdq"), "DequantizeLinear"),
        (("--scheme", "float16"), "Cast"),
        (("--scheme", "weights"), "DequantizeLinear"),
        (("--scheme", "dynamic"), "DynamicQuantizeLinear"),
        (("--target", "tensorrt"), "QuantizeLinear"),
        (("--equalize", "--weight-ranges", "octav", "--ranges", "entropy"), "QuantizeLinear"),
    ],
)
def test_every_way_makes_a_file_that_runs(
    workbench, equipoise, unlabelled: Path, tmp_path: Path, way: tuple
) -> None:
    """What it adds is in the graph, and the outputs keep their signal."""
    options, operator = way
    made = quantized(equipoise, workbench, tmp_path / "q.onnx", "--data", unlabelled, *options)
    assert operator in {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert made.quantized.optimized_sqnr_db is not None
    assert made.quantized.optimized_sqnr_db > 10


def test_rounding_of_bfloat16_is_said_to_be_simulated(
    workbench, equipoise, unlabelled: Path, tmp_path: Path
) -> None:
    """ONNX Runtime has no kernels for it here."""
    options = ("--data", unlabelled, "--scheme", "bfloat16")
    made = quantized(equipoise, workbench, tmp_path / "q.onnx", *options)
    assert made.quantized.simulated
    assert made.quantized.sqnr_db is not None
    assert 30 < made.quantized.sqnr_db < 70


def _promising(path: Path) -> Path:
    """An array whose header promises four terabytes."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1), }"
    header = header.ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", data + bytes(64))
    return path


BAD = {
    "names": ({"z": np.zeros((8, 16), np.float32)}, "missing x; unknown z"),
    "dtype": ({"x": np.zeros((8, 16), np.float64)}, "is float64"),
    "rank": ({"x": np.zeros((8, 16, 2), np.float32)}, "the model takes"),
    "size": ({"x": np.zeros((8, 15), np.float32)}, "has to be 16"),
    "nan": ({"x": np.full((8, 16), np.nan, np.float32)}, "NaN or infinity"),
    "pickle": ({"x": np.array([{}, {}], dtype=object)}, "pickle"),
}


@pytest.mark.parametrize("name", [*BAD, "terabytes"])
def test_bad_calibration_data_is_an_error_that_names_it(
    workbench, equipoise, tmp_path: Path, name: str
) -> None:
    """Exit code 3, one sentence, no file and no trace of Python."""
    if name == "terabytes":
        path, words = _promising(tmp_path / "bad.npz"), "promises 4000000000000 bytes"
    else:
        arrays, words = BAD[name]
        path = tmp_path / "bad.npz"
        np.savez(path, **arrays)
    done = equipoise("quantize", workbench.model, "--data", path, "-o", tmp_path / "q.onnx")
    assert done.returncode == 3, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "q.onnx").exists()


def test_bad_requests_are_refused(workbench, equipoise, unlabelled: Path, tmp_path: Path) -> None:
    """Before any work, or with what was wrong in the model."""
    output = tmp_path / "q.onnx"
    quantized(equipoise, workbench, output, "--data", unlabelled)
    for model, options, code, words in (
        (output, ("--data", unlabelled), 3, "is quantised already"),
        (workbench.model, (), 2, "needs --data, or --synthetic"),
        (workbench.model, ("--data", unlabelled, "--budget", "soon"), 2, "--budget 'soon': say"),
        (workbench.model, ("--data", unlabelled, "--nodes-to-exclude", "frist"), 3, "first"),
        (workbench.model, ("--data", unlabelled, "--min-sqnr", "300"), 6, "nothing can run"),
        (workbench.model, ("--data", unlabelled, "--target", "toaster"), 2, "toaster"),
        (workbench.model, ("--scheme", "weights", "--tables", "int8"), 2, "--tables is for"),
        (
            workbench.model,
            ("--data", unlabelled, "--target", "openvino", "--tables", "blocks"),
            2,
            "gathers from no blocks",
        ),
    ):
        done = equipoise("quantize", model, "-o", tmp_path / "other.onnx", *options)
        assert done.returncode == code, (words, done.stderr)
        assert words in done.stderr
        assert not (tmp_path / "other.onnx").exists()
