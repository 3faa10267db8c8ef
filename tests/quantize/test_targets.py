"""Every target's file obeys its scheme, runs in ONNX Runtime, and in the target's own runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from equipoise import extras
from equipoise.data.store import Rows, write_rows
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.schemes import StaticInt8
from equipoise.quantize.static import Calibrated, prepare_static, written
from equipoise.quantize.statistics import read_statistics
from equipoise.runtimes.openvino.core import openvino
from equipoise.runtimes.registry import BUILDERS
from equipoise.targets.machine import detect_machine
from equipoise.targets.profile import Int8Scheme
from equipoise.targets.profiles import get_target, target_names

RANDOM = np.random.default_rng(7)
LAYERS = {"Conv", "Gemm", "MatMul"}
CNN = """
    cnn (float[batch, 3, 12, 12] x) => (float[batch, 10] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
        b = Clip(a, zero, six)
        c = Conv <pads = [1, 1, 1, 1], group = 16> (b, w2, b2)
        d = Relu(c)
        e = Conv(d, w3, b3)
        f = Add(e, b)
        g = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (f, w4, b4)
        h = Relu(g)
        i = GlobalAveragePool(h)
        j = Flatten(i)
        y = Gemm <transB = 1> (j, w5, b5)
    }
"""
BLOCK = """
    block (float[batch, 8, 32] x) => (float[batch, 8, 32] y) {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        t = Transpose <perm = [0, 2, 1]> (k)
        raw = MatMul(q, t)
        scores = Mul(raw, root)
        weights = Softmax <axis = -1> (scores)
        mixed = MatMul(weights, v)
        out = MatMul(mixed, wo)
        shifted = Add(out, bo)
        residual = Add(x, shifted)
        normal = LayerNormalization <axis = -1> (residual, gain, shift)
        up = MatMul(normal, w1)
        wide = Add(up, b1)
        kept = Relu(wide)
        down = MatMul(kept, w2)
        narrow = Add(down, b2)
        y = Add(normal, narrow)
    }
"""


TEXT = """
    text (int64[batch, 6] ids) => (float[batch, 6, 16] y) {
        x = Gather(table, ids)
        y = MatMul(x, w)
    }
"""


def decibel(wanted: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(found.astype(np.float64) - wanted).mean()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).mean() / max(noise, 1e-30)))


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return RANDOM.normal(size=shape) * scale


CNN_WEIGHTS = {
    "w1": normal(16, 3, 3, 3, scale=0.3), "w2": normal(16, 1, 3, 3, scale=0.4),
    "w3": normal(16, 16, 1, 1, scale=0.3), "w4": normal(24, 16, 3, 3, scale=0.1),
    "w5": normal(10, 24, scale=0.3), "zero": np.array(0.0), "six": np.array(6.0),
    **{f"b{n}": normal(size, scale=0.2) for n, size in enumerate((16, 16, 16, 24, 10), start=1)},
}  # fmt: skip
BLOCK_WEIGHTS = {
    **{f"w{n}": normal(32, 32, scale=0.2) for n in "qkvo"},
    "w1": normal(32, 64, scale=0.2), "w2": normal(64, 32, scale=0.15),
    "bo": normal(32, scale=0.1), "b1": normal(64, scale=0.1), "b2": normal(32, scale=0.1),
    "gain": np.ones(32), "shift": np.zeros(32), "root": np.array(32**-0.5),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Network:
    """A float model, where it lies, and what calibration saw of it."""

    model: Any
    folder: Path
    calibrated: Calibrated
    feeds: list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def networks(build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Network]:
    found = {}
    for name, text, weights, shape in (
        ("cnn", CNN, CNN_WEIGHTS, (1, 3, 12, 12)),
        ("block", BLOCK, BLOCK_WEIGHTS, (1, 8, 32)),
    ):
        folder = tmp_path_factory.mktemp(name)
        rows = [{"x": RANDOM.normal(size=shape).astype(np.float32)} for _ in range(48)]
        model = build(text, weights)
        onnx.save(model, folder / "model.onnx")
        write_rows(folder / "rows", rows[:32])
        config = CalibrateConfig(model=folder / "model.onnx", samples=folder / "rows")
        calibrate(config, output=folder)
        statistics = read_statistics(folder).tensors
        found[name] = Network(
            model=model,
            folder=folder,
            calibrated=Calibrated(statistics=statistics, rows=Rows(folder / "rows")),
            feeds=rows[32:],
        )
    return found


def scheme_of(target: str) -> Int8Scheme:
    return get_target(target, machine=detect_machine()).int8


@pytest.fixture(scope="module")
def quantized(networks) -> Callable[[str, str], Any]:
    """``(network, target) -> ModelProto`` with Q/DQ, made once."""
    made: dict[tuple[str, str], Any] = {}

    def make(name: str, target: str) -> Any:
        if (name, target) not in made:
            network, scheme = networks[name], scheme_of(target)
            opset = max(17, scheme.least_opset)
            model = onnx.version_converter.convert_version(network.model, opset)
            model.ir_version = 10
            made[name, target] = written(
                prepare_static(
                    onnx.shape_inference.infer_shapes(model),
                    network.calibrated,
                    scheme=scheme,
                    settings=StaticInt8(),
                )
            )
        return made[name, target]

    return make


both = pytest.mark.parametrize("name", ["cnn", "block"])
BY_SCHEME = {scheme_of(name): name for name in reversed(target_names())}
every = pytest.mark.parametrize("target", sorted(BY_SCHEME.values()))
"""One target of each integer scheme."""


class Graph:
    """A quantised graph by what a parser asks of it."""

    def __init__(self, model: Any) -> None:
        self.nodes = list(model.graph.node)
        self.constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self._producers = {name: node for node in self.nodes for name in node.output}

    def made(self, name: str) -> str:
        """Type of the operator that makes a tensor; empty for an input or a constant."""
        return self._producers[name].op_type if name in self._producers else ""

    def readers(self, name: str) -> list[str]:
        return [node.op_type for node in self.nodes if name in node.input]

    def of(self, operator: str) -> list[Any]:
        return [node for node in self.nodes if node.op_type == operator]

    def layers(self) -> list[Any]:
        """Nodes whose weight comes back from integers."""
        return [n for n in self.nodes if n.op_type in LAYERS and self.stored(n, 1) is not None]

    def stored(self, node: Any, index: int) -> Any:
        """The DequantizeLinear that restores an input of ``node`` from an initializer, if one."""
        restored = self._producers.get(node.input[index]) if len(node.input) > index else None
        constant = restored is not None and restored.input[0] in self.constants
        return restored if constant and restored.op_type == "DequantizeLinear" else None

    def scales(self) -> Iterator[np.ndarray]:
        for node in (*self.of("QuantizeLinear"), *self.of("DequantizeLinear")):
            yield self.constants[node.input[1]]


@every
@both
def test_integers_are_of_the_types_that_the_scheme_says(quantized, name: str, target: str) -> None:
    """Activations, weights and biases: type, zero point, and scales per channel or not."""
    scheme, graph = scheme_of(target), Graph(quantized(name, target))
    pairs = graph.of("QuantizeLinear")
    assert pairs
    for node in pairs:
        zero = graph.constants[node.input[2]]
        assert zero.dtype == scheme.activation
        assert not scheme.symmetric or zero == (0 if scheme.activation == "int8" else 128)
    assert len(graph.layers()) == {"cnn": 5, "block": 6}[name]
    for node in graph.layers():
        values, scale, zero = (graph.constants[n] for n in graph.stored(node, 1).input)
        assert values.dtype == "int8"
        assert values.min() >= -127  # narrow: minus 128 has no counterpart
        assert not zero.any()
        assert bool(scale.ndim) == (scheme.per_channel and node.op_type not in scheme.per_tensor)


@every
def test_biases_are_of_the_type_that_the_scheme_says(quantized, target: str) -> None:
    """int32 at the product of the scales, or the float that it was."""
    scheme, graph = scheme_of(target), Graph(quantized("cnn", target))
    for node in graph.layers():
        stored = graph.stored(node, 2)
        if scheme.bias == "float":
            assert graph.constants[node.input[2]].dtype == "float32"
            continue
        values, scale, zero = (graph.constants[n] for n in stored.input)
        assert values.dtype == "int32"
        assert not zero.any()
        read = next(n for n in graph.of("DequantizeLinear") if n.output[0] == node.input[0])
        product = graph.constants[read.input[1]] * graph.constants[graph.stored(node, 1).input[1]]
        np.testing.assert_allclose(scale, product, rtol=1e-6)


@both
def test_scales_are_powers_of_two_where_shifts_rescale(quantized, name: str) -> None:
    """Every one, those of biases too; no other target's are."""
    for target in ("vitis-ai", "cpu"):
        fractions = [np.frexp(scale)[0] for scale in Graph(quantized(name, target)).scales()]
        assert all(np.all(f == 0.5) for f in fractions) == (target == "vitis-ai")


@every
@both
def test_pairs_stand_where_the_runtime_looks_for_them(quantized, name: str, target: str) -> None:
    """Before each layer; behind it too, or there alone where the scheme says so."""
    scheme, graph = scheme_of(target), Graph(quantized(name, target))
    for node in graph.layers():
        assert graph.made(node.input[0]) == "DequantizeLinear"
        after = graph.readers(node.output[0])
        rounded = after == ["QuantizeLinear"] or set(after) <= {"Clip", "Relu"}
        if node.op_type == "Conv" and scheme.quantize_outputs:
            assert rounded
        if node.op_type in {"Gemm", "MatMul"}:
            is_float = scheme.float_products or not scheme.quantize_outputs
            assert (after == ["QuantizeLinear"]) == (not is_float)


@both
def test_tensorrt_sees_no_rounding_inside_its_fusions(quantized, networks, name: str) -> None:
    """Clip and Relu stay; the Add behind a convolution reads its float sum and one pair."""
    graph = Graph(quantized(name, "tensorrt"))
    for operator in ("Clip", "Relu"):
        assert len(graph.of(operator)) == len(Graph(networks[name].model).of(operator))
    if name == "cnn":
        (add,) = graph.of("Add")
        assert [graph.made(n) for n in add.input] == ["Conv", "DequantizeLinear"]
        assert "QuantizeLinear" not in graph.readers(add.input[0])


@pytest.fixture
def outputs(networks, run) -> Callable[..., np.ndarray]:
    """``(network, model or path) -> outputs`` of ONNX Runtime on what calibration did not see."""

    def outputs_of(name: str, model: Any, *, optimized: bool = True) -> np.ndarray:
        feeds = networks[name].feeds
        return np.concatenate([run(model, one, optimized=optimized)["y"] for one in feeds])

    return outputs_of


@every
@both
def test_files_run_alike_as_written_and_as_optimised(
    networks, outputs, quantized, name: str, target: str
) -> None:
    """The runtime's kernels lose no more to the graph than the graph loses to the float model."""
    model = quantized(name, target)
    onnx.checker.check_model(model, full_check=True)
    wanted = outputs(name, networks[name].model)
    plain, fast = (outputs(name, model, optimized=optimized) for optimized in (False, True))
    least = 20 if scheme_of(target).power_of_two else 25
    assert decibel(wanted, plain) > least
    assert decibel(wanted, fast) > least
    assert decibel(plain, fast) > decibel(wanted, plain)


@every
@both
def test_the_quantise_stage_makes_a_file_for_the_target(
    networks, tmp_path: Path, name: str, target: str
) -> None:
    """From a file of opset 17, which has no 16-bit integers; verified by the stage itself."""
    folder = networks[name].folder
    config = QuantizeConfig(
        model=folder / "model.onnx",
        quantization=StaticInt8(),
        scheme=scheme_of(target),
        samples=folder / "rows",
        statistics=folder,
    )
    record = quantize(config, output=tmp_path)
    assert record.sqnr_db is not None
    assert record.sqnr_db > 20
    graph = Graph(onnx.load(tmp_path / record.file))
    kinds = {str(graph.constants[n.input[2]].dtype) for n in graph.of("QuantizeLinear")}
    assert kinds == {scheme_of(target).activation}


def test_no_range_of_hexagon_is_below_its_least(networks) -> None:
    """An input of next to nothing gets the least range, and zero on its grid."""
    network = networks["cnn"]
    rows = [{"x": feeds["x"] * np.float32(1e-7)} for feeds in network.feeds]
    folder = network.folder / "small"
    write_rows(folder / "rows", rows)
    calibrate(
        CalibrateConfig(model=network.folder / "model.onnx", samples=folder / "rows"), output=folder
    )
    seen = Calibrated(statistics=read_statistics(folder).tensors, rows=Rows(folder / "rows"))
    ranges = {}
    for target in ("qnn-htp", "cpu"):
        copy = onnx.ModelProto()
        copy.CopyFrom(network.model)
        prepared = prepare_static(copy, seen, scheme=scheme_of(target), settings=StaticInt8())
        ranges[target] = float(prepared.placement.activations["x"].scale) * 255
    assert ranges["cpu"] < 1e-5
    assert ranges["qnn-htp"] == pytest.approx(1e-4)


@pytest.fixture
def text(build, tmp_path: Path) -> Callable[[str], Path]:
    """``target -> path`` of a model with an embedding, as the stage quantises it."""
    model = build(TEXT, {"table": normal(50, 32), "w": normal(32, 16)})
    rows = [{"ids": RANDOM.integers(0, 50, size=(1, 6))} for _ in range(16)]
    onnx.save(model, tmp_path / "float.onnx")
    write_rows(tmp_path / "rows", rows)
    calibrate(
        CalibrateConfig(model=tmp_path / "float.onnx", samples=tmp_path / "rows"),
        output=tmp_path / "statistics",
    )

    def made(target: str) -> Path:
        config = QuantizeConfig(
            model=tmp_path / "float.onnx",
            quantization=StaticInt8(),
            scheme=scheme_of(target),
            samples=tmp_path / "rows",
            statistics=tmp_path / "statistics",
        )
        return tmp_path / quantize(config, output=tmp_path).file

    return made


@every
def test_embeddings_are_integers_where_the_runtime_looks_them_up(text, target: str) -> None:
    """Else they stay float: parsers of other runtimes refuse a Gather of int8."""
    graph = Graph(onnx.load(text(target)))
    looked_up = [graph.constants[n.input[0]].dtype for n in graph.of("Gather")]
    assert ("int8" in looked_up) == scheme_of(target).tables


@pytest.fixture
def save(quantized, tmp_path: Path) -> Callable[[str, str], Path]:
    """``(network, target) -> path`` of its file."""

    def saved(name: str, target: str) -> Path:
        path = tmp_path / f"{name}-{target}.onnx"
        onnx.save(quantized(name, target), path)
        return path

    return saved


def build_engine(path: Path) -> int:
    """Bytes of the engine that TensorRT-RTX makes for an RTX 30 card; 0 where it refuses."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt' is not installed")
    logger = rtx.Logger(rtx.Logger.INTERNAL_ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network()  # strongly typed, as all of its networks are
    if not rtx.OnnxParser(network, logger).parse_from_file(str(path)):
        return 0
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    read = network.get_input(0)
    profile.set_shape(read.name, *[(batch, *tuple(read.shape)[1:]) for batch in (1, 2, 4)])
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return 0 if engine is None else int(engine.nbytes)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@both
def test_tensorrt_rtx_builds_its_file(save, name: str, target: str) -> None:
    """Its own parser takes it and its builder makes an engine; no GPU is needed for that."""
    assert build_engine(save(name, target)) > 10_000


def test_tensorrt_rtx_builds_a_file_with_embeddings(text) -> None:
    """As the stage makes it, tables and all."""
    assert build_engine(text("tensorrt")) > 1_000


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_tensorrt_rtx_refuses_the_files_of_others(save, target: str) -> None:
    """Else the test above would show nothing: zero points and int32 biases are not for it."""
    assert build_engine(save("cnn", target)) == 0


@pytest.mark.parametrize("target", ["openvino", "x86-vnni"])
@both
def test_openvino_gives_what_onnx_runtime_gives(
    networks, outputs, save, name: str, target: str
) -> None:
    """The same signal to noise within 2 dB, with every layer in integers."""
    if not extras.installed("openvino"):
        pytest.skip("the extra 'openvino' is not installed")
    path, network = save(name, target), networks[name]
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino().Core().compile_model(str(path), "CPU", settings)
    wanted, expected = (outputs(name, model) for model in (network.model, path))
    found = np.concatenate([compiled(dict(feeds))[0] for feeds in network.feeds])
    if any("vnni" in flag for flag in detect_machine().flags):
        assert decibel(wanted, found) == pytest.approx(decibel(wanted, expected), abs=2)
    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) in {"Convolution", "FullyConnected"}
    ]
    assert len(kinds) == {"cnn": 5, "block": 6}[name]
    assert set(kinds) <= {"u8", "i8"}


def test_runtimes_of_targets_that_run_here_are_those_of_the_registry() -> None:
    """A profile of an unknown runtime can be quantised for, not measured."""
    known = BUILDERS.names()
    here = {n for n in target_names() if get_target(n, machine=detect_machine()).runtime in known}
    assert {"arm64", "cpu", "x86-avx2", "x86-vnni"} <= here
    assert not {"web-wasm", "web-webgpu", "rk3588"} & here
