"""Proofs: an ONNX file against what its source gave, at every size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from equipoise.errors import FrozenDimensionError, IntegrityError, ParityError, SourceError
from equipoise.parity.proof import (
    ProofRecord,
    VerifyConfig,
    has_proof,
    read_proof,
    verify,
    write_proof,
)
from equipoise.parity.tolerance import Tolerance
from equipoise.spec import TensorSpec

X = TensorSpec(name="x", dtype="float32", shape=("batch", "sequence", 4))
RUNS = ({"batch": 2, "sequence": 6}, {"batch": 1, "sequence": 6}, {"batch": 2, "sequence": 3})


def model(
    folder: Path, *, body: str, shape: str = "batch, sequence, 4", out: str = "b, s, 4"
) -> Path:
    """An ONNX file from text."""
    text = f"""
        <ir_version: 9, opset_import: ["" : 20]>
        g (float[{shape}] x) => (float[{out}] y)
        <float two = {{2.0}}, int64[3] frozen = {{2, -1, 4}}, int64[3] fixed = {{-1, 6, 4}}>
        {{ {body} }}
    """
    path = folder / "model.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """``y = 2 x`` at three sizes."""
    generator = np.random.default_rng(0)
    feeds = [
        {"x": generator.normal(size=(s["batch"], s["sequence"], 4)).astype(np.float32)}
        for s in RUNS
    ]
    record = ProofRecord(
        inputs=(X,),
        runs=RUNS,
        tolerances=(Tolerance(output="y", atol=1e-5, floor=1e-7),),
        reference="PyTorch",
        made_by="a test",
        floor_by="a test",
    )
    write_proof(
        tmp_path / "proof", record, inputs=feeds, outputs=[{"y": 2 * f["x"]} for f in feeds]
    )
    return tmp_path / "proof"


def check(path: Path, proof: Path, **sizes: int) -> Sequence[object]:
    return verify(VerifyConfig(model=path, proof=proof, sizes=sizes), output=path.parent).parity


def test_a_file_that_agrees_is_compared_at_every_size(tmp_path: Path, proof: Path) -> None:
    """One entry per combination of sizes, and the versions read back."""
    found = verify(
        VerifyConfig(model=model(tmp_path, body="y = Mul(x, two)"), proof=proof, sizes={}),
        output=tmp_path,
    )
    assert [entry.sizes for entry in found.parity] == list(RUNS)
    assert (found.opset, found.ir_version) == (20, 9)
    assert all(entry.outputs[0].max_abs == 0 for entry in found.parity)


def test_wrong_numbers_name_the_output_the_sizes_and_the_limit(tmp_path: Path, proof: Path) -> None:
    """The error says by how much."""
    with pytest.raises(
        ParityError, match=r"batch 2, sequence 6: output 'y' differs.*allowed 1e-05"
    ):
        check(model(tmp_path, body="y = Add(x, two)"), proof)


@pytest.mark.parametrize(
    ("body", "shape", "words"),
    [
        ("y = Mul(x, two)", "batch, 6, 4", "'sequence' was frozen.*input 'x' takes only 6"),
        ("y = Mul(x, two)", "2, sequence, 4", "'batch' was frozen.*input 'x' takes only 2"),
        ("z = Mul(x, two) y = Reshape(z, frozen)", "batch, sequence, 4", "'batch' was frozen"),
        ("z = Mul(x, two) y = Reshape(z, fixed)", "batch, sequence, 4", "'sequence' was frozen"),
    ],
)
def test_a_frozen_dimension_is_named(
    tmp_path: Path, proof: Path, body: str, shape: str, words: str
) -> None:
    """Whether it shows in the inputs or only when the file runs at another size."""
    with pytest.raises(FrozenDimensionError, match=words):
        check(model(tmp_path, body=body, shape=shape), proof)


def test_a_file_with_fixed_sizes_is_judged_by_the_runs_of_those(
    tmp_path: Path, proof: Path
) -> None:
    """A bucket of one size is no frozen dimension."""
    fixed = model(tmp_path, body="y = Mul(x, two)", shape="1, 6, 4", out="1, 6, 4")
    assert [entry.sizes for entry in check(fixed, proof, batch=1, sequence=6)] == [RUNS[1]]


def test_sizes_that_were_never_proved_are_refused(tmp_path: Path, proof: Path) -> None:
    """No run, no parity."""
    fixed = model(tmp_path, body="y = Mul(x, two)", shape="5, 6, 4", out="5, 6, 4")
    with pytest.raises(ParityError, match=r"batch 5, sequence 6.*nothing was proved"):
        check(fixed, proof, batch=5, sequence=6)


def test_a_file_that_does_not_run_is_no_frozen_dimension(tmp_path: Path, proof: Path) -> None:
    """It fails at the traced size too."""
    broken = model(tmp_path, body="n = Shape(x) z = Expand(two, n) y = Reshape(z, n2)".replace(
        "n2", "broken"), out="b, s, 4")  # fmt: skip
    loaded = onnx.load(broken)
    loaded.graph.initializer.append(onnx.numpy_helper.from_array(np.array([5, 5, 5]), "broken"))
    onnx.save(loaded, broken)
    with pytest.raises(SourceError, match="does not run"):
        check(broken, proof)


def test_other_inputs_than_the_sources_are_named(tmp_path: Path, proof: Path) -> None:
    """Both lists are in the message."""
    renamed = onnx.load(model(tmp_path, body="y = Mul(x, two)"))
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "other"
    onnx.save(renamed, tmp_path / "renamed.onnx")
    with pytest.raises(ParityError, match=r"takes \['other'\]; the source takes \['x'\]"):
        check(tmp_path / "renamed.onnx", proof)


def test_no_proof_is_an_integrity_error(tmp_path: Path) -> None:
    """And has_proof says so beforehand."""
    assert not has_proof(tmp_path)
    with pytest.raises(IntegrityError, match=r"proof\.json"):
        read_proof(tmp_path)
