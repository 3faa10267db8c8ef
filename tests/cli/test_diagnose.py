"""``equipoise diagnose`` from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnxruntime import quantization

from equipoise import record
from equipoise.quantize.diagnose import Diagnosis


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, rows: np.ndarray) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self._rows, None)
        return None if row is None else {"x": row[None]}


@pytest.fixture(scope="module")
def quantized(workbench) -> Path:
    """The classifier in static int8, as ONNX Runtime's own quantiser makes it."""
    path = workbench.folder / "diagnosed.onnx"
    rows = np.load(workbench.data)["x"][:32]
    quantization.quantize_static(
        workbench.model,
        path,
        _Reader(rows),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return path


def test_tables_name_the_nodes_and_the_page_has_every_row(
    workbench, equipoise, quantized: Path, tmp_path: Path
) -> None:
    """In the terminal the worst of each, in the page all, with the metric beside the SQNR."""
    page = tmp_path / "page.html"
    done = equipoise(
        "diagnose", workbench.model, quantized, "--data", workbench.data, "--metric", "accuracy",
        "--budget", "20s", "--html", page, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("accuracy: 1.0000 in float", "Nodes by damage", "Saturation", "first", "second"):
        assert words in done.stdout
    text = page.read_text(encoding="utf-8")
    assert "<h2>Nodes by time</h2>" in text
    assert "http" not in text.replace("http-equiv", "")


def test_json_is_one_document(workbench, equipoise, quantized: Path) -> None:
    """It reads back as the record."""
    done = equipoise(
        "diagnose", workbench.model, quantized, "--data", workbench.data, "--budget", "5s", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = record.from_json(Diagnosis, json.loads(done.stdout))
    assert found.form == "qdq"
    assert found.samples == 16
    assert found.damage is not None
    assert {damage.name for damage in found.damage.nodes} >= {"first", "second"}


def test_models_in_the_wrong_order_are_bad_input(workbench, equipoise) -> None:
    """Exit code 3, one line what is wrong and one what to do."""
    done = equipoise("diagnose", workbench.model, workbench.model, "--data", workbench.data)
    assert done.returncode == 3
    assert "has no quantised node" in done.stderr
    assert "Give the float model first" in done.stderr
    assert "Traceback" not in done.stderr
