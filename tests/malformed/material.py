"""Small good files of every kind that equipoise reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from equipoise.runtimes.build import BuildConfig, build
from equipoise.runtimes.protocol import SessionSettings


def weights() -> dict[str, np.ndarray]:
    """``kernel`` float32[8, 16], ``bias`` float32[16] and ``head`` float32[16, 4]."""
    random = np.random.default_rng(0)
    shapes = {"kernel": (8, 16), "bias": (16,), "head": (16, 4)}
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def model_of(
    nodes: Sequence[onnx.NodeProto],
    *,
    tensors: Sequence[onnx.TensorProto] = (),
    dtype: int = TensorProto.FLOAT,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model of ``nodes`` from x[batch, 8] to y[batch, 4]."""
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(name, 1) for name in domains)]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", dtype, ["batch", 8])],
        [helper.make_tensor_value_info("y", dtype, ["batch", 4])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def perceptron() -> onnx.ModelProto:
    """``y = relu(x @ kernel + bias) @ head``, one kilobyte and some of it."""
    nodes = [
        helper.make_node("Gemm", ["x", "kernel", "bias"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "head"], ["y"], name="second"),
    ]
    return model_of(nodes, tensors=[numpy_helper.from_array(a, n) for n, a in weights().items()])


def write_onnx(path: Path, model: onnx.ModelProto | None = None) -> Path:
    """Write ``model``, or the perceptron."""
    path.write_bytes((model or perceptron()).SerializeToString(deterministic=True))
    return path


def write_safetensors(path: Path) -> Path:
    """Write the weights of the perceptron."""
    save_file({name: torch.from_numpy(array) for name, array in weights().items()}, path)
    return path


def build_engine(folder: Path, *, runtime: str) -> Path:
    """Build the perceptron for ``runtime``; the directory of the engine."""
    model, output = write_onnx(folder / "model.onnx"), folder / "engine"
    output.mkdir()
    build(BuildConfig(model=model, runtime=runtime, settings=SessionSettings()), output=output)
    return output
