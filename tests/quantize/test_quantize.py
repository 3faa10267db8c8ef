"""int8 schemes on real graphs; and the bug that this project was founded on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from equipoise.data.store import write_rows
from equipoise.errors import RecipeError, SourceError
from equipoise.parity.compare import ParityMeter
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.schemes import DynamicInt8, StaticInt8, WeightOnlyInt8

WIDTH, HEADS, VOCABULARY = 32, 4, 50
GENERATOR = np.random.default_rng(0)


def save(path: Path, nodes, inputs, outputs, weights: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def attention(path: Path) -> Path:
    """Embedding, one attention block with a mask of the most negative float, and a head."""
    lowest = float(np.finfo(np.float32).min)
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["x"]),
        *(node("MatMul", ["x", f"w{n}"], [n]) for n in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["raw"]),
        node("Mul", ["raw", "root"], ["scores"]),
        node("Cast", ["mask"], ["kept"], to=TensorProto.FLOAT),
        node("Sub", ["one", "kept"], ["dropped"]),
        node("Mul", ["dropped", "lowest"], ["far"]),
        node("Unsqueeze", ["far", "axis"], ["wide"]),
        node("Add", ["scores", "wide"], ["masked"]),
        node("Softmax", ["masked"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["mixed"]),
        node("Add", ["x", "mixed"], ["residual"]),
        node("LayerNormalization", ["residual", "gain", "shift"], ["normal"], axis=-1),
        node("MatMul", ["normal", "head"], ["logits"]),
    ]
    weight = {
        "table": GENERATOR.normal(size=(VOCABULARY, WIDTH)),
        **{f"w{n}": GENERATOR.normal(size=(WIDTH, WIDTH)) * 0.3 for n in "qkv"},
        "head": GENERATOR.normal(size=(WIDTH, 6)),
        "root": np.array(WIDTH**-0.5), "one": np.array(1.0), "lowest": np.array(lowest),
        "gain": np.ones(WIDTH), "shift": np.zeros(WIDTH),
    }  # fmt: skip
    arrays = {name: array.astype(np.float32) for name, array in weight.items()}
    arrays["axis"] = np.array([1], dtype=np.int64)
    shape = ["batch", "sequence"]
    inputs = [("ids", TensorProto.INT64, shape), ("mask", TensorProto.INT64, shape)]
    return save(path, nodes, inputs, [("logits", [*shape, 6])], arrays)


def padded(count: int) -> list[dict[str, np.ndarray]]:
    """Sentences of 3 to 12 tokens, padded to 12."""
    rows = []
    for _ in range(count):
        length = int(GENERATOR.integers(3, 13))
        mask = (np.arange(12) < length).astype(np.int64)[None]
        rows.append({"ids": GENERATOR.integers(0, VOCABULARY, size=(1, 12)) * mask, "mask": mask})
    return rows


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list]:
    """Model, calibrated ranges, and inputs to compare on."""
    folder = tmp_path_factory.mktemp("block")
    model = attention(folder / "model.onnx")
    write_rows(folder / "rows", padded(64))
    (folder / "ranges").mkdir()
    calibrate(CalibrateConfig(model=model, samples=folder / "rows"), output=folder / "ranges")
    return model, folder / "ranges", padded(40)


def session(path: Path) -> onnxruntime.InferenceSession:
    """With exact int8 sums on every CPU: what saturates without VNNI is not the subject here."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare(left: Path, right: Path, feeds: list) -> float:
    """SQNR in dB of ``right`` against ``left``."""
    meter = ParityMeter("output")
    sessions = [session(left), session(right)]
    for row in feeds:
        meter.add(*(opened.run(None, row)[0] for opened in sessions))
    found = meter.result().sqnr_db
    return 400.0 if found is None else found


def made(folder: Path, model: Path, scheme, ranges: Path | None = None):
    record = quantize(
        QuantizeConfig(model=model, quantization=scheme, ranges=ranges), output=folder
    )
    return folder / record.file, record


def test_mask_constant_destroys_plain_static_int8_and_the_guard_saves_it(block, tmp_path) -> None:
    """The founding bug: the most negative float is taken for an activation range."""
    model, ranges, feeds = block
    plain, told = made(tmp_path, model, StaticInt8(), ranges)
    collapsed = compare(model, plain, feeds)
    (tmp_path / "guarded").mkdir()
    guarded, kept = made(tmp_path / "guarded", model, StaticInt8(guarded=True), ranges)
    held = compare(model, guarded, feeds)
    assert collapsed < 5
    assert held > 20
    assert any("mask constant was taken as activation range" in note for note in told.notes)
    assert any("mask constant" in node.reason for node in kept.float_nodes)


def test_guard_leaves_products_of_weights_in_integers(block, tmp_path) -> None:
    """What stays in float is what is fragile; the four weighted products are quantised."""
    model, ranges, _ = block
    _, record = made(tmp_path, model, StaticInt8(guarded=True), ranges)
    in_float = {node.operator for node in record.float_nodes}
    assert {"Softmax", "LayerNormalization", "Add"} <= in_float
    assert sum(node.operator == "MatMul" for node in record.float_nodes) == 2
    assert record.quantized["QuantizeLinear"] > 0


def test_predicted_signal_to_noise_is_what_rounding_gives() -> None:
    """The formula agrees with rounding the values, for a wide and for an outlier-ridden tensor."""
    from equipoise.quantize.calibrate import TensorRange

    for values in (GENERATOR.normal(size=9999), np.append(GENERATOR.normal(size=9999), 300.0)):
        low, high = float(values.min()), float(values.max())
        power = float(np.square(values).mean())
        predicted = TensorRange(
            low=low, high=high, mean_square=power, count=values.size, non_finite=0
        ).int8_sqnr_db
        step = (max(high, 0) - min(low, 0)) / 255
        noise = np.rint(values / step) * step - values
        assert predicted == pytest.approx(10 * np.log10(power / np.square(noise).mean()), abs=1.0)


def mixed(path: Path) -> Path:
    """One of each operator with weights: Conv, Gemm with transB, MatMul."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "kernel"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("GlobalAveragePool", ["b"], ["c"]),
        node("Flatten", ["c"], ["d"]),
        node("Gemm", ["d", "dense", "bias"], ["e"], transB=1),
        node("MatMul", ["e", "head"], ["y"]),
    ]
    weights = {
        "kernel": GENERATOR.normal(size=(32, 3, 3, 3)), "dense": GENERATOR.normal(size=(64, 32)),
        "bias": GENERATOR.normal(size=64), "head": GENERATOR.normal(size=(64, 10)),
    }  # fmt: skip
    arrays = {n: a.astype(np.float32) for n, a in weights.items()}
    inputs = [("x", TensorProto.FLOAT, ["batch", 3, 8, 8])]
    return save(path, nodes, inputs, [("y", ["batch", 10])], arrays)


def test_weight_only_int8_is_small_and_close(block, tmp_path: Path) -> None:
    """Conv, Gemm, MatMul and embeddings keep 35 dB in about a quarter of the bytes."""
    model = mixed(tmp_path / "mixed.onnx")
    images = [{"x": GENERATOR.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(20)]
    stored, record = made(tmp_path, model, WeightOnlyInt8())
    assert record.notes == ("3 weight tensors stored as int8 and computed in float",)
    assert compare(model, stored, images) > 35
    assert stored.stat().st_size < model.stat().st_size * 0.45
    text, _, feeds = block
    (tmp_path / "text").mkdir()
    stored, _ = made(tmp_path / "text", text, WeightOnlyInt8())
    assert compare(text, stored, feeds) > 30
    assert not any(
        tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) > 1
        and np.prod(tensor.dims) > 255
        for tensor in onnx.load(stored).graph.initializer
    )


def test_dynamic_int8_runs_on_convolutions_and_on_text(block, tmp_path: Path) -> None:
    """The file loads in ONNX Runtime and gives the float numbers nearly."""
    model = mixed(tmp_path / "mixed.onnx")
    images = [{"x": GENERATOR.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(10)]
    stored, record = made(tmp_path, model, DynamicInt8())
    assert "ConvInteger" in record.quantized
    assert compare(model, stored, images) > 15
    text, _, feeds = block
    stored, _ = made(tmp_path, text, DynamicInt8(reduce_range=True))
    assert compare(text, stored, feeds) > 15


def test_static_int8_of_a_cnn_holds(tmp_path: Path) -> None:
    """Per channel, eight and seven bits, and every weight in int8."""
    model = mixed(tmp_path / "mixed.onnx")
    images = [{"x": GENERATOR.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(40)]
    write_rows(tmp_path / "rows", images)
    (tmp_path / "ranges").mkdir()
    calibrate(CalibrateConfig(model=model, samples=tmp_path / "rows"), output=tmp_path / "ranges")
    for scheme in (StaticInt8(), StaticInt8(reduce_range=True), StaticInt8(guarded=True)):
        stored, _ = made(tmp_path, model, scheme, tmp_path / "ranges")
        assert compare(model, stored, images) > 15
    stored, _ = made(tmp_path, model, StaticInt8(reduce_range=True), tmp_path / "ranges")
    int8 = [
        numpy_helper.to_array(t)
        for t in onnx.load(stored).graph.initializer
        if t.data_type == TensorProto.INT8 and len(t.dims) > 1
    ]
    assert len(int8) == 3
    assert all(np.abs(a.astype(int)).max() <= 64 for a in int8)


def test_model_without_weights_has_nothing_to_quantise(tmp_path: Path) -> None:
    """The scheme is named, and no file is left."""
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    shape = ["n", 4]
    model = save(tmp_path / "m.onnx", nodes, [("x", TensorProto.FLOAT, shape)], [("y", shape)], {})
    with pytest.raises(RecipeError, match="'weight-only'"):
        made(tmp_path / "out", model, WeightOnlyInt8())
    with pytest.raises(RecipeError, match="calibrated ranges"):
        made(tmp_path / "out", model, StaticInt8())
    with pytest.raises(SourceError, match=r"none\.onnx"):
        made(tmp_path / "out", tmp_path / "none.onnx", WeightOnlyInt8())
    assert not (tmp_path / "out").exists()
