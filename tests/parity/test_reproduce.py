"""Reproducers: they run by themselves, fail while the fault is there, and hold nothing private."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from equipoise.errors import DataError, OutputError
from equipoise.parity.blame import BlameSettings, find_blame
from equipoise.parity.reproduce import write_reproducer
from equipoise.runtimes.protocol import SessionSettings

SETTINGS = BlameSettings()


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    """The script alone, where equipoise cannot be imported."""
    code = "import sys, runpy; sys.modules['equipoise'] = None; sys.modules['onnx'] = None;"
    code += "runpy.run_path('reproduce.py', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
    )


def wrong_norm(reference: Path, folder: Path) -> Path:
    """A layer normalisation with another epsilon and a stack trace in its metadata."""
    model = onnx.load(reference)
    node = next(n for n in model.graph.node if n.name == "node_normed")
    kept = [a for a in node.attribute if a.name != "epsilon"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("epsilon", 0.1)])
    helper.set_model_props(model, {"owner": "somebody"})
    for key, value in {
        "pkg.torch.onnx.name_scopes": "['', 'inner', 'inner.norms.0', 'layer_norm']",
        "pkg.torch.onnx.stack_trace": 'File "/home/somebody/model.py", line 1',
    }.items():
        entry = node.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(model, folder / "candidate.onnx")
    return folder / "candidate.onnx"


def test_a_reproducer_runs_by_itself_and_fails(block: Any, tmp_path: Path) -> None:
    """One node, its weights, its inputs; the reference's piece beside it is right."""
    candidate = wrong_norm(block.reference, tmp_path)
    files = {"reference": block.reference, "candidate": candidate, "feeds": block.feeds}
    found = find_blame(block.reference, candidate, feeds=block.feeds, settings=SETTINGS)
    assert found.first is not None
    assert found.first.module == "norms.0"
    written = write_reproducer(tmp_path / "case", found.first, **files, settings=SETTINGS)
    assert written.fails
    assert written.reference
    assert written.nodes == 1
    result = run(tmp_path / "case")
    assert result.returncode == 1, result.stderr
    assert "it still fails" in result.stdout
    assert "reference.onnx (optimize=none): off by 0 of its size" in result.stdout
    readme = (tmp_path / "case" / "README.md").read_text()
    assert "node_normed" in readme
    assert "norms.0" in readme
    content = b"".join(file.read_bytes() for file in (tmp_path / "case").iterdir())
    assert b"/home/somebody" not in content
    assert str(tmp_path).encode() not in content


def test_a_mended_model_passes_its_reproducer(block: Any, tmp_path: Path) -> None:
    """The exit code goes by what is there, not by what was found once."""
    candidate = wrong_norm(block.reference, tmp_path)
    files = {"reference": block.reference, "candidate": candidate, "feeds": block.feeds}
    found = find_blame(block.reference, candidate, feeds=block.feeds, settings=SETTINGS)
    assert found.first is not None
    write_reproducer(tmp_path / "case", found.first, **files, settings=SETTINGS)
    model = onnx.load(tmp_path / "case" / "model.onnx")
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(a for a in norm.attribute if a.name == "epsilon").f = 1e-12
    onnx.save(model, tmp_path / "case" / "model.onnx")
    result = run(tmp_path / "case")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "does not fail" in result.stdout


def test_a_piece_that_does_not_run_is_reproduced(pictures: Any, tmp_path: Path) -> None:
    """A weight that does not fit the convolution: the failure itself is what is reproduced."""
    model = onnx.load(pictures.reference)
    tensor = next(t for t in model.graph.initializer if t.name == "point_weight")
    tensor.CopyFrom(numpy_helper.from_array(np.ones((8, 7, 1, 1), np.float32), tensor.name))
    onnx.save(model, tmp_path / "candidate.onnx")
    files = {"reference": pictures.reference, "candidate": tmp_path / "candidate.onnx"}
    found = find_blame(*files.values(), feeds=pictures.feeds, settings=SETTINGS)
    assert found.first is not None
    assert found.first.node == "node_point"
    assert "does not run" in found.in_words()
    written = write_reproducer(
        tmp_path / "case", found.first, **files, feeds=pictures.feeds, settings=SETTINGS
    )
    assert written.fails
    assert run(tmp_path / "case").returncode == 1


def rounded_by_the_runtime(folder: Path) -> tuple[Path, Path, list[dict[str, np.ndarray]]]:
    """A float convolution between DequantizeLinear and QuantizeLinear.

    ONNX Runtime takes it for one that was to be quantised and rounds its float weights to one scale
    for the whole tensor. The largest weights here meet a channel that is zero, and all others
    become zero.
    """
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    kernel[:, 2] *= 1000
    constants = {
        "kernel": kernel, "bias": np.zeros(4, np.float32), "zero": np.uint8(128),
        "step": np.float32(0.03), "wide": np.float32(0.15),
    }  # fmt: skip
    plain = """(float[batch, 3, 8, 8] x) => (float[batch, 4, 8, 8] y) {
        before = Relu(x)
        convolved = Conv <pads = [1, 1, 1, 1]> (%s, kernel, bias)
        %s
        y = Sigmoid(%s)
    }"""
    quantised = plain % (
        "x_back",
        "c_q = QuantizeLinear(convolved, wide, zero)\n c_back = DequantizeLinear(c_q, wide, zero)",
        "c_back",
    )
    quantised = quantised.replace(
        "convolved =",
        "x_q = QuantizeLinear(before, step, zero)\n x_back = DequantizeLinear(x_q, step, zero)\n"
        " convolved =",
    )
    texts = {"reference": plain % ("before", "", "convolved"), "candidate": quantised}
    for name, text in texts.items():
        model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> g {text}')
        read = {i for node in model.graph.node for i in node.input}
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items() if n in read
        )
        for node in model.graph.node:
            node.name = f"node_{node.output[0]}"
        onnx.save(model, folder / f"{name}.onnx")
    x = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)
    x[:, 2] = -1
    feeds = [{"x": x}]
    return folder / "reference.onnx", folder / "candidate.onnx", feeds


def test_a_fault_of_the_runtime_is_told_from_one_of_the_file(tmp_path: Path) -> None:
    """Right as written, wrong as optimised: the smallest piece is the one that is rewritten."""
    reference, candidate, feeds = rounded_by_the_runtime(tmp_path)
    found = find_blame(reference, candidate, feeds=feeds, settings=SETTINGS)
    first = found.first
    assert first is not None
    assert (first.step, first.node, first.value) == ("runtime", "node_convolved", "c_back")
    assert set(first.piece) == {
        "node_x_q",
        "node_x_back",
        "node_convolved",
        "node_c_q",
        "node_c_back",
    }
    assert found.outputs_agree is False
    written = write_reproducer(
        tmp_path / "case",
        first,
        reference=reference,
        candidate=candidate,
        feeds=feeds,
        settings=SETTINGS,
    )
    assert written.fails
    assert written.nodes == 5
    assert run(tmp_path / "case").returncode == 1
    script = tmp_path / "case" / "reproduce.py"
    script.write_text(script.read_text().replace("OPTIMIZE = 'all'", "OPTIMIZE = 'none'"))
    assert run(tmp_path / "case").returncode == 0


def test_a_runtime_that_runs_as_written_is_not_blamed(tmp_path: Path) -> None:
    """The same file without optimisation."""
    reference, candidate, feeds = rounded_by_the_runtime(tmp_path)
    settings = BlameSettings(session=SessionSettings(optimize="none"))
    found = find_blame(reference, candidate, feeds=feeds, settings=settings)
    assert found.first is None
    assert found.outputs_agree is True


def test_no_inputs_is_refused(block: Any, tmp_path: Path) -> None:
    """Nothing can be compared on no inputs."""
    feeds: list[Any] = []
    candidate = wrong_norm(block.reference, tmp_path)
    found = find_blame(block.reference, candidate, feeds=block.feeds, settings=SETTINGS)
    assert found.first is not None
    with pytest.raises(DataError, match="no inputs"):
        find_blame(block.reference, candidate, feeds=feeds, settings=SETTINGS)
    files = {"reference": block.reference, "candidate": candidate, "feeds": feeds}
    with pytest.raises(DataError, match="no inputs"):
        write_reproducer(tmp_path / "case", found.first, **files, settings=SETTINGS)


def test_a_place_that_cannot_be_written_is_said(block: Any, tmp_path: Path) -> None:
    """A file stands where a directory is needed."""
    candidate = wrong_norm(block.reference, tmp_path)
    found = find_blame(block.reference, candidate, feeds=block.feeds, settings=SETTINGS)
    assert found.first is not None
    (tmp_path / "taken").write_text("x")
    files = {"reference": block.reference, "candidate": candidate, "feeds": block.feeds}
    with pytest.raises(OutputError):
        write_reproducer(tmp_path / "taken" / "case", found.first, **files, settings=SETTINGS)
