"""Fusions change the operators, not the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from equipoise.errors import SourceError
from equipoise.graph.fuse import FuseConfig, fuse

WIDTH = 16


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The feed-forward half of a transformer layer, as exporters write it."""
    node = helper.make_node
    nodes = [
        node("Add", ["x", "skip"], ["r"]),
        node("LayerNormalization", ["r", "gain", "shift"], ["n"], axis=-1, epsilon=1e-5),
        node("MatMul", ["n", "w"], ["m"]),
        node("Add", ["m", "b"], ["h"]),
        node("Div", ["h", "root"], ["d"]),
        node("Erf", ["d"], ["e"]),
        node("Add", ["e", "one"], ["f"]),
        node("Mul", ["h", "f"], ["g"]),
        node("Mul", ["g", "half"], ["y"]),
    ]
    generator = np.random.default_rng(0)
    weights = {
        "gain": generator.normal(size=WIDTH), "shift": generator.normal(size=WIDTH),
        "w": generator.normal(size=(WIDTH, 32)), "b": generator.normal(size=32),
        "root": np.array(2**0.5), "one": np.array(1.0), "half": np.array(0.5),
    }  # fmt: skip
    shape = ["batch", "sequence", WIDTH]
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "skip")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape[:2], 32])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()],
    )
    path = tmp_path_factory.mktemp("block") / "model.onnx"
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def test_transformer_block_is_fused_and_computes_the_same(block: Path, tmp_path: Path) -> None:
    """Skip layer norm and bias GELU become one operator each, at any batch and length."""
    record = fuse(FuseConfig(model=block), output=tmp_path)
    assert record.fusions["skip_layer_normalization"] == 1
    assert record.fusions["bias_gelu"] == 1
    fused = tmp_path / "model.onnx"
    operators = [node.op_type for node in onnx.load(fused).graph.node]
    assert operators == ["SkipLayerNormalization", "MatMul", "BiasGelu"]
    generator = np.random.default_rng(1)
    sessions = [
        onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"])
        for p in (block, fused)
    ]
    for shape in ((1, 3, WIDTH), (4, 7, WIDTH)):
        feeds = {n: generator.normal(size=shape).astype(np.float32) for n in ("x", "skip")}
        before, after = (session.run(None, feeds)[0] for session in sessions)
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_graph_with_nothing_to_fuse_gives_no_file(conv_onnx: Path, tmp_path: Path) -> None:
    """The record is empty, so the candidate does not apply."""
    assert fuse(FuseConfig(model=conv_onnx), output=tmp_path).fusions == {}
    assert not list(tmp_path.iterdir())


def test_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    """Missing, and not ONNX."""
    (tmp_path / "text.onnx").write_text("no model")
    for name, words in (("none.onnx", "no such ONNX file"), ("text.onnx", "not a valid ONNX")):
        with pytest.raises(SourceError, match=words) as raised:
            fuse(FuseConfig(model=tmp_path / name), output=tmp_path)
        assert name in raised.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["text.onnx"]
