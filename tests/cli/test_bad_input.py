"""Bad input from the shell: the exit code, what is named, and no half-written output."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def refused(equipoise, workbench, tmp_path: Path):
    """Run tune with something wrong; check the code, the words, and that nothing was written."""

    def run(code: int, *words: str, **changes: object) -> None:
        options = {
            "source": workbench.model, "data": workbench.data, "metric": "accuracy",
            "output": tmp_path / "out", **changes,
        }  # fmt: skip
        source = options.pop("source")
        flags = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v)]
        done = equipoise("tune", source, *flags, "--quiet")
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        for word in words:
            assert word in done.stderr
        assert not list(Path(str(options["output"])).glob("[!b]*"))
        assert not (Path(str(options["output"])) / "bundle/manifest.json").exists()

    return run


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_missing_model(refused) -> None:
    """A model file that is not there is named."""
    refused(3, "no/such.onnx", source="no/such.onnx")


def test_file_that_is_no_onnx(refused, tmp_path: Path) -> None:
    """Garbage with the right suffix is no ONNX model."""
    path = tmp_path / "garbage.onnx"
    path.write_bytes(b"this is no protobuf" * 20)
    refused(3, "garbage.onnx", "not a valid ONNX model", source=path)


def test_empty_onnx(refused, tmp_path: Path) -> None:
    """An empty file parses as protobuf, and is no model all the same."""
    path = tmp_path / "empty.onnx"
    path.write_bytes(b"")
    refused(3, "empty.onnx", source=path)


def test_source_of_no_known_form(refused) -> None:
    """The message says which forms there are."""
    refused(3, "model.h5", "transformers directory", source="model.h5")


def test_directory_that_is_no_transformers_model(refused, tmp_path: Path) -> None:
    """A directory without config.json is named."""
    refused(3, "config.json", source=tmp_path)


def test_factory_without_weights_or_module(refused, tmp_path: Path) -> None:
    """A factory needs weights, and its module has to exist."""
    refused(3, "--weights", source="module:nowhere:build")
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"0")
    refused(3, "nowhere", source="module:nowhere:build", weights=weights)


def test_unknown_metric_and_target_name_the_nearest(refused) -> None:
    """Unknown names are usage errors that list the known ones."""
    refused(2, "'acuracy'", "accuracy", metric="acuracy")
    refused(2, "'gpu'", "cpu", target="gpu")
    refused(2, "'tagging'", "token-classification", task="tagging")


def test_settings_out_of_range(refused) -> None:
    """A negative drop or no sample makes no sense."""
    refused(2, "--max-drop", max_drop=-0.1)
    refused(2, "--samples", samples=0)
    refused(2, "--rounds", rounds=1)


def test_missing_data(refused) -> None:
    """Data that is not there is named."""
    refused(3, "nowhere.npz", data="nowhere.npz")


def test_data_that_is_no_npz(refused, tmp_path: Path) -> None:
    """Garbage with the right suffix is no .npz file."""
    path = tmp_path / "bad.npz"
    path.write_bytes(b"PK garbage")
    refused(3, "bad.npz", data=path)


def test_empty_data(refused, tmp_path: Path) -> None:
    """Arrays of length zero hold no sample."""
    x, label = np.zeros((0, 16), np.float32), np.zeros(0, np.int64)
    refused(3, "empty", data=save(tmp_path / "e.npz", x=x, label=label))


def test_labels_that_do_not_fit_the_model(refused, tmp_path: Path) -> None:
    """A class beyond the model's classes is named with the number of classes."""
    x = np.ones((90, 16), np.float32)
    data = save(tmp_path / "l.npz", x=x, label=np.full(90, 7))
    refused(3, "class 7", "4 classes", data=data)


def test_label_count_that_does_not_fit(refused, tmp_path: Path) -> None:
    """Unequal lengths are named."""
    data = save(tmp_path / "n.npz", x=np.ones((9, 16), np.float32), label=np.zeros(8, np.int64))
    refused(3, "'x'", "8 labels", data=data)


def test_input_of_another_name_or_shape(refused, tmp_path: Path) -> None:
    """Arrays that the model does not take are named."""
    label = np.zeros(90, np.int64)
    named = save(tmp_path / "a.npz", image=np.ones((90, 16), np.float32), label=label)
    refused(3, "image", "'x'", data=named)
    shaped = save(tmp_path / "b.npz", x=np.ones((90, 15), np.float32), label=label)
    refused(3, "'x'", "15", data=shaped)


def test_calibration_data_of_another_shape(refused, tmp_path: Path) -> None:
    """Calibration samples have to look like evaluation samples."""
    x = np.ones((40, 2, 16), np.float32)
    other = save(tmp_path / "c.npz", x=x, label=np.zeros(40, np.int64))
    refused(3, "calibration", "dimensions", calibration=other)


@pytest.mark.parametrize(
    ("weight", "named"), [(np.nan, "the weight 'w'"), (3e38, "output 'logits'")]
)
def test_reference_that_is_not_finite(refused, tmp_path: Path, weight: float, named: str) -> None:
    """A model that gives no numbers can be no reference, for a weight or for their sum."""
    source = tmp_path / "nan.onnx"
    _write_constant(source, weight)
    refused(3, named, "NaN", source=source)


def _write_constant(path: Path, value: float) -> None:
    """A product of x [batch, 16] with [16, 4] weights that are all the same."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "constant",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.full((16, 4), value, np.float32), "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def test_output_below_a_file(refused, tmp_path: Path) -> None:
    """A place that cannot be a directory is found before any work."""
    (tmp_path / "file").write_text("in the way")
    refused(7, "file", output=tmp_path / "file" / "out")


def test_read_only_output(refused) -> None:
    """A file system that takes no files is named; root may not write there either."""
    refused(7, "/proc/equipoise", output="/proc/equipoise")


def test_bundle_directory_of_somebody_else(refused, tmp_path: Path) -> None:
    """A directory called bundle that is no bundle is not replaced."""
    precious = tmp_path / "mine" / "bundle" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("keep")
    refused(7, "is no bundle", output=tmp_path / "mine")
    assert precious.read_text() == "keep"


def test_full_disk(workbench, tmp_path: Path) -> None:
    """When no more bytes can be written the run ends with code 7 and leaves no output."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))

    done = subprocess.run(
        [
            sys.executable, "-m", "equipoise", "tune", str(workbench.model), "--data",
            str(workbench.data), "-q", "-o", str(tmp_path / "out"), "--cache-dir",
            str(tmp_path / "cache"),
        ],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert "no space left" in done.stderr
    assert not list((tmp_path / "out").iterdir())
    assert not list((tmp_path / "cache").glob("*/*/record.json"))


@pytest.mark.parametrize(
    ("blocked", "arguments"),
    [("onnxruntime", ["bench", "{model}"]), ("onnx", ["inspect", "{model}"])],
)
def test_missing_extra_names_the_line_that_installs_it(workbench, blocked, arguments) -> None:
    """A package that is not installed is exit code 5 with the pip line."""
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {blocked!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from equipoise.cli.main import main\n"
        "main()\n"
    )
    filled = [a.format(model=workbench.model) for a in arguments]
    done = subprocess.run(
        [sys.executable, "-c", program, *filled], capture_output=True, text=True, check=False
    )
    assert done.returncode == 5, done.stderr
    assert 'pip install "equipoise[' in done.stderr


def test_run_and_inspect_refuse_what_they_cannot_take(workbench, tuned, equipoise, tmp_path):
    """Wrong arrays, no bundle, unknown dimension: each says what is allowed."""
    np.savez(tmp_path / "in.npz", x=np.zeros((1, 15), np.float32))
    done = equipoise("run", tuned / "bundle", tmp_path / "in.npz")
    assert done.returncode == 3
    assert "16" in done.stderr
    done = equipoise("run", tmp_path, "--selftest")
    assert done.returncode == 4
    assert "no bundle" in done.stderr
    done = equipoise("run", tuned / "bundle", "--text", "hello")
    assert done.returncode == 2
    assert "tokenizer" in done.stderr
    done = equipoise("inspect", workbench.model, "--dim", "height=3")
    assert done.returncode == 2
    assert "'height'" in done.stderr
    assert equipoise("bench", workbench.model, "--threads", "none").returncode == 2
    assert equipoise("check", workbench.model).returncode == 2
    assert equipoise("tune").returncode == 2
