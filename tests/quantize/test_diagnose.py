"""Finding the node that does the damage, on models in which it is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

from equipoise import onnxio, record
from equipoise.data.store import Rows, write_rows
from equipoise.errors import DataError, SourceError, UsageError
from equipoise.quantize.diagnose import DiagnoseConfig, Diagnosis, diagnose, form_of
from equipoise.quantize.noise import tensor_noise
from equipoise.quantize.observe import observing
from equipoise.quantize.pairs import (
    PAIR,
    only,
    quantized_nodes,
    restore_weight,
    wiring,
    with_originals,
    without,
)
from equipoise.quantize.rewritten import node_times, plain_name, rewritten_graph
from equipoise.quantize.sweeps import Damage, Judge, Score, noise_power, standing_out, sweep

OUTLIER, LOUD = 7, 300.0


def _save(text: str, weights: dict[str, np.ndarray], path: Path) -> Path:
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        tensor = numpy_helper.from_array(array.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    onnx.save(model, path)
    return path


def outlier_model(path: Path) -> Path:
    """Three products; the middle one reads a tensor with one channel 300 times too loud."""
    generator = np.random.default_rng(0)
    gain = np.ones(32)
    gain[OUTLIER] = LOUD
    weights = {
        "w1": generator.normal(size=(16, 32)) / 4,
        "gain": gain,
        "w2": generator.normal(size=(32, 32)) / 6 / gain[:, None],
        "w3": generator.normal(size=(32, 4)) / 6,
    }
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        outlier (float[batch, 16] x) => (float[batch, 4] logits) {
            first = MatMul(x, w1)
            loud = Mul(first, gain)
            second = MatMul(loud, w2)
            shown = Relu(second)
            logits = MatMul(shown, w3)
        }
    """
    return _save(text, weights, path)


def cnn_model(path: Path) -> Path:
    """Convolutions with activations that a quantiser absorbs."""
    generator = np.random.default_rng(1)
    weights = {
        "w1": generator.normal(size=(8, 3, 3, 3)) / 4,
        "b1": generator.normal(size=8) / 4,
        "w2": generator.normal(size=(8, 8, 1, 1)) / 2,
        "b2": generator.normal(size=8) / 4,
        "w3": generator.normal(size=(8, 5)),
        "low": np.array(0.0),
        "high": np.array(1.5),
    }
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        cnn (float[batch, 3, 8, 8] x) => (float[batch, 5] logits) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            b = Relu(a)
            c = Conv(b, w2, b2)
            d = Clip(c, low, high)
            e = Add(d, b)
            f = GlobalAveragePool(e)
            g = Flatten(f)
            logits = MatMul(g, w3)
        }
    """
    return _save(text, weights, path)


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, rows: list[np.ndarray]) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self._rows, None)
        return None if row is None else {"x": row}


def quantize(model: Path, rows: list[np.ndarray], *, form: str = "QDQ") -> Path:
    path = model.with_name(f"{model.stem}-{form}.onnx")
    quantization.quantize_static(
        model,
        path,
        _Reader(rows),
        quant_format=quantization.QuantFormat[form],
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return path


def configured(folder: Path, model: Path, rows: list[np.ndarray]) -> DiagnoseConfig:
    write_rows(folder / "rows", ({"x": row} for row in rows))
    return DiagnoseConfig(
        model=model,
        quantized=quantize(model, rows),
        samples=folder / "rows",
        count=12,
        budget_s=60,
        runs=3,
    )


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> DiagnoseConfig:
    folder = tmp_path_factory.mktemp("outlier")
    generator = np.random.default_rng(2)
    rows = [generator.normal(size=(1, 16)).astype(np.float32) for _ in range(40)]
    config = configured(folder, outlier_model(folder / "model.onnx"), rows)
    labels = _run(onnxio.load_model(config.model), Rows(config.samples)).argmax(-1)
    write_rows(folder / "labels", ({"label": np.array(label)} for label in labels))
    return replace(config, labels=folder / "labels", metric="accuracy")


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> DiagnoseConfig:
    folder = tmp_path_factory.mktemp("cnn")
    generator = np.random.default_rng(3)
    rows = [generator.uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32) for _ in range(24)]
    return configured(folder, cnn_model(folder / "model.onnx"), rows)


@pytest.fixture(scope="module")
def found(outlier: DiagnoseConfig) -> Diagnosis:
    return diagnose(outlier)


def _run(model: onnx.ModelProto, rows: Rows) -> np.ndarray:
    with observing(model, ["logits"]) as observe:
        return np.concatenate([observe(row)["logits"] for row in rows])


def _models(config: DiagnoseConfig) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    return onnxio.load_model(config.model), onnxio.load_model(config.quantized)


def test_the_loud_tensor_is_blamed(found: Diagnosis) -> None:
    """Both nodes that touch it come first, and leaving them in float helps by a lot."""
    assert found.damage is not None
    assert {damage.name for damage in found.damage.nodes[:2]} == {"node_loud", "node_second"}
    assert set(found.damage.exclude) == {"node_loud", "node_second"}
    assert found.damage.excluded is not None
    assert found.damage.excluded.sqnr_db > found.score.sqnr_db + 10


def test_the_outlier_channel_is_named(found: Diagnosis) -> None:
    """With its index and how much louder it is than the median channel."""
    tensor = next(t for t in found.tensors if t.name == "loud")
    assert tensor.channel == OUTLIER
    assert LOUD / 3 < tensor.outlier < LOUD * 3
    quiet = next(t for t in found.tensors if t.name == "first")
    assert quiet.outlier < 3
    assert quiet.rounding_db > tensor.rounding_db


def test_sparing_and_isolating_agree(found: Diagnosis) -> None:
    """The worst node alone is as noisy as the whole, and without it the noise is gone."""
    assert found.damage is not None
    worst = found.damage.nodes[0]
    assert worst.alone.sqnr_db == pytest.approx(found.score.sqnr_db, abs=3)
    assert worst.spared is not None
    assert worst.spared.sqnr_db > found.score.sqnr_db + 10
    assert found.damage.operators[0].name in {"Mul", "MatMul"}


def test_metric_is_measured_beside_sqnr(found: Diagnosis) -> None:
    """Labels are the float model's own decisions, so it has accuracy 1 and noise costs some."""
    assert found.float_metric == 1.0
    assert found.score.metric is not None
    assert found.damage is not None
    assert all(d.alone.metric is not None for d in found.damage.nodes)


def test_record_survives_json(found: Diagnosis) -> None:
    """What is written is what is read."""
    assert record.loads(Diagnosis, record.dumps(found), where="diagnosis") == found


@pytest.mark.parametrize("which", ["outlier", "cnn"])
def test_all_in_float_is_the_float_model_and_none_the_quantised(which: str, request) -> None:
    """The ends of both sweeps are the two models themselves."""
    config = request.getfixturevalue(which)
    original, quantized = _models(config)
    whole, rows = with_originals(quantized, original), Rows(config.samples)
    names = [node.name for node in quantized_nodes(whole)]
    wanted, given = _run(original, rows), _run(quantized, rows)
    for model in (without(whole, names), only(whole, ())):
        assert not any(node.op_type in PAIR for node in model.graph.node)
        np.testing.assert_allclose(_run(model, rows), wanted, atol=1e-5)
    step = 0.2 * np.abs(wanted - given).max()
    for model in (whole, without(whole, ()), only(whole, names)):
        np.testing.assert_allclose(_run(model, rows), given, atol=step)


def test_absorbed_activations_come_back(cnn: DiagnoseConfig) -> None:
    """Without them a bypassed pair would let through what a Relu or Clip had cut."""
    original, quantized = _models(cnn)
    kinds = {node.op_type for node in quantized.graph.node}
    assert "Relu" not in kinds
    whole = with_originals(quantized, original)
    assert {"Relu", "Clip"} <= {node.op_type for node in whole.graph.node}
    onnx.checker.check_model(whole)
    noise = tensor_noise(original, whole, rows=list(Rows(cnn.samples))[:4])
    assert all(t.sqnr_db is None or t.sqnr_db > 15 for t in noise)


def test_sparing_one_node_leaves_the_others_quantised(cnn: DiagnoseConfig) -> None:
    """Only the pairs and weights that touch it are gone."""
    whole = with_originals(*reversed(_models(cnn)))
    spared = without(whole, ["node_c"])
    names = {node.name for node in quantized_nodes(spared)}
    assert "node_c" not in names
    assert {"node_a", "node_logits"} <= names
    onnx.checker.check_model(spared)


def test_a_scaled_weight_stays_as_quantised(outlier: DiagnoseConfig) -> None:
    """A pass that moved scale between layers makes the float model's weight the wrong one."""
    original, quantized = _models(outlier)
    wires = wiring(quantized)
    node = next(n for n in quantized.graph.node if n.name == "node_first")
    tensor = next(t for t in original.graph.initializer if t.name == "w1")
    before = numpy_helper.to_array(tensor)
    scaled = numpy_helper.from_array(before * np.float32(1.5), "scaled")
    for given, same in ((tensor, True), (scaled, False)):
        model = onnx.ModelProto()
        model.CopyFrom(quantized)
        name = restore_weight(model, wires.weight(node.input[1]), original=given)
        restored = numpy_helper.to_array(onnxio.initializers(model)[name])
        assert np.array_equal(restored, before) == same
        np.testing.assert_allclose(restored, before, atol=np.abs(before).max() / 120)


@pytest.mark.parametrize("form", ["qoperator", "dynamic"])
def test_other_forms_get_outputs_and_a_clear_word(
    form: str, outlier: DiagnoseConfig, tmp_path: Path
) -> None:
    """Without Q/DQ pairs no node can be taken out, and the diagnosis says so."""
    rows = [row["x"] for row in Rows(outlier.samples)]
    if form == "qoperator":
        path = quantize(outlier.model, rows, form="QOperator")
    else:
        path = tmp_path / "dynamic.onnx"
        quantization.quantize_dynamic(outlier.model, path)
    assert form_of(onnxio.load_model(path)) == form
    made = diagnose(replace(outlier, quantized=path))
    assert made.form == form
    assert made.damage is None
    assert made.outputs[0].sqnr_db is not None
    assert "no node can be taken out" in made.notes[0]


def island_model(path: Path) -> Path:
    """An Erf between a DequantizeLinear and a QuantizeLinear: no runtime has it in integers."""
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["a"], name="q1"),
        node("DequantizeLinear", ["a", "s", "z"], ["b"], name="d1"),
        node("Erf", ["b"], ["c"], name="bent"),
        node("QuantizeLinear", ["c", "s", "z"], ["d"], name="q2"),
        node("DequantizeLinear", ["d", "s", "z"], ["y"], name="d2"),
    ]
    shape = ["batch", 8]
    graph = helper.make_graph(
        nodes,
        "island",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(np.float32(0.01), "s"),
            numpy_helper.from_array(np.uint8(128), "z"),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def test_islands_are_counted_in_the_rewritten_graph(tmp_path: Path, cnn: DiagnoseConfig) -> None:
    """A node in float between Q and DQ is one; a convolution that was merged is none."""
    graph = rewritten_graph(island_model(tmp_path / "island.onnx"))
    assert graph.islands == ("bent",)
    assert len(graph.pairs) == 4
    merged = rewritten_graph(cnn.quantized)
    assert merged.operators["QLinearConv"] == 2
    assert not {"node_a", "node_c"} & {*merged.islands, *merged.fallbacks}


def test_times_meet_under_the_name_in_the_file(cnn: DiagnoseConfig) -> None:
    """Whatever each runtime's rewriting made of the names, a convolution has both times."""
    feeds = list(Rows(cnn.samples))[:2]
    times = {t.name: t for t in node_times(cnn.model, cnn.quantized, feeds=feeds, runs=3)}
    for name in ("node_a", "node_c"):
        assert times[name].operator == "QLinearConv"
        assert times[name].float_ms > 0
        assert times[name].quantized_ms > 0
    assert plain_name("conv_token_12") == plain_name("conv_nchwc") == "conv"


def test_the_budget_bounds_the_sweep(outlier: DiagnoseConfig) -> None:
    """Next to no time is enough for one node and no more."""
    original, quantized = _models(outlier)
    rows = [Rows(outlier.samples)[0]]
    judge = Judge(feeds=rows, references=[{"logits": _run(original, rows)}])
    groups = {name: (name,) for name in ("node_loud", "node_first", "node_logits")}
    damages = sweep(with_originals(quantized, original), groups, judge=judge, budget_s=1e-9)
    assert [damage.name for damage in damages] == ["node_loud"]


def _damage(name: str, sqnr_db: float) -> Damage:
    score = Score(sqnr_db=sqnr_db, cosine=1.0)
    return Damage(name=name, operator="MatMul", nodes=1, alone=score, spared=None)


def test_standing_out_stops_at_enough_and_at_equals() -> None:
    """Two loud nodes are taken; a crowd of equals has nobody to blame."""
    loud = [_damage("a", 5.0), _damage("b", 9.0), *(_damage(f"c{i}", 45.0) for i in range(20))]
    assert standing_out(loud, whole=Score(sqnr_db=3.5, cosine=0.9)) == ("a", "b")
    equal = [_damage(f"c{i}", 30.0) for i in range(40)]
    assert standing_out(equal, whole=Score(sqnr_db=14.0, cosine=0.99)) == ()
    assert noise_power(Score(sqnr_db=None, cosine=1.0)) == 0


def test_bad_input_is_refused_by_name(outlier: DiagnoseConfig, tmp_path: Path) -> None:
    """Models in the wrong order, settings out of range, labels that are missing."""
    swapped = replace(outlier, model=outlier.quantized, quantized=outlier.model)
    with pytest.raises(SourceError, match="is quantised itself"):
        diagnose(swapped)
    with pytest.raises(SourceError, match="has no quantised node"):
        diagnose(replace(outlier, quantized=outlier.model))
    with pytest.raises(UsageError, match="needs labels"):
        diagnose(replace(outlier, labels=None))
    for change in ({"count": 0}, {"runs": 0}, {"budget_s": 0.0}):
        with pytest.raises(UsageError, match="must be"):
            diagnose(replace(outlier, **change))
    write_rows(tmp_path / "labels", [{"label": np.array(0)}])
    with pytest.raises(DataError, match="1 labels for 12 samples"):
        diagnose(replace(outlier, labels=tmp_path / "labels"))
