"""An ONNX file as a source: kept, proved against itself without graph rewriting, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from equipoise.data.store import Rows, write_rows
from equipoise.errors import InputError, NonFiniteError, SourceError, UsageError
from equipoise.export.export import ExportConfig, export
from equipoise.export.reference import ReferenceConfig, run_reference
from equipoise.export.signature import SignatureConfig, read_signature
from equipoise.sources.source import Source, parse_source
from equipoise.spec import TensorSpec


def samples(folder: Path, name: str = "x", width: int = 4, value: float = 1.0) -> Path:
    generator = np.random.default_rng(0)
    rows = [
        {name: (value * generator.normal(size=(1, width))).astype(np.float32)} for _ in range(5)
    ]
    write_rows(folder / "rows", rows)
    return folder / "rows"


def config(source: Source, rows: Path, name: str = "x") -> ExportConfig:
    spec = TensorSpec(name=name, dtype="float32", shape=("batch", 4))
    return ExportConfig(source=source, samples=rows, inputs=(spec,))


def test_onnx_file_is_kept_as_it_is(linear_onnx: Path, tmp_path: Path) -> None:
    """Nothing to clean: the same operators, versions read back, parity at three batches."""
    (tmp_path / "out").mkdir()
    source = parse_source(str(linear_onnx))
    record = export(config(source, samples(tmp_path)), output=tmp_path / "out")
    found = record.verified
    assert (record.exporter, found.opset, found.ir_version) == ("none", 20, 9)
    assert [s.name for s in found.outputs] == ["y"]
    assert {entry.sizes["batch"] for entry in found.parity} == {1, 2, 3}
    kept = onnx.load(tmp_path / "out/model.onnx").graph
    assert [n.op_type for n in kept.node] == ["MatMul", "Add", "Relu"]
    assert [n.name for n in kept.input] == ["x"]


def test_fixed_batch_is_no_fault(linear_onnx: Path, tmp_path: Path) -> None:
    """There is nothing to compare at another batch then."""
    model = onnx.load(linear_onnx)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    (tmp_path / "out").mkdir()
    source = parse_source(str(tmp_path / "fixed.onnx"))
    record = export(config(source, samples(tmp_path)), output=tmp_path / "out")
    assert len(record.verified.parity) == 1


def test_reference_of_an_onnx_file_is_itself(linear_onnx: Path, tmp_path: Path) -> None:
    """One row of outputs for each sample, said to be float ONNX."""
    rows, output = samples(tmp_path), tmp_path / "reference"
    source = parse_source(str(linear_onnx))
    found = run_reference(
        ReferenceConfig(source=source, samples=rows, names=("x",)), output=output
    )  # fmt: skip
    assert (found.by, found.samples) == ("float ONNX", 5)
    assert Rows(output)[0]["y"].shape == (1, 3)


def test_signature_is_that_of_the_graph(linear_onnx: Path, tmp_path: Path) -> None:
    """Names of the inputs; weights are none."""
    source = parse_source(str(linear_onnx))
    assert read_signature(SignatureConfig(source=source), output=tmp_path).names == ("x",)


def test_outputs_that_are_not_finite_are_named(linear_onnx: Path, tmp_path: Path) -> None:
    """By export and by the reference alike, with the sample."""
    model = onnx.load(linear_onnx)
    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.full((4, 3), 3e38, np.float32), "w")
    )
    onnx.save(model, tmp_path / "huge.onnx")
    source = parse_source(str(tmp_path / "huge.onnx"))
    rows = samples(tmp_path, value=100.0)
    with pytest.raises(NonFiniteError, match=r"huge\.onnx: output 'y' of sample batch 2"):
        export(config(source, rows), output=tmp_path / "out")
    reference = ReferenceConfig(source=source, samples=rows, names=("x",))
    with pytest.raises(NonFiniteError, match=r"float ONNX: output 'y' of sample \d"):
        run_reference(reference, output=tmp_path / "reference")
    assert not (tmp_path / "reference" / "rows.json").exists()


def test_files_that_are_no_source_are_named(linear_onnx: Path, tmp_path: Path) -> None:
    """Missing, no ONNX, another suffix, weights that have no place, an unknown task."""
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "model.pt").write_bytes(b"")
    for name, words in (("none.onnx", "no such ONNX file"), ("model.pt", "is no source")):
        with pytest.raises(SourceError, match=words) as raised:
            parse_source(str(tmp_path / name))
        assert name in raised.value.message
    with pytest.raises(SourceError, match=r"--weights goes with a module.*model\.onnx"):
        parse_source(str(linear_onnx), weights=tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"'token-clasification'.*\n.*'token-classification'"):
        parse_source(str(linear_onnx), task="token-clasification")
    text = parse_source(str(tmp_path / "text.onnx"))
    with pytest.raises(SourceError, match=r"text\.onnx is not a valid ONNX model"):
        export(config(text, samples(tmp_path)), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_does_not_fit_the_file_is_named(linear_onnx: Path, tmp_path: Path) -> None:
    """Another name, and another width."""
    source = parse_source(str(linear_onnx))
    rows = samples(tmp_path / "a", name="image")
    with pytest.raises(SourceError, match=r"takes \['x'\]; the data has \['image'\]"):
        export(config(source, rows, name="image"), output=tmp_path / "out")
    with pytest.raises(InputError, match=r"'x' is float32\[1, 7\]"):
        export(config(source, samples(tmp_path / "b", width=7)), output=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("module:shop", "w.safetensors", "'module:shop' names no function"),
        ("module::make", "w.safetensors", "'module::make' names no function"),
        ("module:no.such:make", "w.safetensors", r"module 'no\.such' cannot be found"),
        ("module:shop:make", None, "'module:shop:make' needs its weights"),
        ("module:shop:make", "none.safetensors", r"none\.safetensors: not an existing"),
    ],
)
def test_factories_that_cannot_be_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, weights: str | None, words: str
) -> None:
    """Before anything is imported: the module would fail."""
    monkeypatch.chdir(tmp_path)
    Path("shop.py").write_text("raise SystemExit('imported')")
    Path("w.safetensors").write_bytes(b"")
    Path("w.pt").write_bytes(b"")
    with pytest.raises(SourceError, match=words):
        parse_source(name, weights=None if weights is None else Path(weights))


def test_an_edit_of_the_code_beside_a_factory_counts(tmp_path, monkeypatch) -> None:
    """Its hash is in the source, so that no cached stage is taken for the new code."""
    monkeypatch.chdir(tmp_path)
    Path("shop.py").write_text("import layers")
    Path("layers.py").write_text("width = 4")
    Path("w.safetensors").write_bytes(b"")
    hashes = []
    for text in ("width = 4", "width = 5", "width = 4"):
        Path("layers.py").write_text(text)
        hashes.append(parse_source("module:shop:make", weights=Path("w.safetensors")).code_sha256)
    assert hashes[0] == hashes[2] != hashes[1]
