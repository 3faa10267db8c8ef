"""Peak memory of a fresh process that loads and runs an engine."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from equipoise import record
from equipoise.data.store import write_rows
from equipoise.errors import IncompatibleError, InputError, UsageError
from equipoise.measure import memory
from equipoise.measure.memory import (
    MemoryConfig,
    MemoryRecord,
    measure_memory,
    peak_resident_bytes,
)

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
    return measure_memory(
        MemoryConfig(engine=engine, samples=rows, machine="m", processes=1), output=output
    )


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
    assert found.first_ms > 0
    long = {"x": np.ones((2048, 4096), np.float32)}
    write_rows(tmp_path / "long", [short, long])
    assert (
        measured(heavy, tmp_path / "long", tmp_path).peak_bytes > found.peak_bytes + 30 * MEGABYTE
    )


def test_each_figure_is_the_median_over_new_processes(
    monkeypatch: pytest.MonkeyPatch, linear_onnx: Path, tmp_path: Path
) -> None:
    """One process that was disturbed, or found the files on disk alone, changes nothing."""
    figures = iter([(9, 90.0, 5.0), (10, 30.0, 70.0), (500, 31.0, 6.0)])
    ran: list[str] = []

    def child(function: str, config: MemoryConfig, **_: object) -> str:  # noqa: ARG001
        ran.append(function)
        peak, load_ms, first_ms = next(figures)
        one = MemoryRecord(peak_bytes=peak, before_bytes=1, load_ms=load_ms, first_ms=first_ms)
        return record.dumps(one)

    monkeypatch.setattr(memory, "run_isolated", child)
    config = MemoryConfig(engine=linear_onnx, samples=tmp_path, machine="m")
    found = measure_memory(config, output=tmp_path)
    assert ran == ["equipoise.measure.memory:measure_here"] * 3
    assert (found.peak_bytes, found.load_ms, found.first_ms) == (10, 31.0, 6.0)
    assert (found.processes, found.page_cache) == (3, "warm")


def test_what_the_engine_raises_comes_through(linear_onnx: Path, tmp_path: Path) -> None:
    """A sample that does not fit, from the process that found it."""
    write_rows(tmp_path / "wrong", [{"x": np.ones((1, 7), np.float32)}])
    with pytest.raises(InputError, match="x"):
        measured(linear_onnx, tmp_path / "wrong", tmp_path)


def test_no_process_measures_nothing(linear_onnx: Path, tmp_path: Path) -> None:
    """Said before anything runs."""
    config = MemoryConfig(engine=linear_onnx, samples=tmp_path, machine="m", processes=0)
    with pytest.raises(UsageError, match="0 processes"):
        measure_memory(config, output=tmp_path)


def test_system_without_a_peak_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no module ``resource``; nothing is made up there."""
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(IncompatibleError, match="Windows does not tell"):
        peak_resident_bytes()


@pytest.mark.parametrize(("system", "unit"), [("Darwin", 1), ("FreeBSD", 1024)])
def test_peak_elsewhere_is_in_the_units_of_the_system(
    monkeypatch: pytest.MonkeyPatch, system: str, unit: int
) -> None:
    """getrusage counts bytes on macOS and kibibytes on others."""
    monkeypatch.setattr(platform, "system", lambda: system)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak * unit <= peak_resident_bytes() <= 2 * peak * unit
