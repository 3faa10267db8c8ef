"""Outlier channels leave the integers, and the outputs stay what they were."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.quantize.layers import find_layers, read_array
from equipoise.quantize.outliers import split_outliers

TEXT = """
    products (float[batch, tokens, WIDTH] x)
    => (float[batch, tokens, 5] y, float[batch, tokens, 7] z) {
        n = Relu(x)
        y = MatMul(n, w)
        raw = MatMul(n, u)
        z = Add(raw, bias)
    }
"""


def products(build, width: int):
    random = np.random.default_rng(width)
    weights = {
        "w": random.normal(size=(width, 5)),
        "u": random.normal(size=(width, 7)),
        "bias": random.normal(size=7),
    }
    return build(TEXT.replace("WIDTH", str(width)), weights)


@settings(deadline=None, max_examples=15)
@given(width=st.integers(1, 40), data=st.data())
def test_float_outputs_stay(build, run, width: int, data) -> None:
    """For any number of channels, in any place, for all products that read them."""
    count = data.draw(st.integers(1, min(width, 6)))
    picked = data.draw(st.permutations(range(width)))[:count]
    channels = np.sort(np.array(picked))
    model = products(build, width)
    feeds = {"x": np.random.default_rng(3).normal(size=(2, 3, width)).astype(np.float32)}
    wanted = run(model, feeds, optimized=False)
    split_outliers(model, find_layers(model), channels=channels)
    onnx.checker.check_model(model, full_check=True)
    for name, found in run(model, feeds, optimized=False).items():
        np.testing.assert_allclose(found, wanted[name], rtol=1e-4, atol=1e-5)


def test_integers_do_not_see_the_outliers(build) -> None:
    """Their weights are zero in the large products, and whole in the thin ones."""
    model = products(build, 32)
    before = {name: read_array(model, name).copy() for name in "wu"}
    split_outliers(model, find_layers(model), channels=np.array([3, 30]))
    for name, output in (("w", "y"), ("u", "raw")):
        left = read_array(model, name)
        assert not left[[3, 30]].any()
        rest = np.delete(np.arange(32), [3, 30])
        np.testing.assert_array_equal(left[rest], before[name][rest])
        thin = read_array(model, f"{output}.outlier_weight")
        np.testing.assert_array_equal(thin, before[name][[3, 30]])


def test_channels_are_gathered_once_for_all_products(build) -> None:
    """Two products share one Gather; each keeps the name of its node and of its output."""
    model = products(build, 32)
    split_outliers(model, find_layers(model), channels=np.array([1]))
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Gather") == 1
    assert operators.count("MatMul") == 4
    assert {"node_y", "node_raw"} <= {node.name for node in model.graph.node}
    assert {"y", "z"} == {value.name for value in model.graph.output}
    assert {layer.name: layer.output for layer in find_layers(model)} == {
        "y.outliers": "y.outliers", "node_y": "y.integers",
        "raw.outliers": "raw.outliers", "node_raw": "raw.integers",
    }  # fmt: skip
