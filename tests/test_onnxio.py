"""Reading and saving ONNX models of any size, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from equipoise import onnxio
from equipoise.errors import IncompatibleError, SourceError


def linear(*, opset: int = 20, dtype: type = np.float32) -> onnx.ModelProto:
    """``y = x @ w`` with w[64, 64]."""
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", kind, ["batch", 64])],
        [helper.make_tensor_value_info("y", kind, ["batch", 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """The same model with its weight in ``weights.bin``."""
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    onnx.save_model(
        linear(), path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return path


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, 64), dtype=np.float32)})[0]


def rewrite(path: Path, key: str, value: str) -> None:
    """Change one entry of the external data of the first weight."""
    model = onnx.load(path, load_external_data=False)
    entries = model.graph.initializer[0].external_data
    next(entry for entry in entries if entry.key == key).value = value
    path.write_bytes(model.SerializeToString())


def test_small_model_with_external_data_becomes_one_file(external: Path, tmp_path: Path) -> None:
    """Read as a protobuf or as a graph, written as one file with the same numbers."""
    onnxio.save_model(onnxio.load_model(external), tmp_path / "a" / "model.onnx")
    onnxio.save_ir(onnxio.load_ir(external), tmp_path / "b" / "model.onnx")
    for folder in ("a", "b"):
        assert [p.name for p in (tmp_path / folder).iterdir()] == ["model.onnx"]
        np.testing.assert_array_equal(run(tmp_path / folder / "model.onnx"), run(external))


def test_external_weights_stay_on_disk_until_asked_for(external: Path) -> None:
    """load_ir maps; nothing is read."""
    model = onnxio.load_ir(external)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, onnx_ir.ExternalTensor)
    assert tensor.raw is None
    assert onnxio.ir_weight_bytes(model) == 64 * 64 * 4
    assert tensor.raw is None


@pytest.mark.parametrize("form", ["proto", "ir"])
def test_large_model_is_two_files(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the limit the weights lie in <name>.data; a small model of that name takes it away."""
    path = tmp_path / "out" / "model.onnx"
    save = onnxio.save_model if form == "proto" else onnxio.save_ir
    model = linear() if form == "proto" else onnx_ir.from_proto(linear())
    with monkeypatch.context() as patch:
        patch.setattr(onnxio, "_SINGLE_FILE_LIMIT_BYTES", 16_000)
        save(model, path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.with_name("model.onnx.data").stat().st_size == 64 * 64 * 4
    assert onnxio.file_bytes(path) == path.stat().st_size + 64 * 64 * 4
    again = onnxio.load_model(path)
    np.testing.assert_array_equal(
        numpy_helper.to_array(again.graph.initializer[0]),
        numpy_helper.to_array(linear().graph.initializer[0]),
    )
    np.testing.assert_array_equal(run(path), np.ones((2, 64), dtype=np.float32) @ weight_of(again))
    save(model, path)
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def weight_of(model: onnx.ModelProto) -> np.ndarray:
    return numpy_helper.to_array(model.graph.initializer[0])


def test_large_model_can_be_written_over_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old data is read to the end before the new one takes its name."""
    monkeypatch.setattr(onnxio, "_SINGLE_FILE_LIMIT_BYTES", 16_000)
    path = tmp_path / "model.onnx"
    onnxio.save_model(linear(), path)
    before = run(path)
    onnxio.save_ir(onnxio.load_ir(path), path)
    np.testing.assert_array_equal(run(path), before)


def test_external_constants_of_nodes_are_kept(tmp_path: Path) -> None:
    """A Constant whose value lies outside survives the way through the graph form."""
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    model = linear()
    value = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=value))
    onnx.save_model(
        model, path, save_as_external_data=True, location="c.bin", size_threshold=0,
        convert_attribute=True,
    )  # fmt: skip
    onnxio.save_ir(onnxio.load_ir(path), tmp_path / "model.onnx")
    np.testing.assert_array_equal(run(tmp_path / "model.onnx"), run(path))


@pytest.mark.parametrize("load", [onnxio.load_model, onnxio.load_ir])
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("location", "../outside.bin", "points outside the directory"),
        ("location", "a/../../outside.bin", "outside"),
        ("location", "/etc/hostname", "absolute path"),
        ("location", "missing.bin", "not regular file"),
        ("length", "9999999999999", "9999999999999"),
        ("length", "128", "takes 16384 bytes; its entry says 128"),
        ("offset", "16000", "has 384 left from its offset"),
    ],
)
def test_bad_external_data_is_refused(
    load: object, key: str, value: str, words: str, external: Path
) -> None:
    """Outside the folder, missing, or shorter than the shape says: a SourceError names it."""
    (external.parent.parent / "outside.bin").write_bytes(bytes(64 * 64 * 4))
    rewrite(external, key, value)
    with pytest.raises(SourceError, match=words) as raised:
        load(external)  # type: ignore[operator]
    assert "model.onnx" in raised.value.message


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("load", [onnxio.load_model, onnxio.load_ir])
def test_linked_external_data_is_refused(load: object, link: object, external: Path) -> None:
    """A link in the folder may show a file of somebody else; the hint says what to do."""
    secret = external.parent.parent / "secret"
    external.with_name("weights.bin").rename(secret)
    link(secret, external.with_name("weights.bin"))  # type: ignore[operator]
    with pytest.raises(SourceError, match=r"link") as raised:
        load(external)  # type: ignore[operator]
    assert "real files" in raised.value.hint


@pytest.mark.parametrize("load", [onnxio.load_model, onnxio.load_ir])
def test_what_is_no_model_is_refused(load: object, tmp_path: Path) -> None:
    """Missing, text, truncated, without outputs, with an unknown operator."""
    (tmp_path / "text.onnx").write_text("no model")
    whole = linear().SerializeToString()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    unknown = linear()
    unknown.graph.node[0].op_type = "MatMull"
    (tmp_path / "unknown.onnx").write_bytes(unknown.SerializeToString())
    empty = linear()
    del empty.graph.output[:]
    (tmp_path / "empty.onnx").write_bytes(empty.SerializeToString())
    for name in ("none", "text", "half", "unknown", "empty"):
        with pytest.raises(SourceError, match=rf"{name}\.onnx"):
            load(tmp_path / f"{name}.onnx")  # type: ignore[operator]


@pytest.mark.parametrize("load", [onnxio.load_model, onnxio.load_ir])
def test_operators_of_a_vendor_are_read(load: object, tmp_path: Path) -> None:
    """ONNX Runtime puts its operators into the standard domain, or imports no domain for them.

    A file of the standard alone has no such excuse.
    """
    path = tmp_path / "model.onnx"
    model = linear()
    model.graph.node[0].op_type = "SimplifiedLayerNormalization"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match="No Op registered"):
        load(path)  # type: ignore[operator]
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(model.SerializeToString())
    assert load(path).graph is not None  # type: ignore[operator]
    forgetful = linear()
    forgetful.graph.node[0].op_type, forgetful.graph.node[0].domain = "FusedMatMul", "com.microsoft"
    path.write_bytes(forgetful.SerializeToString())
    assert load(path).graph is not None  # type: ignore[operator]


@pytest.mark.parametrize(("opset", "version"), [(14, 7), (17, 8), (20, 9), (21, 10)])
def test_ir_version_is_the_lowest_that_the_opset_needs(opset: int, version: int) -> None:
    """From the table of the ONNX releases; the checker agrees."""
    model = onnx_ir.from_proto(linear(opset=opset))
    assert onnxio.lower_ir_version(model, largest=version) == version
    assert model.ir_version == version
    onnx.checker.check_model(onnx_ir.to_proto(model))
    with pytest.raises(IncompatibleError, match=f"opset {opset} needs ONNX IR version {version}"):
        onnxio.lower_ir_version(model, largest=version - 1)


def test_specs_are_the_same_from_both_forms(external: Path) -> None:
    """Names, dtypes and dimensions, unnamed ones called by their place."""
    proto = onnxio.load_model(external)
    proto.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    assert onnxio.graph_specs(proto) == onnxio.ir_specs(onnx_ir.from_proto(proto))
    assert onnxio.graph_specs(proto)[0][0].shape == ("x_dim0", 64)


_LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from onnx import TensorProto, helper
from equipoise import onnxio
from equipoise.graph.clean import clean
folder, rows = Path(sys.argv[1]), 9_000
graph = helper.make_graph(
    [node for i in range(8) for node in (
        helper.make_node("Gather", [f"w{i}", "ids"], [f"e{i}"]),
        helper.make_node("Identity", [f"e{i}"], [f"y{i}"]))],
    "tables",
    [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])],
    [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["batch", 8_000]) for i in range(8)],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
for i in range(8):
    row = np.arange(8_000, dtype=np.float32) + i
    model.graph.initializer.append(helper.make_tensor(
        f"w{i}", TensorProto.FLOAT, [rows, 8_000], np.tile(row, rows).tobytes(), raw=True))
onnxio.save_model(model, folder / "model.onnx")
del model
onnxio.save_model(onnxio.load_model(folder / "model.onnx"), folder / "again" / "model.onnx")
model = onnxio.load_ir(folder / "again" / "model.onnx")
clean(model, release=True)
onnxio.save_ir(model, folder / "clean" / "model.onnx")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.fixture
def large_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose 7 GB do not wait for pytest to forget them."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_model_above_two_gigabytes_goes_all_the_way_in_bounded_memory(large_folder: Path) -> None:
    """2.3 GB written, read, written again, cleaned through mapped weights and run, below 12 GB."""
    done = subprocess.run(
        [sys.executable, "-c", _LARGE, str(large_folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cleaned = large_folder / "clean" / "model.onnx"
    assert onnxio.file_bytes(cleaned) > 8 * 9_000 * 8_000 * 4 > 2**31
    assert int(done.stdout) < 12_000_000_000
    assert sorted(p.name for p in cleaned.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(str(cleaned), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"ids": np.array([0, 8_999])})
    for index, output in enumerate(outputs):
        np.testing.assert_array_equal(output, np.tile(np.arange(8_000) + index, (2, 1)))
