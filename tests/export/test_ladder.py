"""The ladder of exporters: what one cannot take another may, and parity picks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from equipoise.data.store import write_rows
from equipoise.errors import (
    FrozenDimensionError,
    IncompatibleError,
    ParityError,
    SourceError,
    UsageError,
)
from equipoise.export.blame import BlameConfig, find_departure
from equipoise.export.config import ExportConfig, ExportRecord
from equipoise.export.export import export
from equipoise.export.proving import Shapes
from equipoise.export.rung import RungConfig, run_rung
from equipoise.sources.source import Source, parse_source
from equipoise.spec import TensorSpec

MODULES = '''
import os, signal, time
import torch
from torch import nn

exporting = torch.compiler.is_exporting

class Net(nn.Module):
    """x [batch, sequence, 6] -> [batch, sequence, 4], in two named parts."""
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU())
        self.second = nn.Linear(8, 4)
    def forward(self, x):
        return self.second(self.first(x))

class Crashing(Net):
    def forward(self, x):
        if exporting():
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().forward(x)

class Hanging(Net):
    def forward(self, x):
        if exporting():
            time.sleep(600)
        return super().forward(x)

class Lying(Net):
    """Other numbers for torch.export than in PyTorch, inside the second part."""
    def __init__(self):
        super().__init__()
        self.second = Scaled()
class Scaled(nn.Linear):
    def __init__(self):
        super().__init__(8, 4)
    def forward(self, x):
        y = super().forward(x)
        return y * 1.01 if exporting() else y

class Frozen(Net):
    """Its code turns a size into a number, which no exporter can follow."""
    def forward(self, x):
        return super().forward(x).reshape(int(x.shape[0]), -1, 4)

class Everywhere(Net):
    def forward(self, x):
        if exporting() or torch.jit.is_tracing():
            raise RuntimeError("not to be exported")
        return super().forward(x)
'''
X = TensorSpec(name="x", dtype="float32", shape=("batch", "sequence", 6))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory on the module path with modules, weights and samples of two lengths."""
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "ladder_shop.py").write_text(MODULES)
    sys.path.insert(0, str(folder))
    import ladder_shop

    torch.manual_seed(0)
    save_file(ladder_shop.Net().state_dict(), folder / "w.safetensors")
    generator = np.random.default_rng(0)
    rows = [{"x": generator.normal(size=(1, 5 + i % 2, 6)).astype(np.float32)} for i in range(4)]
    write_rows(folder / "rows", rows)
    yield folder
    sys.path.remove(str(folder))


def source(place: Path, name: str) -> Source:
    return parse_source(f"module:ladder_shop:{name}", weights=place / "w.safetensors")


def run(place: Path, name: str, output: Path, **settings: object) -> ExportRecord:
    output.mkdir()
    config = ExportConfig(
        source=source(place, name), samples=place / "rows", inputs=(X,), **settings
    )
    return export(config, output=output)


@pytest.fixture(autouse=True)
def _children_find_the_modules(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def test_the_first_exporter_that_agrees_is_kept(place: Path, tmp_path: Path) -> None:
    """Proved at the traced size and at others, batch 1 included; one file, one proof."""
    record = run(place, "Net", tmp_path / "out")
    assert record.exporter == "dynamo"
    sizes = [entry.sizes for entry in record.verified.parity]
    assert {"batch": 1, "sequence": 6} in sizes
    assert {"batch": 3, "sequence": 4} in sizes
    assert len(sizes) >= 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.onnx", "proof"]
    assert record.proof.floor_by == "the model in float64 and a second run"


def test_an_exporter_that_crashes_is_a_line_in_the_record(place: Path, tmp_path: Path) -> None:
    """The next one is tried, and the record says which and why."""
    record = run(place, "Crashing", tmp_path / "out")
    assert record.exporter == "torchscript"
    assert "dynamo: " in record.notes[0]
    assert "SIGSEGV" in record.notes[0]
    assert record.notes[-1].startswith("torchscript: agrees")


@pytest.mark.slow
def test_an_exporter_that_hangs_is_stopped_at_its_limit(place: Path, tmp_path: Path) -> None:
    """And is a line in the record."""
    record = run(place, "Hanging", tmp_path / "out", rung_time_limit_s=20.0)
    assert record.exporter == "torchscript"
    assert "did not finish within 20 s" in record.notes[0]


def test_wrong_numbers_are_refused_and_traced_to_their_module(place: Path, tmp_path: Path) -> None:
    """torch.export itself departs here; the module is named and nothing is written."""
    with pytest.raises(ParityError, match=r"torch\.export, is .* of module second") as caught:
        run(place, "Lying", tmp_path / "out", exporter="dynamo")
    assert "Nothing was written" in caught.value.hint
    assert not (tmp_path / "out/model.onnx").exists()


def test_a_dimension_that_came_out_frozen_is_an_error_that_names_it(
    place: Path, tmp_path: Path
) -> None:
    """Whatever the exporter said."""
    with pytest.raises(FrozenDimensionError, match="'batch' was frozen"):
        run(place, "Frozen", tmp_path / "out")


def test_dimensions_that_are_not_asked_for_are_fixed(place: Path, tmp_path: Path) -> None:
    """And a model that freezes its batch is fine when only the sequence has to be dynamic."""
    shapes = Shapes(dynamic=("sequence",), fixed={"batch": 1})
    record = run(place, "Frozen", tmp_path / "out", shapes=shapes)
    assert record.verified.inputs[0].shape == (1, "sequence", 6)


def test_static_has_no_dynamic_dimension(place: Path, tmp_path: Path) -> None:
    """At the sizes given."""
    shapes = Shapes(dynamic=(), fixed={"sequence": 9})
    record = run(place, "Net", tmp_path / "out", shapes=shapes)
    assert record.verified.inputs[0].shape == (1, 9, 6)
    assert record.verified.outputs[0].shape == (1, 9, 4)


def test_a_dimension_that_no_input_has_is_a_usage_error(place: Path, tmp_path: Path) -> None:
    """The ones there are are named."""
    with pytest.raises(UsageError, match="no input has a dimension 'height'; there are batch"):
        run(place, "Net", tmp_path / "out", shapes=Shapes(dynamic=("height",)))


def test_an_unknown_exporter_is_a_usage_error(place: Path, tmp_path: Path) -> None:
    """The known ones are named."""
    with pytest.raises(
        UsageError, match="known: dynamo, dynamo-decomposed, dynamo-eager, torchscript"
    ):
        run(place, "Net", tmp_path / "out", exporter="dinamo")


def test_a_module_that_nothing_can_export_has_a_line_per_exporter(
    place: Path, tmp_path: Path
) -> None:
    """The innermost cause of each."""
    with pytest.raises(SourceError) as caught:
        run(place, "Everywhere", tmp_path / "out")
    lines = caught.value.message.splitlines()
    assert [line.strip().partition(":")[0] for line in lines[1:]] == [
        "dynamo", "dynamo-eager", "dynamo-decomposed", "torchscript",
    ]  # fmt: skip
    assert all("not to be exported" in line for line in lines[1:])


@pytest.mark.parametrize("opset", [pytest.param(13, marks=pytest.mark.slow), 18, 23])
def test_opset_is_what_was_asked_for(place: Path, tmp_path: Path, opset: int) -> None:
    """Read back from the file; an exporter that silently misses it is passed over."""
    record = run(place, "Net", tmp_path / "out", opset=opset)
    assert record.verified.opset == opset
    assert onnx.load(tmp_path / "out/model.onnx").opset_import[0].version == opset


@pytest.mark.slow
def test_an_opset_that_no_exporter_gives_is_incompatible(place: Path, tmp_path: Path) -> None:
    """It is not written under another number."""
    with pytest.raises(IncompatibleError, match="opset 99"):
        run(place, "Net", tmp_path / "out", opset=99)


@pytest.mark.slow
def test_an_ir_version_above_the_targets_is_incompatible(place: Path, tmp_path: Path) -> None:
    """Opset 23 needs IR version 11."""
    with pytest.raises(IncompatibleError, match="IR version"):
        run(place, "Net", tmp_path / "out", opset=23, max_ir_version=10)


def test_metadata_of_the_exporter_is_left_out_of_a_release(place: Path, tmp_path: Path) -> None:
    """Names of Python files belong to nobody's device; without --release they help diagnosis."""
    run(place, "Net", tmp_path / "plain")
    run(place, "Net", tmp_path / "release", release=True)
    assert b"ladder_shop.py" in (tmp_path / "plain/model.onnx").read_bytes()
    assert b"ladder_shop" not in (tmp_path / "release/model.onnx").read_bytes()


def _spoil(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    """Make a node wrong in a way that its operator allows."""
    for attribute in node.attribute:
        if attribute.name == "epsilon":
            attribute.f = 0.5
            return
    weight = next(t for t in model.graph.initializer if t.name in node.input and len(t.dims) == 2)
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0, 0] += 0.1
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))


@pytest.mark.parametrize("rung", ["dynamo", "dynamo-eager", "dynamo-decomposed", "torchscript"])
@pytest.mark.parametrize("operator", ["linear", "LayerNormalization"])
def test_a_fault_planted_in_one_node_is_named(
    place: Path, tmp_path: Path, rung: str, operator: str
) -> None:
    """The node, or in a traced graph the last node of its module."""
    settings = RungConfig(
        source=source(place, "Net"), rung=rung, proof=tmp_path / "proof", samples=place / "rows",
        inputs=(X,), shapes=Shapes(), opset=20, max_ir_version=13,
    )  # fmt: skip
    run_rung(settings, output=tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    kinds = {"MatMul", "Gemm"} if operator == "linear" else {operator}
    node = next(n for n in model.graph.node if n.op_type in kinds)
    _spoil(node, model)
    onnx.save(model, tmp_path / "spoilt.onnx")
    found = find_departure(
        BlameConfig(model=tmp_path / "spoilt.onnx", rung=settings), output=tmp_path
    )
    assert found.module == {"linear": "first.0", "LayerNormalization": "first.1"}[operator]
    assert found.step == "the translation to ONNX"
    assert found.before < 1e-5 < found.relative
    assert "first node that departs" in found.in_words()
