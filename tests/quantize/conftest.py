"""Small graphs from text: built, run, calibrated and quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from equipoise.data.store import Rows, write_rows
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.static import Calibrated
from equipoise.quantize.statistics import read_statistics
from equipoise.targets.profile import Int8Scheme

Feeds = Mapping[str, np.ndarray]


def _build(text: str, weights: Mapping[str, np.ndarray], *, opset: int = 17) -> Any:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    for name, array in weights.items():
        kept = array if array.dtype == np.int64 else array.astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(kept, name))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    onnx.checker.check_model(model, full_check=True)
    return model


def _run(model: Any, feeds: Feeds, *, optimized: bool = True) -> dict[str, np.ndarray]:
    level = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    # Exact int8 sums on every CPU: what saturates without VNNI is a subject of its own.
    options.add_session_config_entry("session.x64quantprecision", "1")
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """``(text of a graph, weights) -> ModelProto`` with a node ``node_<output>`` for each line."""
    return _build


@pytest.fixture(scope="session")
def run() -> Callable[..., dict[str, np.ndarray]]:
    """``(model or path, feeds) -> outputs`` of ONNX Runtime, as written or with all rewrites."""
    return _run


@pytest.fixture(scope="session")
def sqnr() -> Callable[[np.ndarray, np.ndarray], float]:
    """Signal to noise in dB of an array against a reference."""

    def decibel(wanted: np.ndarray, found: np.ndarray) -> float:
        noise = np.square(found.astype(np.float64) - wanted).sum()
        signal = np.square(wanted.astype(np.float64)).sum()
        return float(10 * np.log10(signal / max(noise, 1e-30)))

    return decibel


@pytest.fixture
def calibrated(tmp_path: Path) -> Callable[[Any, Sequence[Feeds]], Calibrated]:
    """``(model, rows) -> Calibrated``, through the calibrate stage."""

    def calibrate_it(model: Any, rows: Sequence[Feeds]) -> Calibrated:
        folder = tmp_path / f"calibrated_{len(list(tmp_path.iterdir()))}"
        write_rows(folder / "rows", rows)
        onnx.save(model, folder / "model.onnx")
        config = CalibrateConfig(model=folder / "model.onnx", samples=folder / "rows")
        calibrate(config, output=folder)
        statistics = read_statistics(folder).tensors
        return Calibrated(statistics=statistics, rows=Rows(folder / "rows"))

    return calibrate_it


@pytest.fixture(scope="session")
def scheme() -> Int8Scheme:
    """What a CPU with VNNI wants of ONNX Runtime."""
    return Int8Scheme(
        activation="uint8", weight="int8", per_channel=True, saturates=False, reason="a test"
    )
