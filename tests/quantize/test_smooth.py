"""Smoothing moves range from activations to weights and leaves the outputs alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.quantize.layers import find_layers, read_array
from equipoise.quantize.smooth import smooth, smoothing_factors

NORMALISED = """
    after_norm (float[batch, tokens, WIDTH] x)
    => (float[batch, tokens, 5] y, float[batch, tokens, WIDTH] z) {
        n = LayerNormalization <axis = -1> (x, gain, shift)
        y = MatMul(n, w)
        v = MatMul(n, u)
        READERS
    }
"""
PLAIN = """
    plain (float[batch, tokens, WIDTH] x) => (float[batch, tokens, 5] y) {
        n = Relu(x)
        y = MatMul(n, w)
    }
"""
ALONE = "z = Relu(v)"
"""Nothing but the two products reads what the LayerNormalization gives."""

SHARED = "z = Add(v, n)"
"""A residual connection reads it too."""


def weights_of(width: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "gain": random.uniform(0.5, 2, size=width),
        "shift": random.normal(size=width),
        "w": random.normal(size=(width, 5)),
        "u": random.normal(size=(width, width)),
    }


def normalised(build, width: int, readers: str = ALONE, **others: np.ndarray):
    text = NORMALISED.replace("WIDTH", str(width)).replace("READERS", readers)
    return build(text, {**weights_of(width), **others})


def factors_of(width: int, seed: int) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(size=width) * 2).astype(np.float32)


def feed(width: int, seed: int = 9) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(2, 3, width)).astype(np.float32)}


@settings(deadline=None, max_examples=15)
@given(
    width=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    readers=st.sampled_from([ALONE, SHARED]),
)
def test_float_outputs_stay(build, run, width: int, seed: int, readers: str) -> None:
    """For any width and any factors over four orders of magnitude."""
    model = normalised(build, width, readers)
    wanted = run(model, feed(width), optimized=False)
    smooth(model, find_layers(model), factors=factors_of(width, seed))
    onnx.checker.check_model(model, full_check=True)
    for name, found in run(model, feed(width), optimized=False).items():
        np.testing.assert_allclose(found, wanted[name], rtol=1e-3, atol=1e-4)


def test_normalisation_takes_the_division_when_it_alone_feeds(build, run) -> None:
    """No node is added, and the activation is divided by the factors."""
    model, factors = normalised(build, 16), factors_of(16, 1)
    gain, nodes = read_array(model, "gain"), len(model.graph.node)
    model.graph.output.add().name = "n"
    before = run(model, feed(16), optimized=False)["n"]
    model.graph.output.pop()
    name = smooth(model, find_layers(model), factors=factors)
    assert (name, len(model.graph.node)) == ("n", nodes)
    np.testing.assert_allclose(read_array(model, "gain"), gain / factors, rtol=1e-6)
    model.graph.output.add().name = "n"
    after = run(model, feed(16), optimized=False)["n"]
    np.testing.assert_allclose(after * factors, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hindrance", ["another reader", "an output", "a shared gain", "one layer"])
def test_normalisation_that_others_need_is_left_alone(build, run, hindrance: str) -> None:
    """One Mul divides instead, and only the products read what it gives."""
    model = normalised(build, 16, SHARED if hindrance == "another reader" else ALONE)
    layers = find_layers(model)
    if hindrance == "an output":
        model.graph.output.add().name = "n"
    if hindrance == "a shared gain":
        node = onnx.helper.make_node("Mul", ["x", "gain"], ["other"], name="other")
        model.graph.node.append(node)
    if hindrance == "one layer":
        layers = layers[:1]
    gain, wanted = read_array(model, "gain").copy(), run(model, feed(16), optimized=False)
    name = smooth(model, layers, factors=factors_of(16, 2))
    assert name != "n"
    np.testing.assert_array_equal(read_array(model, "gain"), gain)
    readers = [node.name for node in model.graph.node if name in node.input]
    assert readers == [layer.name for layer in layers]
    for key, found in run(model, feed(16), optimized=False).items():
        np.testing.assert_allclose(found, wanted[key], rtol=1e-3, atol=1e-4)


def test_activation_without_normalisation_is_multiplied(build, run) -> None:
    """The division is one Mul before the product."""
    model = build(PLAIN.replace("WIDTH", "8"), {"w": weights_of(8)["w"]})
    wanted = run(model, feed(8))["y"]
    assert smooth(model, find_layers(model), factors=factors_of(8, 3)) == "n.smoothed"
    assert [node.op_type for node in model.graph.node] == ["Relu", "Mul", "MatMul"]
    np.testing.assert_allclose(run(model, feed(8))["y"], wanted, rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=50),
    st.floats(0.05, 1),
    st.data(),
)
def test_factors_are_finite_and_of_mean_one(activation, alpha: float, data) -> None:
    """Even where channels, or all of the weights, are zero; no grid is stretched by them."""
    size = len(activation)
    weight = data.draw(st.lists(st.floats(0, 1e3, width=32), min_size=size, max_size=size))
    factors = smoothing_factors(np.array(activation), np.array(weight), alpha=alpha)
    assert factors.dtype == np.float32
    assert (factors > 0).all()
    assert np.isfinite(factors).all()
    assert np.log(factors.astype(np.float64)).mean() == pytest.approx(0, abs=1e-4)


def test_factors_level_the_channels_as_alpha_says() -> None:
    """At 1 all activations become alike, at 0 all weights; between, both follow the formula."""
    random = np.random.default_rng(5)
    seen, read = random.uniform(1, 100, size=30), random.uniform(1, 100, size=30)
    level = seen / smoothing_factors(seen, read, alpha=1.0)
    assert level.max() == pytest.approx(level.min(), rel=1e-5)
    level = read * smoothing_factors(seen, read, alpha=0.0)
    assert level.max() == pytest.approx(level.min(), rel=1e-5)
    found = smoothing_factors(seen, read, alpha=0.7)
    wanted = seen**0.7 / read**0.3
    np.testing.assert_allclose(found / found[0], wanted / wanted[0], rtol=1e-5)
