"""The saturation simulator against brute force, and against ONNX Runtime on a CPU without VNNI."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

from equipoise.parity.compare import ParityMeter
from equipoise.quantize.saturation import (
    cut_off,
    integer_layers,
    saturation,
    simulating,
)
from equipoise.targets.machine import detect_machine

PADDED = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
RUNTIME = """
import sys
import numpy as np
import onnxruntime
for name in sys.argv[2:]:
    for kind, value in (("fast", "0"), ("precise", "1")):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", value)
        path = f"{sys.argv[1]}/{name}"
        session = onnxruntime.InferenceSession(
            f"{path}.onnx", options, providers=["CPUExecutionProvider"]
        )
        (output,) = session.run(None, {"x": np.load(f"{path}.npy")})
        np.save(f"{path}.{kind}.npy", output)
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its input, and what a CPU without VNNI makes of it."""

    model: onnx.ModelProto
    x: np.ndarray
    fast: np.ndarray
    precise: np.ndarray


def layer(
    operator: str, weight: np.ndarray, shape: tuple[int, ...], options: dict | None = None
) -> onnx.ModelProto:
    """One operator between Q/DQ pairs, its weights over the whole range of int8."""
    attributes = dict(options or {})
    kind = attributes.pop("activation", np.uint8)
    rounded = attributes.pop("rounded", True)
    axis = 1 if operator == "MatMul" else 0
    channels = weight.shape[axis]
    constants = {
        "w": weight,
        "w_scale": np.full(channels, 0.01, np.float32),
        "w_zero": np.zeros(channels, weight.dtype),
        "x_scale": np.float32(0.02),
        "x_zero": np.array(13, kind),
        "y_scale": np.float32(0.2),
        "y_zero": np.array(0 if kind == np.int8 else 128, kind),
    }
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
        node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"]),
        node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_dq"], axis=axis),
        node(operator, ["x_dq", "w_dq"], ["y"], name="layer", **attributes),
    ]
    if rounded:
        nodes += [
            node("QuantizeLinear", ["y", "y_scale", "y_zero"], ["y_q"]),
            node("DequantizeLinear", ["y_q", "y_scale", "y_zero"], ["out"]),
        ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out" if rounded else "y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def int8(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).integers(-127, 128, shape).astype(np.int8)


LAYERS: dict[str, tuple[onnx.ModelProto, tuple[int, ...]]] = {
    name: (layer(operator, weight, shape, options), shape)
    for name, operator, weight, shape, options in (
        ("row", "MatMul", int8(37, 5), (1, 37), {}),
        ("product", "MatMul", int8(101, 40), (2, 9, 101), {}),
        ("float-product", "MatMul", int8(64, 16), (5, 64), {"rounded": False}),
        ("gemm", "Gemm", int8(19, 38), (7, 38), {"transB": 1}),
        ("signed", "MatMul", int8(64, 16), (5, 64), {"activation": np.int8}),
        ("pointwise", "Conv", int8(24, 7, 1, 1), (2, 7, 6, 5), {"kernel_shape": [1, 1]}),
        ("conv", "Conv", int8(32, 16, 3, 3), (2, 16, 7, 6), PADDED),
        ("odd", "Conv", int8(9, 3, 3, 3), (1, 3, 9, 9), {**PADDED, "strides": [2, 2]}),
        ("same", "Conv", int8(8, 6, 3, 3), (1, 6, 8, 8), {"auto_pad": "SAME_UPPER"}),
        ("line", "Conv", int8(8, 5, 3), (2, 5, 20), {"dilations": [2], "kernel_shape": [3]}),
        ("grouped", "Conv", int8(12, 3, 3, 3), (1, 12, 7, 7), {**PADDED, "group": 4}),
        ("multiplied", "Conv", int8(8, 1, 3, 3), (1, 4, 7, 7), {**PADDED, "group": 4}),
        ("depthwise", "Conv", int8(16, 1, 3, 3), (1, 16, 7, 7), {**PADDED, "group": 16}),
        ("unrounded", "Conv", int8(16, 4, 3, 3), (1, 4, 7, 7), {**PADDED, "rounded": False}),
        ("signed-conv", "Conv", int8(16, 8, 3, 3), (1, 8, 6, 6), {**PADDED, "activation": np.int8}),
    )
}
EXACT = {"depthwise", "unrounded"}


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, rows: list[np.ndarray]) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self._rows, None)
        return None if row is None else {"x": row}


def network(folder: Path) -> tuple[onnx.ModelProto, np.ndarray]:
    """A small CNN quantised by ONNX Runtime: u8 activations, s8 weights per channel."""
    generator = np.random.default_rng(5)
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        cnn (float[1, 3, 12, 12] x) => (float[1, 10] logits) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            b = Relu(a)
            c = Conv <pads = [1, 1, 1, 1], group = 16> (b, w2, b2)
            d = Relu(c)
            e = Conv(d, w3, b3)
            f = Add(e, b)
            g = Relu(f)
            h = GlobalAveragePool(g)
            i = Flatten(h)
            logits = Gemm <transB = 1> (i, w4, b4)
        }
        """
    )
    shapes = {"w1": (16, 3, 3, 3), "w2": (16, 1, 3, 3), "w3": (16, 16, 1, 1), "w4": (10, 16)}
    for name, shape in shapes.items():
        # Uniform and mostly positive: large neighbours, so that sums overflow.
        weight = generator.uniform(-0.2, 1.0, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
        bias = generator.normal(size=shape[0]).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(bias, name.replace("w", "b")))
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    onnx.save(model, folder / "float.onnx")
    rows = [generator.uniform(0, 1, (1, 3, 12, 12)).astype(np.float32) for _ in range(6)]
    quantization.quantize_static(
        folder / "float.onnx",
        folder / "network.onnx",
        _Reader(rows),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return onnx.load(folder / "network.onnx"), rows[0]


def _without_vnni() -> list[str]:
    """What to put before a command so that it runs on AVX2 without VNNI."""
    machine = detect_machine()
    if machine.architecture != "x86_64":
        pytest.skip("the sums of AVX2 need an x86-64 CPU")
    if "avx2" in machine.flags and not any("vnni" in flag for flag in machine.flags):
        return []
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("this CPU has VNNI, and qemu-x86_64 is not installed to emulate one without")
    return [emulator, "-cpu", "Haswell"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All layers and the network, run by ONNX Runtime on a CPU without VNNI."""
    prefix = _without_vnni()
    folder = tmp_path_factory.mktemp("saturation")
    generator = np.random.default_rng(0)
    made = {
        name: (model, generator.uniform(-0.5, 5, shape).astype(np.float32))
        for name, (model, shape) in LAYERS.items()
    }
    made["network"] = network(folder)
    for name, (model, x) in made.items():
        onnx.save(model, folder / f"{name}.onnx")
        np.save(folder / f"{name}.npy", x)
    (folder / "runtime.py").write_text(RUNTIME)
    command = [*prefix, sys.executable, str(folder / "runtime.py"), str(folder), *made]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return {
        name: Case(
            model=model,
            x=x,
            fast=np.load(folder / f"{name}.fast.npy"),
            precise=np.load(folder / f"{name}.precise.npy"),
        )
        for name, (model, x) in made.items()
    }


def assert_equal_but_ties(found: np.ndarray, wanted: np.ndarray, *, model: onnx.ModelProto) -> None:
    """Equal; one value in 500 may be one step off, where a sum lies halfway between integers."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    last = model.graph.node[-1]
    step = float(constants[last.input[1]]) if last.op_type == "DequantizeLinear" else 0.0
    difference = np.abs(found - wanted)
    assert difference.max() <= step + 2e-5
    assert np.count_nonzero(difference > 2e-5) <= -(-found.size // 500)


@pytest.mark.parametrize("name", [*LAYERS, "network"])
def test_prediction_is_what_the_runtime_gives_without_vnni(cases, name: str) -> None:
    """To the last bit of integers but for ties, to float rounding elsewhere."""
    case = cases[name]
    with simulating(case.model, saturate=True) as run:
        (predicted,) = run({"x": case.x}).values()
    assert_equal_but_ties(predicted, case.fast, model=case.model)


@pytest.mark.parametrize("name", [*LAYERS, "network"])
def test_without_saturation_it_is_what_x64quantprecision_gives(cases, name: str) -> None:
    """The session option and the simulation both compute in exact integers."""
    case = cases[name]
    with simulating(case.model, saturate=False) as run:
        (exact,) = run({"x": case.x}).values()
    assert_equal_but_ties(exact, case.precise, model=case.model)


def test_saturation_changes_what_the_runtime_gives(cases) -> None:
    """Else the tests above would compare equal things: only the exempt layers stay as they are."""
    same = {name for name, case in cases.items() if np.allclose(case.fast, case.precise, atol=1e-4)}
    assert same == EXACT


def test_share_and_noise_are_those_of_the_runtime(cases) -> None:
    """The predicted SQNR of a product in float is the measured one."""
    case = cases["float-product"]
    (found,) = saturation(case.model, [{"x": case.x}], positions=1000)
    meter = ParityMeter("y")
    meter.add(case.precise, case.fast)
    assert found.pairs == 5 * 16 * 32
    assert 0 < found.share < 0.2
    assert found.sqnr_db == pytest.approx(meter.result().sqnr_db, abs=0.01)


def brute_force(patches: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, int]:
    groups, positions, inputs = patches.shape
    excess = np.zeros((groups, positions, rows.shape[1]), dtype=np.int64)
    overflows = 0
    for place in np.ndindex(excess.shape):
        group, position, output = place
        a, w = patches[group, position].astype(int), rows[group, output].astype(int)
        for k in range(0, inputs, 2):
            exact = int(np.dot(a[k : k + 2], w[k : k + 2]))
            cut = min(max(exact, -(1 << 15)), (1 << 15) - 1)
            excess[place] += cut - exact
            overflows += cut != exact
    return excess, overflows


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cut_off_is_that_of_every_pair_by_hand(data: st.DataObject) -> None:
    """For any shape, odd ones too, and any values."""
    groups, positions, outputs, inputs = (data.draw(st.integers(1, n)) for n in (2, 4, 3, 9))
    patches = data.draw(arrays.arrays(np.uint8, (groups, positions, inputs)))
    extreme = st.one_of(st.integers(-128, 127), st.sampled_from([-128, -127, 126, 127]))
    rows = data.draw(arrays.arrays(np.int8, (groups, outputs, inputs), elements=extreme))
    found = cut_off(patches, rows)
    excess, overflows = brute_force(patches, rows)
    np.testing.assert_array_equal(found.excess, excess)
    assert found.overflows == overflows
    assert found.pairs == groups * positions * outputs * -(-inputs // 2)


def test_seven_bit_weights_never_overflow() -> None:
    """255 * 64 twice is the most that fits; that is what reduced range is for."""
    generator = np.random.default_rng(1)
    patches = np.full((1, 3, 64), 255, dtype=np.uint8)
    rows = generator.integers(-64, 65, (1, 50, 64)).astype(np.int8)
    assert cut_off(patches, rows).overflows == 0


def test_only_products_that_saturate_are_listed() -> None:
    """Depthwise convolutions, float layers and unsigned weights have other kernels."""
    for name, (model, _) in LAYERS.items():
        assert bool(integer_layers(model)) == (name not in EXACT), name
    unsigned = layer("MatMul", np.full((8, 4), 200, np.uint8), (2, 8))
    assert integer_layers(unsigned) == ()
    assert saturation(unsigned, [{"x": np.ones((2, 8), np.float32)}]) == ()


def test_fewer_positions_look_at_fewer_pairs() -> None:
    """The bound on memory holds, and what is looked at is a part of the whole."""
    model, shape = LAYERS["conv"]
    rows = [{"x": np.random.default_rng(2).uniform(-0.5, 5, shape).astype(np.float32)}]
    (few,), (most,) = (saturation(model, rows, positions=n) for n in (10, 10_000))
    assert few.pairs == 10 * 32 * 72
    assert most.pairs == 2 * 7 * 6 * 32 * 72
    assert few.share == pytest.approx(most.share, rel=0.5)
