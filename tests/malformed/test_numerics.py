"""M5: numbers that no computation can come out of, and those that only look so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.malformed import material
from tests.malformed.counting import Campaign, Case

from equipoise.data.store import write_rows
from equipoise.errors import NonFiniteError
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.schemes import DynamicInt8
from equipoise.targets.machine import detect_machine
from equipoise.targets.profiles import get_target

NAN, INF = float("nan"), float("inf")
FLOATS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "bfloat16": TensorProto.BFLOAT16,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8_e5m2": TensorProto.FLOAT8E5M2,
}
WITHOUT_INFINITY = {"float8_e4m3fn"}


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _tensor(name: str, values: np.ndarray, dtype: str = "float32") -> TensorProto:
    return numpy_helper.from_array(values.astype(_dtype(dtype)), name)


def _weight(value: float, dtype: str, *, count: int = 2) -> np.ndarray:
    """float [8, 4] with ``count`` times ``value``, the first at [1, 2]."""
    array = np.ones((8, 4), dtype=_dtype(dtype))
    array[1, 2 : 2 + count] = value
    return array


def _product(tensor: TensorProto, *before: onnx.NodeProto, weight: str = "w") -> onnx.ModelProto:
    """``y = x @ w`` with w[8, 4], after the nodes ``before``."""
    dtype = tensor.data_type if not before else TensorProto.FLOAT
    node = helper.make_node("MatMul", ["x", weight], ["y"], name="product")
    return material.model_of([*before, node], tensors=[tensor], dtype=dtype)


def _by_type() -> Iterator[tuple[str, onnx.ModelProto, tuple[str, ...]]]:
    """NaN and infinity of either sign in weights of every type."""
    for dtype, (what, value) in itertools.product(
        FLOATS, {"NaN": NAN, "+inf": INF, "-inf": -INF}.items()
    ):
        if np.isnan(value) or dtype not in WITHOUT_INFINITY:
            tensor = _tensor("w", _weight(value, dtype), dtype)
            told = ("2 of 32 numbers", "[1, 2]", "'w'")
            if dtype.startswith("float8"):
                cast = helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT)
                yield f"{what} in {dtype}", _product(tensor, cast, weight="c"), told
            else:
                yield f"{what} in {dtype}", _product(tensor), told


def _in_field(name: str, values: np.ndarray, kind: int) -> TensorProto:
    """A tensor whose values are in the field of its type, and not in raw_data."""
    return helper.make_tensor(name, kind, values.shape, values.ravel().tolist())


def _by_field() -> Iterator[tuple[str, onnx.ModelProto, tuple[str, ...]]]:
    """In float_data and double_data, and in int32_data, where small types are."""
    for dtype, (what, value) in itertools.product(
        ("float32", "float64", "float16", "bfloat16"), {"NaN": NAN, "inf": INF}.items()
    ):
        tensor = _in_field("w", _weight(value, dtype), FLOATS[dtype])
        assert not tensor.raw_data
        yield f"{what} of {dtype} in its field", _product(tensor), ("2 of 32", "[1, 2]", "'w'")


def _at_sites() -> Iterator[tuple[str, onnx.ModelProto, tuple[str, ...]]]:
    """In every place that holds constants, and behind nodes that only move them."""
    bad = _tensor("v", _weight(NAN, "float32"))
    infinite = _tensor("v", _weight(INF, "float32"))
    yield (
        "NaN in a Constant",
        _product(good_weight(), helper.make_node("Constant", [], ["w"], name="c", value=bad)),
        ("value of Constant 'c'",),
    )
    yield (
        "infinity in a Constant",
        _product(good_weight(), helper.make_node("Constant", [], ["w"], name="c", value=infinite)),
        ("value of Constant 'c'", "product"),
    )
    for op, more in {
        "Identity": {}, "Transpose": {"perm": [0, 1]}, "Cast": {"to": TensorProto.FLOAT},
        "Squeeze": {},
    }.items():  # fmt: skip
        node = helper.make_node(op, ["v"], ["w"], **more)
        yield f"infinity behind {op}", _product(infinite, node), ("'v'", "product")
    for what, value in {"NaN": NAN, "infinity": INF}.items():
        many = helper.make_node("Constant", [], ["f"], name="c", value_floats=[1.0, value] * 16)
        shape = helper.make_node("Constant", [], ["s"], value_ints=[8, 4])
        told = ("value_floats of Constant 'c'",)
        reshape = helper.make_node("Reshape", ["f", "s"], ["w"])
        yield f"{what} in floats", _product(good_weight(), many, shape, reshape), told
    slope = helper.make_node("LeakyRelu", ["p"], ["y"], name="leaky", alpha=NAN)
    product = helper.make_node("MatMul", ["x", "unused"], ["p"])
    yield (
        "NaN in an attribute",
        material.model_of([product, slope], tensors=[good_weight()]),
        ("alpha of LeakyRelu 'leaky'",),
    )
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["z"], name="inner")],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    either = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    for what, tensor in {"NaN": bad, "infinity": infinite}.items():
        model = material.model_of(
            [either], tensors=[tensor, numpy_helper.from_array(np.ones((), dtype=bool), "yes")]
        )
        yield f"{what} read in a subgraph", model, ("'v'", "2 of 32")
    body = [
        helper.make_node("Constant", [], ["k"], name="c", value=infinite),
        helper.make_node("MatMul", ["a", "k"], ["b"], name="inner"),
    ]
    model = material.model_of(
        [helper.make_node("Body", ["x"], ["y"], domain="local")], domains=["local"]
    )
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("local", "Body", ["a"], ["b"], body, opsets))
    yield "infinity in a function", model, ("value of Constant 'c'", "inner")
    sparse = material.model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
    )
    values = numpy_helper.from_array(np.array([1.0, NAN], dtype=np.float32), "w")
    at = numpy_helper.from_array(np.array([0, 5]), "at")
    sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [8, 4]))
    yield "NaN in a sparse weight", sparse, ("sparse weight 'w'", "1 of 2")


def good_weight() -> TensorProto:
    """A good weight [8, 4] that nobody has to read."""
    return _tensor("unused", np.ones((8, 4)))


def _by_operator() -> Iterator[tuple[str, onnx.ModelProto, tuple[str, ...]]]:
    """Infinity in one input of every kind of layer."""
    layers: dict[str, tuple[Sequence[str], tuple[int, ...]]] = {
        "Gemm": (["x", "w"], (8, 4)),
        "Conv": (["x", "w"], (4, 8, 1)),
        "ConvTranspose": (["x", "w"], (8, 4, 1)),
        "LayerNormalization": (["p", "w"], (4,)),
        "PRelu": (["p", "w"], (4,)),
        "Einsum": (["x", "w"], (8, 4)),
    }
    for op, (inputs, shape) in layers.items():
        array = np.ones(shape, dtype=np.float32)
        array.ravel()[3] = -INF
        more = {"equation": "bi,io->bo"} if op == "Einsum" else {}
        node = helper.make_node(op, inputs, ["y"], name="layer", **more)
        product = [helper.make_node("MatMul", ["x", "unused"], ["p"])] if "p" in inputs else []
        model = material.model_of([*product, node], tensors=[_tensor("w", array), good_weight()])
        yield f"infinity in {op}", model, ("'w'", f"{op} 'layer'", "1 of")


def _quantized(
    op: str,
    scale: np.ndarray,
    zero: np.ndarray | None = None,
    *,
    data: np.ndarray | None = None,
    axis: int = 1,
) -> onnx.ModelProto:
    """x quantised and back, or a weight unpacked, with ``scale`` in one of the two nodes."""
    zero = np.zeros(scale.shape, dtype=np.int8) if zero is None else zero
    tensors = [
        numpy_helper.from_array(scale, "s"),
        numpy_helper.from_array(zero, "z"),
        good_weight(),
    ]
    if op == "QuantizeLinear":
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize", axis=axis),
            helper.make_node("DequantizeLinear", ["q", "one"], ["d"], name="back"),
            helper.make_node("MatMul", ["d", "unused"], ["y"]),
        ]
        tensors.append(_tensor("one", np.array(1.0)))
        return material.model_of(nodes, tensors=tensors)
    data = np.ones((8, 4), dtype=np.int8) if data is None else data
    tensors.append(numpy_helper.from_array(data, "i"))
    nodes = [
        helper.make_node("DequantizeLinear", ["i", "s", "z"], ["w"], name="unpack", axis=axis),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    return material.model_of(nodes, tensors=tensors)


SCALES = {
    "zero": 0.0, "negative": -0.1, "NaN": NAN, "infinite": INF, "-inf": -INF, "denormal": 1e-40,
    "negative zero": -0.0,
}  # fmt: skip


def _scales() -> Iterator[tuple[str, onnx.ModelProto, tuple[str, ...]]]:
    """One scale for all, and one of several."""
    for op, (what, value) in itertools.product(
        ("QuantizeLinear", "DequantizeLinear"), SCALES.items()
    ):
        scale = np.array(value, dtype=np.float32)
        name = "quantize" if op == "QuantizeLinear" else "unpack"
        told = ("'s'",) if np.isnan(value) else ("'s'", name)
        yield f"{what} scale of {op}", _quantized(op, scale), ("1 of 1", *told)
        if op == "DequantizeLinear":
            several = np.array([0.1, 0.2, value, 0.1], dtype=np.float32)
            yield f"{what} among scales", _quantized(op, several), ("1 of 4", "[2]", *told)


def _zero_points() -> Iterator[tuple[str, onnx.ModelProto, tuple[str, ...]]]:
    """Of another shape or type, or not zero where it has to be."""
    scale = np.array([0.1] * 4, dtype=np.float32)
    wrong = {
        "of another shape": np.zeros(3, dtype=np.int8),
        "of another type": np.zeros(4, dtype=np.uint8),
    }
    for what, zero in wrong.items():
        model = _quantized("DequantizeLinear", scale, zero)
        yield f"zero point {what}", model, ("'z'", "unpack")
    one = np.array(0.1, dtype=np.float32)
    for kind in (np.int32, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        data = np.ones((8, 4), dtype=kind)
        model = _quantized("DequantizeLinear", one, np.array(1, dtype=kind), data=data)
        yield f"zero point of {kind.__name__} that is not zero", model, ("'z'", "unpack")


def _overflows() -> Iterator[tuple[str, onnx.ModelProto, tuple[str, ...]]]:
    """Finite weights that a conversion of the model turns into infinity."""
    for what, dtype, target, value in (
        ("float32 to float16", "float32", TensorProto.FLOAT16, 1e6),
        ("float64 to float16", "float64", TensorProto.FLOAT16, -7e4),
        ("float64 to bfloat16", "float64", TensorProto.BFLOAT16, 1e39),
    ):
        tensor = _tensor("v", _weight(value, dtype), dtype)
        narrow = helper.make_node("Cast", ["v"], ["n"], name="narrow", to=target)
        wide = helper.make_node("Cast", ["n"], ["w"], to=TensorProto.FLOAT)
        told = ("'v'", "2 of 32 numbers", "[1, 2]", "narrow")
        yield f"overflow from {what}", _product(tensor, narrow, wide), told


REFUSED: tuple[Callable[[], Iterator[tuple[str, onnx.ModelProto, tuple[str, ...]]]], ...] = (
    _by_type, _by_field, _at_sites, _by_operator, _scales, _zero_points, _overflows,
)  # fmt: skip


def _accepted() -> Iterator[tuple[str, onnx.ModelProto]]:
    """What real exports have, and what only looks bad."""
    product = helper.make_node("MatMul", ["x", "unused"], ["p"])
    mask = _tensor("m", np.where(np.tri(4) > 0, 0, -INF))
    for dtype in ("float32", "float16", "bfloat16"):
        tiny = np.full((8, 4), np.finfo(np.float32).tiny / 4 if dtype != "float16" else 6e-8)
        yield f"denormal weights of {dtype}", _product(_tensor("w", tiny, dtype))
    row = helper.make_node("Gather", ["m", "at"], ["row"])
    at = numpy_helper.from_array(np.array(1), "at")
    added = helper.make_node("Add", ["p", "row"], ["y"])
    yield (
        "a mask that is added",
        material.model_of([product, row, added], tensors=[good_weight(), mask, at]),
    )
    chosen = helper.make_node("Where", ["which", "low", "p"], ["y"])
    which = numpy_helper.from_array(np.array([True, False, False, False]), "which")
    low = _tensor("low", np.array(-INF))
    yield (
        "-inf that is chosen",
        material.model_of([product, chosen], tensors=[good_weight(), which, low]),
    )
    constant = helper.make_node("Constant", [], ["low"], value_float=-INF)
    yield (
        "-inf of a Constant that is chosen",
        material.model_of([product, constant, chosen], tensors=[good_weight(), which]),
    )
    half = helper.make_node("Cast", ["big"], ["b"], to=TensorProto.FLOAT16)
    full = helper.make_node("Cast", ["b"], ["low"], to=TensorProto.FLOAT)
    big = _tensor("big", np.array(np.finfo(np.float32).min))
    yield (
        "the least float32 as a mask in float16",
        material.model_of([product, half, full, chosen], tensors=[good_weight(), which, big]),
    )
    clip = helper.make_node("Clip", ["p", "zero", "top"], ["y"])
    bounds = [_tensor("zero", np.array(0.0)), _tensor("top", np.array(INF))]
    yield "an open bound", material.model_of([product, clip], tensors=[good_weight(), *bounds])
    packed = np.ones((8, 4)).astype(ml_dtypes.int4)
    four = np.array([0.1, -0.1, 0.0, 0.1], dtype=np.float32)
    zero = np.zeros(4).astype(ml_dtypes.int4)
    yield "scales of four bits", _quantized("DequantizeLinear", four, zero, data=packed)
    scale = np.array(2e-6, dtype=np.float16)
    data = np.ones((8, 4), dtype=np.int8)
    model = _quantized("DequantizeLinear", scale, data=data)
    model.graph.node.insert(1, helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT))
    model.graph.node[2].input[1] = "f"
    yield "a scale in float16 below its normal numbers", model
    least = np.array(np.finfo(np.float32).tiny)
    yield "the least normal scale", _quantized("DequantizeLinear", least)


def _case(folder: Path, name: str, model: onnx.ModelProto, **more: object) -> Case:
    file = f"{name}.onnx".replace("/", " ")
    (folder / file).write_bytes(model.SerializeToString())
    return Case(
        name=name, subject="onnx_load", folder=folder, file=file, target=file, good="good.onnx",
        **more,
    )  # type: ignore[arg-type]  # fmt: skip


def test_numbers(campaign: Campaign, tmp_path: Path) -> None:
    """Each names the tensor, how many of its numbers are bad, and the first."""
    material.write_onnx(tmp_path / "good.onnx")
    bad = [
        _case(tmp_path, name, model, words=words)
        for make in REFUSED
        for name, model, words in make()
    ]
    good = [_case(tmp_path, n, model, otherwise="accepted") for n, model in _accepted()]
    outcome = campaign.run([*bad, *good], what="M5 numbers", least=60)
    assert outcome.counts["typed"] == len(bad)
    assert outcome.counts["harmless"] == len(good)


def _activations(what: str) -> onnx.ModelProto:
    """Finite weights; large inputs overflow on the way, and are NaN or infinite in the end."""
    product = helper.make_node("MatMul", ["x", "w"], ["p"])
    grown = helper.make_node("Exp", ["p"], ["e"])
    last = {
        "inf": [helper.make_node("Identity", ["e"], ["y"])],
        "NaN": [helper.make_node("Sub", ["e", "e"], ["y"])],
        "cleaned": [
            helper.make_node("Sub", ["e", "e"], ["n"]),
            helper.make_node("IsNaN", ["n"], ["which"]),
            helper.make_node("Where", ["which", "zero", "p"], ["y"]),
        ],
    }[what]
    tensors = [_tensor("w", np.ones((8, 4))), _tensor("zero", np.array(0.0))]
    return material.model_of([product, grown, *last], tensors=tensors)


@pytest.mark.parametrize("bad", [(3,), tuple(range(8))], ids=["one batch", "all batches"])
@pytest.mark.parametrize("what", ["inf", "NaN", "cleaned"])
def test_activations(what: str, bad: tuple[int, ...], tmp_path: Path) -> None:
    """One of eight samples, or all of them: the file, the output and the sample are named.

    What the model itself replaces is no fault of it: exports of attention do that.
    """
    rows = [{"x": np.full((1, 8), 100.0 if i in bad else 0.5, np.float32)} for i in range(8)]
    write_rows(tmp_path / "rows", rows)
    config = QuantizeConfig(
        model=material.write_onnx(tmp_path / "model.onnx", _activations(what)),
        quantization=DynamicInt8(),
        scheme=get_target("cpu", machine=detect_machine()).int8,
        samples=tmp_path / "rows",
    )
    (tmp_path / "out").mkdir()
    if what == "cleaned":
        assert quantize(config, output=tmp_path / "out").quantized
        return
    with pytest.raises(NonFiniteError, match=rf"model\.onnx: output 'y' of sample {bad[0]} has 4"):
        quantize(config, output=tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
