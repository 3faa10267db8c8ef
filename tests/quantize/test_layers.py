"""A layer seen as rows and patches computes what ONNX Runtime computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from equipoise.quantize.layers import find_layers, read_array, write_array

node, info = helper.make_node, helper.make_tensor_value_info
RNG = np.random.default_rng(0)


def model(nodes: list, constants: dict, *, shape: list, outputs=("y",)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, shape)],
        [info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, {"x": x})[0]


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def assert_layer_is_its_rows_and_patches(proto: onnx.ModelProto, x: np.ndarray) -> None:
    """``flat output = patches @ rows^T``, group by group."""
    (layer,) = find_layers(proto)
    rows, patches = layer.rows(read_array(proto, layer.weight)), layer.patches(x)
    product = np.einsum("gpi,goi->pgo", patches, rows).reshape(patches.shape[1], -1)
    wanted = layer.flat_output(run(proto, x))
    assert product.shape == wanted.shape
    np.testing.assert_allclose(product, wanted, rtol=1e-4, atol=1e-4)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[onnx.ModelProto, np.ndarray]:
    rank = draw(st.integers(1, 3))
    groups, inside, outside = (draw(st.integers(1, 3)) for _ in range(3))

    def each(low: int, high: int, *, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    kernel, strides, dilations, space = each(1, 3), each(1, 3), each(1, 2), each(1, 7)
    automatic = draw(st.sampled_from(["", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    attributes: dict = {"strides": strides}
    if automatic.startswith("SAME"):
        dilations = [1] * rank  # the runtime refuses both together
    attributes["dilations"] = dilations
    if automatic:
        attributes["auto_pad"] = automatic
    pads = [0] * 2 * rank
    if automatic in {"", "NOTSET"} and draw(st.booleans()):
        pads = attributes["pads"] = each(0, 2, count=2 * rank)
    if not automatic.startswith("SAME"):
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
        padded = [s + a + b for s, a, b in zip(space, pads[:rank], pads[rank:], strict=True)]
        assume(all(size >= span for size, span in zip(padded, spans, strict=True)))
    made = node("Conv", ["x", "w"], ["y"], name="conv", group=groups, **attributes)
    weight = floats(groups * outside, inside, *kernel)
    batch = draw(st.integers(1, 2))
    return model([made], {"w": weight}, shape=[None] * (2 + rank)), floats(
        batch, groups * inside, *space
    )


@settings(deadline=None, max_examples=120)
@given(convolutions())
def test_any_convolution_is_its_rows_and_patches(case) -> None:
    """One to three axes, groups, strides, dilations, pads of every kind, batches."""
    assert_layer_is_its_rows_and_patches(*case)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_products_are_their_rows_and_patches(shape: tuple[int, ...]) -> None:
    """MatMul over any number of axes in front."""
    proto = model([node("MatMul", ["x", "w"], ["y"], name="m")], {"w": floats(5, 7)},
                  shape=list(shape))  # fmt: skip
    assert_layer_is_its_rows_and_patches(proto, floats(*shape))


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_is_its_rows_and_patches(transposed: int) -> None:
    """Its weight lies either way round."""
    weight = floats(7, 5) if transposed else floats(5, 7)
    proto = model([node("Gemm", ["x", "w"], ["y"], name="g", transB=transposed)], {"w": weight},
                  shape=["n", 5])  # fmt: skip
    assert_layer_is_its_rows_and_patches(proto, floats(4, 5))
    (layer,) = find_layers(proto)
    assert (layer.channels, layer.channel_axis) == (7, 1 - transposed)


@settings(deadline=None, max_examples=60)
@given(convolutions(), st.sampled_from(["Conv", "MatMul", "Gemm", "GemmT"]))
def test_rows_go_back_into_the_stored_form(case, kind: str) -> None:
    """Whatever the operator: the same array, contiguous."""
    proto, _ = case
    if kind != "Conv":
        made = node(kind.rstrip("T"), ["x", "w"], ["y"], name="m", **(
            {"transB": 1} if kind == "GemmT" else {}
        ))  # fmt: skip
        proto = model([made], {"w": floats(5, 7)}, shape=["n", None])
    (layer,) = find_layers(proto)
    stored = read_array(proto, layer.weight)
    back = layer.stored(layer.rows(stored))
    np.testing.assert_array_equal(back, stored)
    assert back.flags.c_contiguous
    assert layer.rows(stored).shape[:2] == (layer.groups, layer.channels // layer.groups)


@pytest.mark.parametrize(
    ("size", "most"), [((9, 9), 9), ((112, 112), 64), ((7, 7), 64), ((1, 1), 4)]
)
def test_a_share_of_the_positions_is_even_in_every_direction(size, most) -> None:
    """A step that divides the width would see one column of the image alone."""
    proto = model([node("Conv", ["x", "w"], ["y"], name="c")], {"w": floats(1, 2, 1, 1)},
                  shape=[1, 2, None, None])  # fmt: skip
    (layer,) = find_layers(proto)
    places = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))[None].astype(np.float32)
    chosen = layer.patches(places, most=most)[0]
    assert 0.4 * min(most, size[0] * size[1]) <= len(chosen) <= most
    assert len(np.unique(chosen, axis=0)) == len(chosen)
    for axis in (0, 1):
        assert len(np.unique(chosen[:, axis])) >= min(len(chosen), size[axis]) / 2
    whole = {tuple(p) for p in layer.patches(places)[0].tolist()}
    assert {tuple(p) for p in chosen.tolist()} <= whole


def test_layers_are_those_with_a_weight_of_their_own() -> None:
    """Not: products of activations, shared or given-out weights, other types, ranks and factors."""
    constants = {
        "own": floats(5, 5), "shared": floats(5, 5), "out": floats(5, 5), "cube": floats(1, 5, 5),
        "double": RNG.normal(size=(5, 5)), "scaled": floats(5, 5), "turned": floats(5, 5),
        "b": floats(5, 5),
    }  # fmt: skip
    nodes = [
        node("MatMul", ["x", "own"], ["a"], name="own"),
        node("MatMul", ["a", "shared"], ["b1"], name="shared1"),
        node("MatMul", ["b1", "shared"], ["b2"], name="shared2"),
        node("MatMul", ["b2", "out"], ["c"], name="given out"),
        node("MatMul", ["c", "c"], ["d"], name="activations"),
        node("MatMul", ["d", "cube"], ["e"], name="cube"),
        node("Gemm", ["c", "scaled"], ["f"], name="scaled", alpha=0.5),
        node("Gemm", ["c", "turned"], ["g"], name="turned", transA=1),
        node("Cast", ["x"], ["xd"], name="cast", to=TensorProto.DOUBLE),
        node("MatMul", ["xd", "double"], ["h"], name="double"),
        node("MatMul", ["b", "x"], ["y"], name="left"),
    ]
    proto = model(nodes, constants, shape=[5, 5], outputs=("y", "out"))
    assert [layer.name for layer in find_layers(proto)] == ["own"]


def test_a_weight_that_a_subgraph_reads_is_nobodys_own() -> None:
    """Rounding it would change what the branch computes."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [node("MatMul", ["x", "w"], [name])], name, [], [info(name, TensorProto.FLOAT, None)]
        )
        for name in ("then", "else")
    }
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="outer"),
        node("If", ["yes"], ["b"], name="if", **branches),
        node("Add", ["a", "b"], ["y"], name="add"),
    ]
    proto = model(nodes, {"w": floats(5, 5), "yes": np.ones((), bool)}, shape=[5, 5])
    assert find_layers(proto) == ()


@pytest.mark.parametrize("inputs", [["bias", "m"], ["m", "bias"]], ids=str)
def test_the_add_of_a_bias_belongs_to_its_product(inputs: list[str]) -> None:
    """If it alone reads the product, and what it adds is one vector."""
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="m"),
        node("Add", inputs, ["y"], name="add"),
    ]
    (layer,) = find_layers(model(nodes, {"w": floats(5, 7), "bias": floats(7)}, shape=["n", 5]))
    assert (layer.bias, layer.result, layer.output) == ("bias", "y", "m")
    (other,) = find_layers(model(nodes, {"w": floats(5, 7), "bias": floats(1, 7)}, shape=["n", 5]))
    assert (other.bias, other.result) == ("", "m")
    both = [*nodes, node("Relu", ["m"], ["z"], name="relu")]
    (read_twice,) = find_layers(
        model(both, {"w": floats(5, 7), "bias": floats(7)}, shape=["n", 5], outputs=("y", "z"))
    )
    assert (read_twice.bias, read_twice.result) == ("", "m")


def test_writing_an_array_replaces_or_adds_an_initializer() -> None:
    """Its shape and type may change."""
    proto = model([node("Relu", ["x"], ["y"], name="r")], {"a": floats(3)}, shape=["n"])
    write_array(proto, "a", np.arange(4))
    write_array(proto, "b", floats(2, 2))
    assert [t.name for t in proto.graph.initializer] == ["a", "b"]
    assert read_array(proto, "a").tolist() == [0, 1, 2, 3]
