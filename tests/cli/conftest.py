"""A small classifier that every command can work on in seconds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """A float ONNX classifier, labelled data that it gets right, and a place for outputs."""

    model: Path
    data: Path
    folder: Path


def _classifier(path: Path, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    hidden = generator.normal(size=(16, 64)).astype(np.float32) / 4
    head = generator.normal(size=(64, 4)).astype(np.float32) / 8
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "hidden"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["b"], name="relu"),
            helper.make_node("MatMul", ["b", "head"], ["logits"], name="second"),
        ],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(hidden, "hidden"), numpy_helper.from_array(head, "head")],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return hidden, head


@pytest.fixture(scope="session")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """The classifier and 600 samples whose labels are its own decisions."""
    folder = tmp_path_factory.mktemp("workbench")
    generator = np.random.default_rng(0)
    hidden, head = _classifier(folder / "model.onnx", generator)
    x = generator.normal(size=(600, 16)).astype(np.float32)
    scores = np.maximum(x @ hidden, 0) @ head
    ordered = np.sort(scores, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 0.05
    label = scores.argmax(1).astype(np.int64)
    np.savez(folder / "data.npz", x=x[clear], label=label[clear])
    return Workbench(model=folder / "model.onnx", data=folder / "data.npz", folder=folder)


@pytest.fixture(scope="session")
def equipoise():
    """Run the command line in a process of its own."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "equipoise", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            **options,
        )

    return run


@pytest.fixture(scope="session")
def tuned(workbench: Workbench, equipoise) -> Path:
    """The output directory of a finished tuning run."""
    output = workbench.folder / "tuned"
    done = equipoise(
        "tune", workbench.model, "--data", workbench.data, "--metric", "accuracy",
        "--max-drop", "0.02", "--threads", "1", "--rounds", "12", "--trials", "7", "-o", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Sweet spot" in done.stdout
    return output
