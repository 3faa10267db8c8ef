"""What every test shares: a cache of its own, and small real ONNX models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before anything of equipoise is imported: no test touches the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="equipoise-tests-")
os.environ["EQUIPOISE_CACHE_DIR"] = _CACHE.name
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout: the folder that holds src, tests, docs and scripts."""
    return ROOT


@pytest.fixture(scope="session")
def linear_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``y = relu(x @ w + b)`` with x float32[batch, 4] and y float32[batch, 3]."""
    onnx = pytest.importorskip("onnx")
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        linear (float[batch, 4] x) => (float[batch, 3] y) {
            product = MatMul(x, w)
            sum = Add(product, b)
            y = Relu(sum)
        }
        """
    )
    weights = {
        "w": random.normal(size=(4, 3)).astype(np.float32),
        "b": random.normal(size=3).astype(np.float32),
    }
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path_factory.mktemp("linear") / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def conv_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CNN: x float32[batch, 1, 8, 8] to logits float32[batch, 10]."""
    onnx = pytest.importorskip("onnx")
    random = np.random.default_rng(1)
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        digits (float[batch, 1, 8, 8] x) => (float[batch, 10] logits) {
            convolved = Conv <pads = [1, 1, 1, 1]> (x, kernel, bias)
            rectified = Relu(convolved)
            pooled = GlobalAveragePool(rectified)
            flat = Flatten(pooled)
            logits = Gemm(flat, head, offset)
        }
        """
    )
    weights = {
        "kernel": random.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "bias": random.normal(size=4).astype(np.float32),
        "head": random.normal(size=(4, 10)).astype(np.float32),
        "offset": random.normal(size=10).astype(np.float32),
    }
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path_factory.mktemp("conv") / "model.onnx"
    onnx.save(model, path)
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the families of malformed inputs counted."""
    reports = [r for group in terminalreporter.stats.values() for r in group]
    counted = [value for r in reports for key, value in getattr(r, "user_properties", ()) if
        key == "counted"]  # fmt: skip
    if counted:
        terminalreporter.section("malformed inputs")
        for line in sorted(dict.fromkeys(map(str, counted))):
            terminalreporter.write_line(line)
