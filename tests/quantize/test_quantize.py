"""int8 schemes on real graphs; and the bug that this project was founded on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

from equipoise.data.store import Rows, write_rows
from equipoise.errors import RecipeError, SourceError
from equipoise.parity.compare import ParityMeter
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.profiling import DESIGNS, ProfileConfig, ProfileRecord, profile
from equipoise.quantize.quantize import QuantizeConfig, _kernel_notes, quantize
from equipoise.quantize.schemes import DynamicInt8, Quantization, StaticInt8, WeightOnlyInt8
from equipoise.quantize.sweeps import Judge, Score
from equipoise.record import dumps, loads
from equipoise.targets.profile import Int8Scheme

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


@dataclass(frozen=True, kw_only=True)
class Case:
    """A float model, calibration samples, what calibration saw, and inputs to compare on."""

    model: Path
    samples: Path
    statistics: Path
    feeds: list[dict[str, np.ndarray]]


def case(folder: Path, model: Path, *, rows: list, feeds: list) -> Case:
    write_rows(folder / "rows", rows)
    config = CalibrateConfig(model=model, samples=folder / "rows")
    calibrate(config, output=folder / "statistics")
    return Case(model=model, samples=folder / "rows", statistics=folder / "statistics", feeds=feeds)


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("block")
    model = attention(folder / "model.onnx")
    return case(folder, model, rows=padded(64), feeds=padded(40))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("pictures")
    rows, feeds = (
        [{"x": GENERATOR.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]
        for count in (64, 20)
    )
    return case(folder, mixed(folder / "mixed.onnx"), rows=rows, feeds=feeds)


def session(path: Path) -> onnxruntime.InferenceSession:
    """With exact int8 sums on every CPU: what saturates without VNNI is not the subject here."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare(float_model: Path, quantized: Path, feeds: list) -> float:
    """SQNR in dB of ``quantized`` against ``float_model``."""
    meter = ParityMeter("output")
    sessions = [session(float_model), session(quantized)]
    for row in feeds:
        meter.add(*(opened.run(None, row)[0] for opened in sessions))
    found = meter.result().sqnr_db
    return 400.0 if found is None else found


def made(folder: Path, given: Case, scheme: Quantization, *, target: Int8Scheme):
    config = QuantizeConfig(
        model=given.model,
        quantization=scheme,
        scheme=target,
        samples=given.samples,
        statistics=given.statistics,
    )
    record = quantize(config, output=folder)
    return folder / record.file, record


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, samples: Path) -> None:
        self._rows = iter(Rows(samples))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rows, None)


def test_mask_constant_destroys_ranges_of_extremes_and_not_ours(block, tmp_path, scheme) -> None:
    """The founding bug: the most negative float is taken for an activation range."""
    plain = tmp_path / "plain.onnx"
    quantization.quantize_static(
        block.model, plain, _Reader(block.samples), per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
    )  # fmt: skip
    assert compare(block.model, plain, block.feeds) < 5
    # Nothing is given back to float for accuracy, and no node is named.
    ours, record = made(tmp_path, block, StaticInt8(min_sqnr_db=-100), target=scheme)
    held = compare(block.model, ours, block.feeds)
    assert held > 20
    assert record.sqnr_db == pytest.approx(held, abs=3)
    assert record.optimized_sqnr_db == pytest.approx(record.sqnr_db, abs=1)


def test_static_int8_says_what_it_did(block, tmp_path, scheme) -> None:
    """Four products with weights in integers, the table too; two products stay, with a reason."""
    stored, record = made(tmp_path, block, StaticInt8(), target=scheme)
    graph = onnx.load(stored).graph
    kept = [node for node in record.float_nodes if node.operator == "MatMul"]
    assert {node.reason for node in kept} == {"a product of two activations rounds both"}
    assert len(kept) == 2
    assert any("2 MatMul (a product of two activations" in note for note in record.notes)
    assert {t.activation for t in record.treatments} == {"x", "normal"}
    small = {t.name for t in graph.initializer if t.data_type == TensorProto.INT8 and t.dims[1:]}
    assert small == {"table.int8", *(f"{name}.quantized" for name in ("wq", "wk", "wv", "head"))}
    large = [t.name for t in graph.initializer if np.prod(t.dims) > 200 and t.data_type == 1]
    assert not large
    assert record.quantized["QuantizeLinear"] == 2


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


def test_weight_only_int8_is_small_and_close(block, pictures, tmp_path: Path, scheme) -> None:
    """Conv, Gemm, MatMul and embeddings keep 35 dB in about a quarter of the bytes."""
    stored, record = made(tmp_path, pictures, WeightOnlyInt8(), target=scheme)
    assert record.notes == ("3 weight tensors stored as int8 and computed in float",)
    assert compare(pictures.model, stored, pictures.feeds) > 35
    assert stored.stat().st_size < pictures.model.stat().st_size * 0.45
    stored, _ = made(tmp_path / "text", block, WeightOnlyInt8(), target=scheme)
    assert compare(block.model, stored, block.feeds) > 30
    assert not any(
        tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) > 1
        and np.prod(tensor.dims) > 255
        for tensor in onnx.load(stored).graph.initializer
    )


def test_dynamic_int8_runs_on_convolutions_and_on_text(block, pictures, tmp_path, scheme) -> None:
    """The file loads in ONNX Runtime and gives the float numbers nearly."""
    stored, record = made(tmp_path, pictures, DynamicInt8(), target=scheme)
    assert "ConvInteger" in record.quantized
    assert compare(pictures.model, stored, pictures.feeds) > 15
    stored, _ = made(tmp_path / "text", block, DynamicInt8(reduce_range=True), target=scheme)
    assert compare(block.model, stored, block.feeds) > 15


@pytest.mark.parametrize("quantization", [DynamicInt8, StaticInt8])
def test_tables_in_blocks_of_four_bits(quantization, block, pictures, tmp_path, scheme) -> None:
    """The products are the same; the table takes about an eighth, and is told; without one: no."""
    usual, _ = made(tmp_path / "usual", block, quantization(), target=scheme)
    stored, record = made(tmp_path, block, quantization(tables="blocks"), target=scheme)
    table = [t for t in onnx.load(stored).graph.initializer if t.name.startswith("table")]
    assert 0 < sum(len(t.raw_data) for t in table) < 0.2 * 4 * VOCABULARY * WIDTH
    assert record.quantized["GatherBlockQuantized"] == 1
    assert compare(block.model, stored, block.feeds) > 12
    assert compare(usual, stored, block.feeds) > 12
    assert any("1 tables stored in blocks" in note for note in record.notes)
    with pytest.raises(RecipeError, match="no table that can be stored in blocks"):
        made(tmp_path, pictures, quantization(tables="blocks"), target=scheme)


def test_nodes_are_timed_by_a_stage_of_its_own(pictures, tmp_path: Path, scheme) -> None:
    """Where something has to go back to float; the answer is chosen by what that stage says."""
    _, plain = made(tmp_path / "plain", pictures, StaticInt8(min_sqnr_db=-100), target=scheme)
    wanted_db = plain.sqnr_db + 3
    config = QuantizeConfig(
        model=pictures.model,
        quantization=StaticInt8(min_sqnr_db=wanted_db),
        scheme=scheme,
        samples=pictures.samples,
        statistics=pictures.statistics,
        apart=True,
    )
    asked = quantize(config, output=tmp_path / "first")
    assert (asked.file, asked.quantized) == ("", {})
    designs = tmp_path / "first" / DESIGNS
    found = profile(ProfileConfig(designs=designs, machine="this"), output=tmp_path / "none")
    assert {len(opening) for opening in found.openings} == {len(list(designs.glob("*.onnx")))}
    answered = loads(ProfileRecord, dumps(found), where="text")
    assert answered == found
    chosen = quantize(replace(config, profile=answered), output=tmp_path / "second")
    assert chosen.float_nodes
    assert chosen.sqnr_db is None or chosen.sqnr_db >= wanted_db
    enough = replace(config, quantization=StaticInt8(min_sqnr_db=10.0))
    assert quantize(enough, output=tmp_path / "third").file


@pytest.mark.parametrize("bits", [8, 7])
def test_static_int8_of_a_cnn_holds(bits, pictures, tmp_path: Path, scheme) -> None:
    """Per channel, in eight and in seven bits, and every weight in int8."""
    settings = StaticInt8(weight_bits=bits)
    stored, record = made(tmp_path, pictures, settings, target=scheme)
    assert compare(pictures.model, stored, pictures.feeds) > 30
    weights = [
        numpy_helper.to_array(t)
        for t in onnx.load(stored).graph.initializer
        if t.data_type == TensorProto.INT8 and len(t.dims) > 1
    ]
    assert len(weights) == 3
    assert {np.abs(w.astype(int)).max() for w in weights} == {2 ** (bits - 1) - 1}
    assert record.float_nodes == ()


SCHEMES = {
    "arm": {"activation": "int8"},
    "symmetric": {"activation": "int8", "symmetric": True},
    "power of two": {"activation": "int8", "symmetric": True, "power_of_two": True},
    "per tensor": {"per_channel": False},
    "float bias": {"bias": "float"},
    "inputs alone": {
        "activation": "int8", "symmetric": True, "bias": "float", "quantize_outputs": False,
        "absorbs_clips": False, "joins": (),
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", SCHEMES.values(), ids=SCHEMES)
def test_schemes_of_targets_are_kept(changes, pictures, tmp_path: Path, scheme) -> None:
    """Types, grids and placement are what the target asks for, and the outputs still hold."""
    target = replace(scheme, **changes)
    stored, _ = made(tmp_path, pictures, StaticInt8(min_sqnr_db=0), target=target)
    assert compare(pictures.model, stored, pictures.feeds) > 20
    graph = onnx.load(stored).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    points = [arrays[node.input[2]] for node in pairs]
    assert {str(point.dtype) for point in points} == {target.activation}
    if target.symmetric:
        assert not any(point.any() for point in points)
    if target.power_of_two:
        exponents = np.log2([arrays[node.input[1]] for node in pairs])
        assert (exponents == np.rint(exponents)).all()
    weights = [a for a in arrays.values() if a.dtype == np.int8 and a.ndim > 1]
    assert len(weights) == 3
    biases = [a for a in arrays.values() if a.dtype == np.int32 and a.any()]
    assert bool(biases) is (target.bias == "int32")
    names = {node.input[0].removesuffix(".smoothed") for node in pairs}
    # A symmetric grid does not end at zero, so that the Relu stays and is rounded after.
    between = {"b", "c"} | ({"a"} if target.symmetric else set())
    assert names == {"x", "d", "e"} | (between if target.quantize_outputs else set())


def test_saturating_target_narrows_the_layers_that_need_it(pictures, tmp_path, scheme) -> None:
    """And says which; a target that adds in 32 bits is not told anything."""
    target = replace(scheme, saturates=True)
    _, record = made(tmp_path, pictures, StaticInt8(), target=target)
    assert any("7-bit weights" in n or "no layer saturates" in n for n in record.notes)
    _, record = made(tmp_path, pictures, StaticInt8(), target=scheme)
    assert not any("saturate" in n or "7-bit" in n for n in record.notes)


@pytest.mark.parametrize("made_by", [StaticInt8(), DynamicInt8(), WeightOnlyInt8()])
def test_quantised_model_is_refused(made_by, pictures, tmp_path: Path, scheme) -> None:
    """By every scheme, with what gives it away; quantising twice would lose twice."""
    stored, _ = made(tmp_path / "once", pictures, made_by, target=scheme)
    again = replace(pictures, model=stored)
    for method in (StaticInt8(), DynamicInt8(), WeightOnlyInt8()):
        with pytest.raises(SourceError, match=r"quantised already: it has .*Linear"):
            made(tmp_path / "twice", again, method, target=scheme)
    assert not (tmp_path / "twice").exists()


def test_named_nodes_stay_in_float(pictures, tmp_path: Path, scheme) -> None:
    """They are told apart from what was left in float for other reasons."""
    stored, record = made(tmp_path, pictures, StaticInt8(float_nodes=("Conv_0",)), target=scheme)
    assert [(n.name, n.reason) for n in record.float_nodes] == [
        ("Conv_0", "named to stay in float")
    ]
    graph = onnx.load(stored).graph
    kernel = next(t for t in graph.initializer if t.name == "kernel")
    assert kernel.data_type == TensorProto.FLOAT
    assert compare(pictures.model, stored, pictures.feeds) > 30


def test_kernels_that_compute_something_else_are_refused_or_told() -> None:
    """Twice the noise is a note; outputs of another model are an error."""
    wrong = Judge(feeds=[{}], references=[{"y": np.ones(3)}])
    assert wrong.compare(lambda _: {"y": np.ones(3)}).sqnr_db is None
    scores = [Score(sqnr_db=value, cosine=1.0) for value in (30.0, 20.0, None)]
    note = _kernel_notes((scores[0], scores[1]))
    assert note == (
        "as written the outputs keep 30.0 dB; with the runtime's optimised kernels 20.0 dB",
    )
    assert _kernel_notes((scores[2], scores[1]))[0].startswith("as written the outputs keep every")
    assert _kernel_notes((scores[1], scores[0])) == _kernel_notes((scores[1], scores[2])) == ()


def test_model_without_weights_has_nothing_to_quantise(pictures, tmp_path, scheme) -> None:
    """The scheme is named, and no file is left."""
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    shape = ["n", 3, 8, 8]
    inputs = [("x", TensorProto.FLOAT, shape)]
    model = save(tmp_path / "m.onnx", nodes, inputs, [("y", shape)], {})
    bare = replace(pictures, model=model)
    out = tmp_path / "out"
    for method in (WeightOnlyInt8(), StaticInt8()):
        with pytest.raises(RecipeError, match=f"'{method.kind}'"):
            made(out, bare, method, target=scheme)
    with pytest.raises(RecipeError, match="calibrated ranges"):
        made(out, replace(pictures, statistics=None), StaticInt8(), target=scheme)
    with pytest.raises(SourceError, match=r"none\.onnx"):
        made(out, replace(bare, model=tmp_path / "none.onnx"), WeightOnlyInt8(), target=scheme)
    assert not out.exists()
