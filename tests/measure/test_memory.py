"""Peak memory of a fresh process that loads and runs an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from equipoise import record
from equipoise.data.store import write_rows
from equipoise.isolation import run_isolated
from equipoise.measure.memory import MemoryConfig, MemoryRecord

MEGABYTE = 1 << 20


@pytest.fixture
def heavy(tmp_path: Path) -> Path:
    """64 MiB of weights."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]>'
        "heavy (float[batch, 4096] x) => (float[batch, 4096] y) { y = MatMul(x, w) }"
    )
    weights = np.ones((4096, 4096), dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, tmp_path / "heavy.onnx")
    return tmp_path / "heavy.onnx"


def measured(engine: Path, rows: Path, output: Path) -> MemoryRecord:
    text = run_isolated(
        "equipoise.measure.memory:measure_memory",
        MemoryConfig(engine=engine, samples=rows, machine="m"),
        output=output,
        on_progress=lambda _done, _total: None,
        time_limit_s=120,
    )
    return record.loads(MemoryRecord, text, where="memory")


def test_weights_and_the_largest_sample_count(heavy: Path, linear_onnx, tmp_path: Path) -> None:
    """64 MiB of weights show; so does a long sample that comes last."""
    write_rows(tmp_path / "light", [{"x": np.ones((1, 4), np.float32)}])
    light = measured(linear_onnx, tmp_path / "light", tmp_path)
    assert light.peak_bytes >= light.before_bytes > 8 * MEGABYTE
    short = {"x": np.ones((1, 4096), np.float32)}
    write_rows(tmp_path / "short", [short])
    found = measured(heavy, tmp_path / "short", tmp_path)
    assert found.peak_bytes - light.peak_bytes > 60 * MEGABYTE
    assert found.load_ms > 0
    assert found.first_run_ms > 0
    long = {"x": np.ones((2048, 4096), np.float32)}
    write_rows(tmp_path / "long", [short, long])
    assert (
        measured(heavy, tmp_path / "long", tmp_path).peak_bytes > found.peak_bytes + 30 * MEGABYTE
    )
