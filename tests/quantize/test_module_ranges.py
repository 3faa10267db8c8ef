"""Grids of modules, read off real quantised graphs: what is found, what is left out, and why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import onnxio, record
from equipoise.data.store import write_rows
from equipoise.errors import DataError, RecipeError, SourceError
from equipoise.provenance import MODULE_KEY
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.clip import LeastError
from equipoise.quantize.grids import activation_grid
from equipoise.quantize.module_ranges import (
    ModuleRangesConfig,
    as_trained,
    module_ranges,
    trained_ranges,
)
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.ranges import save_ranges
from equipoise.quantize.schemes import StaticInt8
from equipoise.quantize.treatment import Remedies
from equipoise.sources.module_grids import (
    ActivationGrid,
    ModuleRanges,
    read_module_ranges,
    with_scales,
)

GRAPH = """
    two (float[batch, 3, 8, 8] x) => (float[batch, 5] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, stem_weight, b1)
        b = Relu(a)
        c = Conv(b, onnx_Conv_7, b2)
        d = Add(c, b)
        e = GlobalAveragePool(d)
        f = Flatten(e)
        y = Gemm(f, head, b3)
    }
"""
PLACES = {"a": "stem_norm", "c": "block.conv", "y": "head"}


def named(model, places):
    """``model`` with the paths and the names of weights that an export has."""
    for tensor in model.graph.initializer:
        if tensor.name == "stem_weight":
            tensor.name = "inner.stem.weight"
    for node in model.graph.node:
        node.input[:] = ["inner.stem.weight" if n == "stem_weight" else n for n in node.input]
        path = places.get(node.output[0])
        if path is not None:
            node.metadata_props.add(key=MODULE_KEY, value=path)
    return model


@pytest.fixture
def weights():
    random = np.random.default_rng(3)
    return {
        "stem_weight": random.normal(size=(4, 3, 3, 3)), "b1": random.normal(size=4),
        "onnx_Conv_7": random.normal(size=(4, 4, 1, 1)), "b2": random.normal(size=4),
        "head": random.normal(size=(4, 5)), "b3": random.normal(size=5),
    }  # fmt: skip


@pytest.fixture
def case(build, tmp_path):
    def make(text, weights, places, scheme, *, rows=None, chosen=None):
        """A config for a graph that is written and calibrated."""
        random = np.random.default_rng(5)
        rows = rows or [{"x": random.normal(size=(1, 3, 8, 8)).astype("f")} for _ in range(8)]
        onnx.save(named(build(text, weights), places), tmp_path / "model.onnx")
        write_rows(tmp_path / "rows", rows)
        config = CalibrateConfig(model=tmp_path / "model.onnx", samples=tmp_path / "rows")
        calibrate(config, output=tmp_path)
        return ModuleRangesConfig(
            model=tmp_path / "model.onnx",
            scheme=scheme,
            samples=tmp_path / "rows",
            statistics=tmp_path,
            settings=chosen or StaticInt8(),
        )

    return make


def read(config, tmp_path) -> ModuleRanges:
    said = module_ranges(config, output=tmp_path)
    ranges = read_module_ranges(tmp_path / said.file)
    assert said.modules == len(ranges.modules)
    assert said.skipped == ranges.skipped
    return ranges


def test_each_layer_is_found_under_the_names_that_the_graph_gives(
    case, weights, scheme, tmp_path
) -> None:
    """A weight's name goes before the node's path, which then may be the folded norm's."""
    found = read(case(GRAPH, weights, PLACES, scheme), tmp_path).modules
    names = [(m.node, m.module, m.place) for m in found]
    assert names == [
        ("node_a", "stem", "stem_norm"), ("node_c", "block.conv", ""), ("node_y", "head", ""),
    ]  # fmt: skip


def test_grids_are_those_of_the_pairs_in_the_file(case, weights, scheme, tmp_path) -> None:
    """Scale and zero point of what a layer reads and writes, as the quantised file has them."""
    config = case(GRAPH, weights, PLACES, scheme)
    static = QuantizeConfig(
        model=config.model,
        quantization=as_trained(StaticInt8(min_sqnr_db=-100.0)),
        scheme=scheme,
        samples=config.samples,
        statistics=tmp_path,
    )
    (tmp_path / "int8").mkdir()
    quantize(static, output=tmp_path / "int8")
    file = tmp_path / "int8" / "model.onnx"
    by_file = read(replace(config, quantized=file, statistics=None), tmp_path)
    assert by_file.modules == read(config, tmp_path).modules
    constants = onnxio.initializers(onnx.load(file))
    for layer in by_file.modules:
        grid = layer.input
        scale = onnx.numpy_helper.to_array(constants[f"{grid.activation}.scale"])
        zero = onnx.numpy_helper.to_array(constants[f"{grid.activation}.zero_point"])
        assert (np.float32(grid.scale), grid.zero_point) == (scale, zero)
        assert (grid.low, grid.high, grid.dtype) == (0, 255, "uint8")
    stem, block, head = by_file.modules
    assert [m.input.activation for m in by_file.modules] == ["x", "b", "f"]
    assert stem.output is not None  # the Relu behind it is absorbed
    assert stem.output == block.input
    assert block.output is not None
    assert block.output.activation == "c"
    assert head.output is None  # a product gives float out
    assert all(m.integer_bias and m.weight.per_channel for m in by_file.modules)


def test_the_largest_weights_are_those_of_the_graph(case, weights, scheme, tmp_path) -> None:
    """Per output channel, whatever way round the graph stores them."""
    stem, _, head = read(case(GRAPH, weights, PLACES, scheme), tmp_path).modules
    kernel = weights["stem_weight"].astype(np.float32)
    assert np.allclose(stem.largest, np.abs(kernel).max(axis=(1, 2, 3)))
    assert np.allclose(head.largest, np.abs(weights["head"].astype("f")).max(axis=0))


def test_bits_power_of_two_and_clipping_are_told(case, weights, scheme, tmp_path) -> None:
    """The form of a weight's grid comes from the integers and scales in the file."""
    config = case(GRAPH, weights, PLACES, scheme)
    narrow = read(replace(config, settings=StaticInt8(weight_bits=7)), tmp_path).modules
    assert [m.weight.bits for m in narrow] == [7, 7, 7]
    plain = read(config, tmp_path).modules
    assert [(m.weight.bits, m.weight.share) for m in plain] == [(8, ())] * 3
    clipped = StaticInt8(weight_ranges=LeastError(), weight_bits=7)
    shares = [m.weight.share for m in read(replace(config, settings=clipped), tmp_path).modules]
    assert min(min(share) for share in shares if share) < 1
    powers = replace(scheme, power_of_two=True, symmetric=True, activation="int8")
    for layer in read(replace(config, scheme=powers), tmp_path).modules:
        assert layer.weight.power_of_two
        assert np.log2(layer.input.scale).is_integer()
    whole = read(replace(config, scheme=replace(scheme, per_channel=False)), tmp_path).modules
    assert not any(m.weight.per_channel for m in whole)


def test_roundings_between_layers_are_named_not_lost(case, weights, scheme, tmp_path) -> None:
    """No module with weights does what the Add and the pooling round."""
    ranges = read(case(GRAPH, weights, PLACES, scheme), tmp_path)
    between = {one.name for one in ranges.skipped if "between layers" in one.reason}
    assert {"node_d", "node_e"} <= between
    assert {"x", "b", "c", "d"} <= set(ranges.activations)


def test_products_of_activations_and_layers_in_float_are_named(scheme, case, tmp_path):
    text = """
        both (float[batch, 4, 8] x) => (float[batch, 4, 4] y) {
            a = MatMul(x, w1)
            b = MatMul(x, w2)
            c = Transpose <perm = [0, 2, 1]> (b)
            y = MatMul(a, c)
        }
    """
    random = np.random.default_rng(0)
    weights = {"w1": random.normal(size=(8, 8)), "w2": random.normal(size=(8, 8))}
    rows = [{"x": random.normal(size=(1, 4, 8)).astype("f")} for _ in range(8)]
    chosen = StaticInt8(float_nodes=("node_b",))
    places = {"a": "query", "b": "key", "y": ""}
    config = case(text, weights, places, scheme, rows=rows, chosen=chosen)
    ranges = read(config, tmp_path)
    assert [m.module for m in ranges.modules] == ["query"]
    reasons = {one.name: one.reason for one in ranges.skipped}
    assert "two activations" in reasons["node_y"]
    assert "float" in reasons["node_b"]


def test_an_output_that_is_rounded_before_its_bias_is_told(scheme, case, tmp_path) -> None:
    """A product and its bias are two nodes, and some targets want integers between them."""
    text = """
        two (float[batch, 4, 8] x) => (float[batch, 4, 6] y) {
            a = MatMul(x, w1)
            b = Add(a, b1)
            y = MatMul(b, w2)
        }
    """
    random = np.random.default_rng(0)
    weights = {"w1": random.normal(size=(8, 8)), "w2": random.normal(size=(8, 6))}
    weights["b1"] = random.normal(size=8)
    rows = [{"x": random.normal(size=(1, 4, 8)).astype("f")} for _ in range(8)]
    places = {"a": "first", "b": "first", "y": "second"}
    integers = replace(scheme, float_products=False)
    first = read(case(text, weights, places, integers, rows=rows), tmp_path).modules[0]
    assert first.output.activation == "a"
    assert first.output_before_bias
    floats = read(case(text, weights, places, scheme, rows=rows), tmp_path).modules[0]
    assert floats.output == read_module_ranges(tmp_path / "ranges.json").modules[1].input
    assert not floats.output_before_bias


def test_two_nodes_of_one_module_and_nodes_of_none_are_left_out(case, weights, scheme, tmp_path):
    """Packed projections have one name for several products; which is which nobody can tell."""
    places = {"a": "", "c": "packed", "y": "packed"}
    ranges = read(case(GRAPH, weights, places, scheme), tmp_path)
    assert [m.module for m in ranges.modules] == ["stem"]
    assert sum("2 nodes belong to the module 'packed'" in s.reason for s in ranges.skipped) == 2


UNLIKE = """
    unlike (float[batch, 32] x) => (float[batch, 8] y) {
        n = LayerNormalization(x, g, h)
        m = MatMul(n, w)
        r = Relu(m)
        y = Gemm(r, second, c)
    }
"""
SMOOTHING = Remedies(smoothing=True, outliers=False, clipping=False)
OUTLIERS = Remedies(smoothing=False, outliers=True, clipping=False)


@pytest.mark.parametrize(
    ("remedies", "reason"), [(SMOOTHING, "factors of smoothed"), (OUTLIERS, "computed in float")]
)
def test_treated_weights_of_a_given_file_are_left_out(
    case, scheme, tmp_path, remedies, reason
) -> None:
    """Smoothing and outlier channels leave other weights in the file than the module has."""
    random = np.random.default_rng(1)
    gains = np.ones(32)
    gains[3] = 60.0
    weights = {"g": gains, "h": np.zeros(32), "w": random.normal(size=(32, 16))}
    weights |= {"second": random.normal(size=(16, 8)), "c": np.zeros(8)}
    rows = [{"x": random.normal(size=(4, 32)).astype("f")} for _ in range(16)]
    config = case(UNLIKE, weights, {"m": "fc", "y": "last"}, scheme, rows=rows)
    (tmp_path / "int8").mkdir()
    static = QuantizeConfig(
        model=config.model, quantization=StaticInt8(min_sqnr_db=-100.0, remedies=remedies),
        scheme=scheme, samples=config.samples, statistics=tmp_path,
    )  # fmt: skip
    quantize(static, output=tmp_path / "int8")
    file = tmp_path / "int8" / "model.onnx"
    ranges = read(replace(config, quantized=file), tmp_path)
    assert [m.module for m in ranges.modules] == ["last"]
    assert reason in next(one.reason for one in ranges.skipped if one.name == "node_m")
    assert [m.module for m in read(config, tmp_path).modules] == ["fc", "last"]


def test_what_was_trained_is_quantised_with_the_same_grids(case, weights, scheme, tmp_path) -> None:
    """Ranges go from training to the export of other weights, and come out the same."""
    config = case(GRAPH, weights, PLACES, scheme)
    ranges = read(config, tmp_path)
    model = onnx.load(config.model)
    kernel = onnxio.initializers(model)["inner.stem.weight"]
    other = onnx.numpy_helper.to_array(kernel) * np.float32(1.7)
    kernel.CopyFrom(onnx.numpy_helper.from_array(other, kernel.name))
    trained = tmp_path / "trained"
    trained.mkdir()
    onnx.save(model, trained / "model.onnx")
    calibrated = CalibrateConfig(model=trained / "model.onnx", samples=config.samples)
    calibrate(calibrated, output=trained)
    learned = with_scales(ranges, {"b": ranges.modules[1].input.scale * 1.25})
    chosen = trained_ranges(learned, model=trained / "model.onnx", samples=config.samples)
    save_ranges(trained / "chosen.json", chosen)
    static = QuantizeConfig(
        model=trained / "model.onnx",
        quantization=as_trained(StaticInt8(min_sqnr_db=-100.0)),
        scheme=scheme,
        samples=config.samples,
        statistics=trained,
        ranges=trained / "chosen.json",
    )
    (trained / "int8").mkdir()
    quantize(static, output=trained / "int8")
    again = replace(config, model=trained / "model.onnx", quantized=trained / "int8" / "model.onnx")
    found = read(again, tmp_path)
    for one, wanted in zip(found.modules, learned.modules, strict=True):
        assert one.input == wanted.input
        assert one.output == wanted.output
    assert found.modules[0].largest != ranges.modules[0].largest


@settings(max_examples=200, deadline=None)
@given(
    low=st.floats(-100, 0), high=st.floats(0, 100), symmetric=st.booleans(),
    dtype=st.sampled_from(["uint8", "int8", "uint16", "int16"]),
)  # fmt: skip
def test_bounds_make_the_grid_again(low, high, symmetric, dtype) -> None:
    """A grid goes through its range and back unchanged."""
    made = activation_grid(low, high, dtype=dtype, symmetric=symmetric)
    grid = ActivationGrid(
        activation="x", scale=float(made.scale), zero_point=int(made.zero_point),
        low=made.low, high=made.high, dtype=dtype, symmetric=symmetric,
    )  # fmt: skip
    again = activation_grid(*grid.bounds, dtype=dtype, symmetric=symmetric)
    assert (again.scale, again.zero_point) == (made.scale, made.zero_point)
    assert record.loads(ActivationGrid, record.dumps(grid), where="x") == grid


def test_ranges_of_another_model_are_refused(case, weights, scheme, tmp_path, build) -> None:
    """Names of activations that are not there."""
    config = case(GRAPH, weights, PLACES, scheme)
    ranges = read(config, tmp_path)
    other = build(
        GRAPH.replace("b = Relu(a)", "q = Relu(a)").replace("(b", "(q").replace(", b)", ", q)"),
        weights,
    )
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(SourceError, match="no activation 'b'"):
        trained_ranges(ranges, model=tmp_path / "other.onnx", samples=config.samples)


def test_a_file_of_another_model_is_refused(case, weights, scheme, tmp_path, build) -> None:
    config = case(GRAPH, weights, PLACES, scheme)
    text = "o (float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }"
    onnx.save(build(text, {}), tmp_path / "other.onnx")
    with pytest.raises(SourceError, match="no node 'node_a'"):
        module_ranges(replace(config, quantized=tmp_path / "other.onnx"), output=tmp_path)


def test_a_float_file_in_place_of_a_quantised_one_has_no_grids(case, weights, scheme, tmp_path):
    config = case(GRAPH, weights, PLACES, scheme)
    with pytest.raises(RecipeError, match="stays in float"):
        module_ranges(replace(config, quantized=config.model), output=tmp_path)


def test_without_statistics_or_a_file_there_is_nothing_to_read(case, weights, scheme, tmp_path):
    config = case(GRAPH, weights, PLACES, scheme)
    with pytest.raises(RecipeError, match="neither is given"):
        module_ranges(replace(config, statistics=None), output=tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"modules": [], "activations": {}}', "[1]"])
def test_a_file_that_holds_something_else_is_refused(text, tmp_path) -> None:
    (tmp_path / "ranges.json").write_text(text)
    with pytest.raises(DataError):
        read_module_ranges(tmp_path / "ranges.json")


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_module_ranges(tmp_path / "nothing.json")
