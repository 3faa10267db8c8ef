"""What a candidate shares with its reference, what its rounding explains, and whose node it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from equipoise import onnxio
from equipoise.errors import InputError, SourceError
from equipoise.graph.clean import clean
from equipoise.parity.blame import BlameSettings, find_blame
from equipoise.parity.cut import CutGraph
from equipoise.parity.departing import judge
from equipoise.parity.piece_error import PieceMeter
from equipoise.parity.pieces import ReferenceRun, measure_pieces
from equipoise.provenance import MODULE_KEY, module_path, module_paths
from equipoise.quantize.halves import Halves, convert_to_half
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.schemes import StaticInt8
from equipoise.targets.profile import Int8Scheme

SETTINGS = BlameSettings()


def node(name: str, **metadata: str) -> Any:
    made = helper.make_node("Relu", ["x"], ["y"], name=name)
    for key, value in metadata.items():
        entry = made.metadata_props.add()
        entry.key, entry.value = key.replace("_dot_", "."), value
    return made


SCOPES = "pkg_dot_torch_dot_onnx_dot_name_scopes"


@pytest.mark.parametrize(
    ("name", "scopes", "path"),
    [
        ("node_linear", "['', 'inner', 'inner.fc', 'linear']", "fc"),
        ("node_add", "['', 'inner', 'inner.a.0', 'inner.a.0.b', 'add']", "a.0.b"),
        ("node_add", "['', 'fc', 'add']", "fc"),
        ("node_add", "['', 'inner', 'add']", ""),
        ("node_add", "['_empty_nn_module_stack_from_metadata_hook', 'add']", ""),
        ("node_add", "not a list", ""),
        ("node_add", "['alone']", ""),
        ("/inner/layers.0/Add", None, "layers.0"),
        ("/inner/first/first.0/Add", None, "first.0"),
        ("/inner/Add", None, ""),
        ("/encoder/layer.0/MatMul", None, "encoder.layer.0"),
        ("Add_17", None, ""),
    ],
)
def test_module_paths_of_both_exporters(name: str, scopes: str | None, path: str) -> None:
    """From metadata or from the name, without the wrapper that exporting put around the model."""
    assert module_path(node(name, **({} if scopes is None else {SCOPES: scopes}))) == path


def scoped(path: Path, source: Path) -> Path:
    """The model with scopes and stack traces as the exporter writes them."""
    model = onnx.load(source)
    for one in model.graph.node:
        for key, value in {
            "pkg.torch.onnx.name_scopes": f"['', 'inner', 'inner.of_{one.output[0]}', 'op']",
            "pkg.torch.onnx.stack_trace": 'File "/home/somebody/model.py", line 1',
        }.items():
            entry = one.metadata_props.add()
            entry.key, entry.value = key, value
    onnx.save(model, path)
    return path


def test_a_released_file_keeps_modules_and_nothing_of_the_machine(
    pictures: Any, tmp_path: Path
) -> None:
    """Also after a second clean-up, as of a released file that is given again."""
    model = onnxio.load_ir(scoped(tmp_path / "scoped.onnx", pictures.reference))
    for _ in range(2):
        clean(model, release=True)
        onnxio.save_ir(model, tmp_path / "released.onnx")
        assert b"somebody" not in (tmp_path / "released.onnx").read_bytes()
        released = onnx.load(tmp_path / "released.onnx")
        paths = {one.output[0]: module_path(one) for one in released.graph.node}
        assert paths["wide"] == "of_wide"
        assert all(
            {p.key for p in one.metadata_props} <= {MODULE_KEY} for one in released.graph.node
        )
        model = onnxio.load_ir(tmp_path / "released.onnx")


def test_nodes_that_a_pass_put_in_belong_to_their_neighbours() -> None:
    """Q and DQ of an activation to its maker, the DQ of a weight to its reader."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        g (float[n, 2] x) => (float[n, 2] y) {
            weight = DequantizeLinear(stored, scale, zero)
            product = MatMul(x, weight)
            rounded = QuantizeLinear(product, scale, zero)
            back = DequantizeLinear(rounded, scale, zero)
            y = Relu(back)
        }
        """
    )
    for place, text in {1: "['', 'inner', 'inner.fc', 'a']", 4: "['', 'inner', 'b']"}.items():
        entry = model.graph.node[place].metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", text
    assert list(module_paths(model).values()) == ["fc", "fc", "fc", "fc", ""]


def test_the_module_of_a_node_without_metadata_is_that_of_the_reference(
    pictures: Any, tmp_path: Path
) -> None:
    """An optimiser that drops metadata keeps the names of values."""
    reference = scoped(tmp_path / "scoped.onnx", pictures.reference)
    model = onnx.load(pictures.reference)
    next(t for t in model.graph.initializer if t.name == "point_bias").raw_data = bytes(32)
    onnx.save(model, tmp_path / "candidate.onnx")
    found = find_blame(
        reference, tmp_path / "candidate.onnx", feeds=pictures.feeds, settings=SETTINGS
    )
    assert found.first is not None
    assert (found.first.node, found.first.module) == ("node_point", "of_point")
    assert "of module of_point" in found.in_words()


def requantised(folder: Path, subject: Any) -> Path:
    """``folder/model.onnx`` in int8, by the ranges of ``subject``."""
    kept = subject.reference.parent
    config = QuantizeConfig(
        model=folder / "model.onnx",
        quantization=StaticInt8(),
        scheme=Int8Scheme(
            activation="uint8", weight="int8", per_channel=True, saturates=False, reason="a test"
        ),
        samples=kept / "rows",
        statistics=kept / "statistics",
    )
    return folder / "int8" / quantize(config, output=folder / "int8").file


def test_our_quantiser_keeps_modules(pictures: Any, tmp_path: Path) -> None:
    """Every node of the int8 file can be traced back, those of Q/DQ too."""
    scoped(tmp_path / "model.onnx", pictures.reference)
    made = requantised(tmp_path, pictures)
    paths = module_paths(onnx.load(made))
    assert all(paths.values())
    assert {"of_wide", "of_depth", "of_y"} <= set(paths.values())


def measured(reference: Path, candidate: Any, feeds: list, *, group_bytes: int = 10**9) -> Any:
    graph = CutGraph(candidate, onnx.load(reference))
    run = ReferenceRun(reference)
    return graph, measure_pieces(graph, run, feeds=feeds, group_bytes=group_bytes)


@pytest.mark.parametrize("name", ["block", "pictures"])
def test_noise_explains_what_int8_and_float16_round_away(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Noise of the size of its rounding makes the error of every honest layer, times 3 at most."""
    subject = request.getfixturevalue(name)
    rows = onnx.load(subject.reference)
    half = onnx.shape_inference.infer_shapes(rows)
    converted, _ = convert_to_half(
        half, Halves(dtype="float16"), rows=_rows(subject.feeds, tmp_path)
    )
    for candidate in (onnx.load(subject.int8), converted):
        _, found = measured(subject.reference, candidate, subject.feeds)
        rounded = [
            error.unrounded / error.explained
            for piece, error in found
            if error.unrounded and error.explained and piece.arithmetic in {"int8", "float16"}
        ]
        assert len(rounded) > 3
        assert 0.3 < np.median(rounded) < 2
        assert max(rounded) < 3


def _rows(feeds: list, folder: Path) -> Any:
    from equipoise.data.store import Rows, write_rows

    write_rows(folder / "rows", feeds)
    return Rows(folder / "rows")


def test_memory_is_bounded_and_the_groups_do_not_matter(pictures: Any) -> None:
    """One piece at a time gives the same errors as all together."""
    model = onnx.load(pictures.int8)
    _, together = measured(pictures.reference, model, pictures.feeds)
    _, alone = measured(pictures.reference, model, pictures.feeds, group_bytes=1)
    assert [p.value for p, _ in together] == [p.value for p, _ in alone]
    for (_, left), (_, right) in zip(together, alone, strict=True):
        assert left.relative == pytest.approx(right.relative, rel=1e-6)
        assert left.explained == pytest.approx(right.explained, rel=0.5)


def test_a_clip_that_a_grid_does_is_no_departure(pictures: Any) -> None:
    """Our quantiser takes it out: the convolution gives more than 6, and its grid ends there."""
    model = onnx.load(pictures.int8)
    assert "Clip" not in {one.op_type for one in model.graph.node}
    graph, found = measured(pictures.reference, model, pictures.feeds)
    by_value = {one.piece.value: one for one in judge(graph, found)}
    assert not by_value["wide_active"].departs
    assert by_value["wide_active"].error.relative < 0.05
    assert graph.bounds("wide_active") is not None


def test_values_that_stand_for_others_are_known(pictures: Any) -> None:
    """What comes back from a grid stands for what was put on it."""
    graph = CutGraph(onnx.load(pictures.int8), onnx.load(pictures.reference))
    assert graph.shared["wide_active.dequantized"] == "wide_active"
    assert "wide_weight.dequantized" not in graph.shared


def test_a_value_of_which_a_part_goes_another_way_does_not_stand_for_it() -> None:
    """Outlier channels left in float: the grid may cut them off, since their weights are zero."""
    reference = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x) y = MatMul(a, w) }
        """
    )
    candidate = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        g (float[n, 4] x) => (float[n, 4] y) {
            a = Relu(x)
            a_q = QuantizeLinear(a, scale, zero)
            a_back = DequantizeLinear(a_q, scale, zero)
            most = MatMul(a_back, w_most)
            some = Gather <axis = 1> (a, channels)
            rest = MatMul(some, w_rest)
            y = Add(most, rest)
        }
        """
    )
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 4)).astype(np.float32)
    most = weight.copy()
    most[3] = 0
    reference.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    for name, array in {
        "w_most": most, "w_rest": weight[3:], "channels": np.array([3]),
        "scale": np.float32(0.01), "zero": np.uint8(0),
    }.items():  # fmt: skip
        candidate.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    graph = CutGraph(candidate, reference)
    assert set(graph.shared) == {"x", "a", "y"}


def test_a_graph_inside_a_node_reads_what_is_around_it(tmp_path: Path) -> None:
    """A branch of an If captures a shared value; it is given to the piece too."""
    text = """
        <ir_version: 9, opset_import: ["" : 20]>
        g (float[n, 4] x, bool c) => (float[n, 4] y) {
            a = Relu(x)
            b = If (c) <
                then_branch = then () => (t) { t = Add(a, one) },
                else_branch = else () => (e) { e = Sub(a, one) }
            >
            y = Sigmoid(b)
        }
        """
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "one"))
    onnx.save(model, tmp_path / "reference.onnx")
    branch = model.graph.node[1].attribute[0].g
    branch.node[0].op_type = "Sub" if branch.node[0].op_type == "Add" else "Add"
    branch = model.graph.node[1].attribute[1].g
    branch.node[0].op_type = "Sub" if branch.node[0].op_type == "Add" else "Add"
    onnx.save(model, tmp_path / "candidate.onnx")
    feeds = [{"x": np.ones((2, 4), np.float32), "c": np.ones((), bool)}]
    for name, guilty in {"reference": None, "candidate": "If_1"}.items():
        found = find_blame(
            tmp_path / "reference.onnx", tmp_path / f"{name}.onnx", feeds=feeds, settings=SETTINGS
        )
        assert (found.first.node if found.first else None) == guilty


@pytest.mark.parametrize(
    ("wanted", "given", "relative"),
    [
        ([1.0, -np.inf], [1.0, -np.inf], 0.0),
        ([1.0, -3e38], [1.0, -65504.0], 0.0),
        ([1.0, -np.inf], [1.0, -10.0], np.inf),
        ([1.0, -np.inf], [1.0, np.inf], np.inf),
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([1.0, 2.0], [1.0, np.nan], np.inf),
        ([1.0, 2.0], [1.0, np.inf], np.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1.0], np.inf),
        ([3.0, 4.0], [3.0, 4.5], 0.1),
        ([True, False], [True, False], 0.0),
        ([], [], 0.0),
    ],
)
def test_errors_of_masks_and_of_what_is_not_finite(
    wanted: list, given: list, relative: float
) -> None:
    """A mask is as good in any size that masks; NaN where a number should be is no number."""
    meter = PieceMeter()
    meter.add(np.array(wanted), np.array(given))
    assert meter.result().relative == pytest.approx(relative)


def test_another_shape_is_a_departure_of_its_own() -> None:
    meter = PieceMeter()
    meter.add(np.ones((2, 3)), np.ones((3, 2)))
    assert meter.result().shape == "its shape is [3, 2], not [2, 3]"


def test_what_lies_beyond_the_next_grid_is_left_to_it() -> None:
    meter = PieceMeter((np.array(0.0), np.array(6.0)))
    meter.add(np.array([6.0, 1.0]), np.array([9.0, 1.0]))
    assert meter.result().relative == 0.0


def test_a_candidate_of_another_model_is_refused(block: Any, pictures: Any) -> None:
    """The input that the reference does not have is named."""
    with pytest.raises(InputError, match="'mask'"):
        find_blame(pictures.reference, block.reference, feeds=block.feeds, settings=SETTINGS)


def test_files_that_are_no_models_are_refused(block: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for reference, candidate in (
        (tmp_path / "bad.onnx", block.reference),
        (block.reference, tmp_path / "bad.onnx"),
        (block.reference, tmp_path / "missing.onnx"),
    ):
        with pytest.raises(SourceError):
            find_blame(reference, candidate, feeds=block.feeds, settings=SETTINGS)


def test_inputs_that_do_not_fit_are_refused(block: Any) -> None:
    feeds = [{"x": np.ones((1, 8, 15), np.float32), "mask": block.feeds[0]["mask"]}]
    with pytest.raises(InputError, match="'x'"):
        find_blame(block.reference, block.int8, feeds=feeds, settings=SETTINGS)


def test_another_runtime_is_built_and_run(pictures: Any) -> None:
    """A runtime that compiles an engine is compared with what the file says."""
    pytest.importorskip("openvino")
    settings = BlameSettings(runtime="openvino")
    found = find_blame(
        pictures.reference, pictures.reference, feeds=pictures.feeds, settings=settings
    )
    assert found.first is None
    assert found.outputs_agree is True
