"""Which nodes run in integers, and the reasons of those that do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from equipoise.quantize.nodes import Choice, integer_nodes
from equipoise.targets.profile import ORT_JOINS

RANDOM = np.random.default_rng(0)
ROWS = [{"x": RANDOM.normal(size=(1, 4, 6, 6)).astype(np.float32)} for _ in range(4)]
TOKENS = [{"x": RANDOM.normal(size=(1, 5, 8)).astype(np.float32)} for _ in range(4)]


def kernel(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape) / 3


SQUARE = kernel(4, 4, 1, 1)
KERNELS = {f"w{i}": kernel(4, 4, 3, 3) for i in range(1, 4)}


def picture(body: str) -> str:
    return f"""
        picture (float[batch, 4, 6, 6] x) => (float[batch, 4, height, width] y) {{
            a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            {body}
        }}
    """


def text(body: str) -> str:
    return f"tokens (float[batch, 5, 8] x) => (float[batch, 5, n] y) {{ {body} }}"


@pytest.fixture
def choose(build, calibrated, scheme):
    def chosen(graph: str, weights, rows=ROWS, *, joins=ORT_JOINS) -> tuple[Choice, set[str]]:
        """The choice, and the outputs of the nodes in integers."""
        used = {name: array for name, array in weights.items() if name in graph}
        model = build(graph, used)
        seen = calibrated(model, rows).statistics
        found = integer_nodes(model, seen, scheme=replace(scheme, joins=joins))
        assert found.nodes <= {node.name for node in model.graph.node}
        assert not found.nodes & {node.name for node in found.kept}
        return found, {name.removeprefix("node_") for name in found.nodes}

    return chosen


def reasons(found: Choice) -> dict[str, str]:
    return {node.name.removeprefix("node_"): node.reason for node in found.kept}


GATE = """
    p = GlobalAveragePool(a)
    q = Conv(p, s1)
    r = Relu(q)
    t = Conv(r, s2)
    u = Sigmoid(t)
    v = Mul(a, u)
    y = Conv(v, w2)
"""
BLOCKS = {
    "residual": ("b = Conv <pads = [1, 1, 1, 1]> (a, w2) c = Add(a, b) y = Conv(c, w3)", "abcy"),
    "concat": (
        "b = Conv <pads = [1, 1, 1, 1]> (x, w2) c = Concat <axis = 2> (a, b) y = Conv(c, w3)",
        "abcy",
    ),
    "gate": (GATE, "apqtuvy"),
    "swish": ("u = Sigmoid(a) v = Mul(a, u) y = Conv(v, w2)", "auvy"),
    "pool": ("m = MaxPool <kernel_shape = [2, 2]> (a) y = Conv(m, w2)", "amy"),
    "clipped": ("b = Relu(a) m = AveragePool <kernel_shape = [2, 2]> (b) y = Conv(m, w2)", "amy"),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_operators_between_layers_join_them(choose, block) -> None:
    """So that no activation makes a detour through float."""
    body, wanted = block
    weights = {**KERNELS, "s1": SQUARE, "s2": SQUARE}
    found, names = choose(picture(body), weights)
    assert names == set(wanted)
    assert found.kept == ()


LONE = {
    "at the end": "b = Conv <pads = [1, 1, 1, 1]> (a, w2) y = Add(a, b)",
    "one side in float": "b = Softmax(x) c = Add(a, b) y = Conv(c, w2)",
    "with a constant": "c = Add(a, s1) y = Conv(c, w2)",
    "before what stays in float": (
        "b = Conv <pads = [1, 1, 1, 1]> (a, w2) c = Add(a, b) y = Softmax(c)"
    ),
}


@pytest.mark.parametrize("body", LONE.values(), ids=LONE)
def test_add_never_stands_alone(choose, body: str) -> None:
    """It gains nothing where a side is float, or where no layer in integers reads it."""
    _, names = choose(picture(body), {**KERNELS, "s1": kernel(1, 4, 1, 1)})
    layers = {name for name in "aby" if f"{name} = Conv" in picture(body)}
    assert names == layers


def test_what_the_target_does_not_join_stays_in_float(choose) -> None:
    """The list is the target's."""
    graph = picture("b = Conv <pads = [1, 1, 1, 1]> (a, w2) c = Add(a, b) y = Conv(c, w3)")
    _, names = choose(graph, KERNELS, joins=("Concat",))
    assert names == {"a", "b", "y"}


def test_products_of_two_activations_stay_in_float(choose) -> None:
    """Rounding both sides of attention costs more than it gains; the projections are integers."""
    graph = text(
        "q = MatMul(x, wq) k = MatMul(x, wk) kt = Transpose <perm = [0, 2, 1]> (k)"
        " s = MatMul(q, kt) p = Softmax(s) m = MatMul(p, x) y = MatMul(m, wo)"
    )
    weights = {name: kernel(8, 8) for name in ("wq", "wk", "wo")}
    found, names = choose(graph, weights, TOKENS)
    assert names == {"q", "k", "y"}
    both = "a product of two activations rounds both"
    assert reasons(found) == {"s": both, "m": both}


def test_transposed_integers_lead_to_a_layer(choose) -> None:
    """What only moves values is joined, whichever layer comes before."""
    graph = text("q = MatMul(x, wq) t = Transpose <perm = [0, 2, 1]> (q) y = MatMul(t, wo)")
    weights = {"wq": kernel(8, 5), "wo": kernel(5, 5)}
    _, names = choose(graph, weights, TOKENS)
    assert names == {"q", "t", "y"}


@pytest.mark.parametrize("constant", [float(np.finfo(np.float32).min), -1e9])
def test_mask_constants_keep_their_layers_in_float(choose, constant: float) -> None:
    """A product that reads or writes one is no place for a grid; the others are."""
    graph = text("m = Relu(x) n = Where(mask, low, m) p = MatMul(n, w) y = MatMul(m, v)")
    graph = graph.replace("[batch, 5, 8] x", "[batch, 5, 8] x, bool[batch, 5, 8] mask")
    graph = graph.replace("[batch, 5, n] y", "[batch, 5, n] y, float[batch, 5, n] p")
    weights = {"w": kernel(8, 8), "v": kernel(8, 8), "low": np.array(constant)}
    rows = [{**row, "mask": np.arange(40).reshape(1, 5, 8) > 37} for row in TOKENS]
    found, names = choose(graph, weights, rows)
    assert names == {"y"}
    assert reasons(found) == {"p": "n holds 8 mask constants, not activations alone"}


def test_weights_that_are_no_matrix_of_their_own_stay_in_float(choose) -> None:
    """Shared by two nodes, one matrix per token, or scaled by the Gemm."""
    graph = text("a = MatMul(x, w) b = MatMul(a, w) c = MatMul(b, stack) y = MatMul(c, v)")
    weights = {"w": kernel(8, 8), "stack": kernel(1, 8, 8), "v": kernel(8, 8)}
    found, names = choose(graph, weights, TOKENS)
    assert names == {"y"}
    assert set(reasons(found)) == {"a", "b", "c"}
    assert all("weight is shared" in reason for reason in reasons(found).values())
    graph = (
        "dense (float[batch, 8] x) => (float[batch, n] y)"
        " { a = Gemm <alpha = 0.5> (x, w) y = Gemm(a, v) }"
    )
    rows = [{"x": row["x"][:, 0]} for row in TOKENS]
    found, names = choose(graph, weights, rows)
    assert names == {"y"}
    assert set(reasons(found)) == {"a"}


def test_what_calibration_did_not_see_stays_in_float(build, calibrated, scheme) -> None:
    """And a tensor that held nothing but mask constants."""
    model = build(text("a = MatMul(x, w) y = MatMul(a, v)"), {n: kernel(8, 8) for n in "wv"})
    seen = dict(calibrated(model, TOKENS).statistics)
    seen["a"] = replace(seen["a"], count=0)
    found = integer_nodes(model, seen, scheme=scheme)
    assert reasons(found) == {"y": "calibration saw no value of a"}
    del seen["x"], seen["a"]
    found = integer_nodes(model, seen, scheme=scheme)
    assert reasons(found) == {
        name: f"calibration saw no value of {read}" for name, read in (("a", "x"), ("y", "a"))
    }


def test_no_layer_no_integers(choose) -> None:
    """Operators that move or join values are no reason to begin."""
    graph = "still (float[batch, 4, 6, 6] x) => (float[batch, 4, 6, 6] y) { y = Add(x, x) }"
    found, names = choose(graph, {})
    assert (names, found.kept) == (set(), ())
