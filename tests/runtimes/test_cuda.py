"""ONNX Runtime's CUDA provider, where there are an NVIDIA GPU and onnxruntime-gpu."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from equipoise.errors import IncompatibleError, InputError
from equipoise.quantize.halves import Halves, convert_to_half
from equipoise.runtimes.onnxruntime.session import open_session
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.tensorrt.cuda import find_gpu

pytestmark = pytest.mark.skipif(
    find_gpu() is None or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs an NVIDIA GPU and onnxruntime-gpu",
)

CPU = SessionSettings()
TENSOR_CORES = SessionSettings(providers=("CUDAExecutionProvider",))
EXACT = SessionSettings(providers=("CUDAExecutionProvider:use_tf32=0",))
RNG = np.random.default_rng(4)


def network(path: Path, *, unknown: bool = False) -> Path:
    """Convolution, pooling, two products, softmax; ``unknown`` adds what CUDA has no kernel for."""
    shapes = {"kernel": (32, 3, 3, 3), "first": (32, 256), "second": (256, 10)}
    weights = {
        name: RNG.normal(size=shape, scale=np.prod(shape[1:] or shape) ** -0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "first"], ["hidden"]),
        helper.make_node("Tanh", ["hidden"], ["bent"]),
        helper.make_node("MatMul", ["bent", "second"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores" if unknown else "y"]),
    ]
    if unknown:
        nodes.append(helper.make_node("Atanh", ["scores"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3, 24, 24])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def pictures(batch: int) -> dict[str, np.ndarray]:
    return {"x": RNG.normal(size=(batch, 3, 24, 24)).astype(np.float32)}


def furthest(engine: Path, settings: SessionSettings, *, model: Path | None = None) -> float:
    """The largest difference between an engine on the GPU and a model on the CPU."""
    found = 0.0
    with (
        open_session(model or engine, settings=CPU) as cpu,
        open_session(engine, settings=settings) as gpu,
    ):
        for feeds in map(pictures, (1, 5, 32)):
            found = max(found, float(np.abs(cpu.run(feeds)["y"] - gpu.run(feeds)["y"]).max()))
    return found


def test_float32_agrees_with_the_cpu_and_tf32_is_a_choice(tmp_path: Path) -> None:
    """Tensor cores round float32 to ten bits unless they are told not to."""
    path = network(tmp_path / "network.onnx")
    assert furthest(path, EXACT) < 2e-6
    assert furthest(path, TENSOR_CORES) < 2e-3


def test_float16_agrees_within_its_rounding(tmp_path: Path) -> None:
    """The model that was converted for it, on the kernels that are for it."""
    path = network(tmp_path / "network.onnx")
    rows = [pictures(1) for _ in range(8)]
    half, _ = convert_to_half(onnx.load(path), Halves(), rows=rows)
    onnx.save(half, tmp_path / "half.onnx")
    assert furthest(tmp_path / "half.onnx", EXACT, model=path) < 2e-3


def test_results_stay_and_fill_the_buffers_of_the_caller(tmp_path: Path) -> None:
    """As on any runtime."""
    path = network(tmp_path / "network.onnx")
    feeds, other = pictures(3), pictures(3)
    with open_session(path, settings=EXACT) as session:
        first = session.run(feeds)["y"]
        kept, out = first.copy(), {"y": np.zeros((3, 10), np.float32)}
        filled = session.run(other, out=out)
        assert filled["y"] is out["y"]
        assert (first == kept).all()
        assert np.allclose(out["y"], session.run(other)["y"])
        with pytest.raises(InputError):
            session.run({"x": np.zeros((1, 3, 24, 25), np.float32)})


def test_what_cuda_has_no_kernel_for_is_refused_unless_the_cpu_is_named(tmp_path: Path) -> None:
    """Nothing goes to the CPU behind the back of the user."""
    path = network(tmp_path / "network.onnx", unknown=True)
    with pytest.raises(IncompatibleError, match="does not take every node"):
        open_session(path, settings=EXACT)
    shared = SessionSettings(providers=(*EXACT.providers, "CPUExecutionProvider"))
    assert furthest(path, shared) < 2e-6


def test_a_gpu_that_is_not_there_is_incompatible(tmp_path: Path) -> None:
    """The provider's own words, in an error of ours."""
    path = network(tmp_path / "network.onnx")
    settings = SessionSettings(providers=("CUDAExecutionProvider:device_id=7",))
    with pytest.raises(IncompatibleError, match="CUDAExecutionProvider"):
        open_session(path, settings=settings)
