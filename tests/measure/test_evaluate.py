"""Evaluation of an engine on labelled samples: metric, statistics, parity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from equipoise.data.metrics import get_metric
from equipoise.data.store import write_rows
from equipoise.errors import DataError, InputError, ParityError, SourceError
from equipoise.measure.evaluate import EvaluateConfig, evaluate, read_statistics

SAMPLES = 30


@pytest.fixture
def config(linear_onnx: Path, tmp_path: Path) -> EvaluateConfig:
    """Thirty samples with the outputs of the model itself, and labels that are right on 20."""
    x = np.random.default_rng(0).normal(size=(SAMPLES, 1, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(linear_onnx), providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {"x": row})[0] for row in x]
    classes = [int(y.argmax()) for y in outputs]
    labels = [c if i < 20 else (c + 1) % 3 for i, c in enumerate(classes)]
    write_rows(tmp_path / "inputs", [{"x": row} for row in x])
    write_rows(tmp_path / "reference", [{"y": y} for y in outputs])
    write_rows(tmp_path / "labels", [{"label": np.array(v)} for v in labels])
    return EvaluateConfig(
        inputs=tmp_path / "inputs",
        labels=tmp_path / "labels",
        reference=tmp_path / "reference",
        metric="accuracy",
    )


def test_statistics_on_disk_sum_to_the_metric(config: EvaluateConfig, linear_onnx, tmp_path):
    """One row per sample; the reference and the same engine have the same."""
    record = evaluate(replace(config, engine=linear_onnx), output=tmp_path)
    statistics = read_statistics(tmp_path)
    assert (record.value, record.samples) == (pytest.approx(20 / 30), SAMPLES)
    assert statistics.shape == (SAMPLES, 2)
    assert get_metric("accuracy", labels=()).value(statistics.sum(0)) == record.value
    itself = evaluate(config, output=tmp_path)
    assert itself.value == record.value
    np.testing.assert_array_equal(read_statistics(tmp_path), statistics)


def test_engine_is_compared_at_batch_1_and_at_a_larger_batch(config, linear_onnx, tmp_path):
    """Four samples of equal shape, one below the other."""
    record = evaluate(replace(config, engine=linear_onnx), output=tmp_path)
    for (parity,) in (record.parity, record.batch_parity):
        assert parity.name == "y"
        assert parity.max_abs < 1e-5
        assert parity.top1_agreement == 1.0


def test_engine_of_a_fixed_batch_is_not_compared_at_another(config, linear_onnx, tmp_path):
    """Its first dimension is a number."""
    model = onnx.load(linear_onnx)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    record = evaluate(replace(config, engine=tmp_path / "fixed.onnx"), output=tmp_path)
    assert record.parity[0].max_abs < 1e-5
    assert record.batch_parity == ()


def test_engine_that_is_wrong_at_a_larger_batch_alone_is_seen(config, linear_onnx, tmp_path):
    """A mean over the batch is the identity at batch 1."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        wrong (float[batch, 4] x) => (float[batch, 3] y) {
            mean = ReduceMean <keepdims = 1> (x, axes)
            half = Add(x, mean)
            scaled = Mul(half, factor)
            product = MatMul(scaled, w)
            sum = Add(product, b)
            y = Relu(sum)
        }
        """
    )
    model.graph.initializer.extend(onnx.load(linear_onnx).graph.initializer)
    for name, array in (("axes", np.array([0])), ("factor", np.float32([0.5]))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "wrong.onnx")
    record = evaluate(replace(config, engine=tmp_path / "wrong.onnx"), output=tmp_path)
    assert record.parity[0].max_abs < 1e-5
    assert record.batch_parity[0].max_abs > 0.05


def test_labels_and_engines_that_do_not_fit_are_named(config, linear_onnx, conv_onnx, tmp_path):
    """A class that the model does not have, another model, no model; no statistics are left."""
    out = tmp_path / "out"
    out.mkdir()
    right = replace(config, engine=linear_onnx)
    write_rows(tmp_path / "bad", [{"label": np.array(7)}] * SAMPLES)
    with pytest.raises(DataError, match="class 7 is not among its 3 classes"):
        evaluate(replace(right, labels=tmp_path / "bad"), output=out)
    with pytest.raises(InputError, match=r"'x' is float32\[1, 4\]"):
        evaluate(replace(config, engine=conv_onnx), output=out)
    with pytest.raises(SourceError, match=r"none\.onnx"):
        evaluate(replace(config, engine=tmp_path / "none.onnx"), output=out)
    write_rows(tmp_path / "other", [{"y": np.ones((1, 2), np.float32)}] * SAMPLES)
    with pytest.raises(ParityError, match=r"'y' is float32\[1, 3\]; the reference is"):
        evaluate(replace(right, reference=tmp_path / "other"), output=out)
    assert not list(out.iterdir())
