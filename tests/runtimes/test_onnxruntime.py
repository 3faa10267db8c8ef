"""What is particular to the ONNX Runtime adapter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from equipoise.errors import BackendError, SourceError
from equipoise.runtimes.build import BuildConfig, build
from equipoise.runtimes.onnxruntime.builder import BUILDER
from equipoise.runtimes.onnxruntime.session import open_session, session_options
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import TensorSpec


def save(text: str, path: Path, **weights: np.ndarray) -> Path:
    """Write the model that ``text`` describes with ``weights``."""
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def test_the_builder_names_the_installed_version() -> None:
    """Availability is what pip installed."""
    found = BUILDER.availability()
    assert found.available
    assert found.version == onnxruntime.__version__


def test_kernels_are_those_of_the_rewritten_graph(conv_onnx: Path, tmp_path: Path) -> None:
    """ONNX Runtime fuses Conv and Relu; the record shows it, and no fusion when told not to."""
    fused = BUILDER.build(conv_onnx, tmp_path, settings=SessionSettings())
    plain = BUILDER.build(conv_onnx, tmp_path, settings=SessionSettings(optimize="none"))
    assert "Relu" not in fused.kernels
    assert plain.kernels["Relu"] == 1


def test_the_engine_is_the_model_byte_for_byte(conv_onnx: Path, tmp_path: Path) -> None:
    """The rewritten graph, which holds kernels of this CPU, is not shipped."""
    record = build(
        BuildConfig(model=conv_onnx, runtime="onnxruntime", settings=SessionSettings()),
        output=tmp_path,
    )
    assert (tmp_path / record.file).read_bytes() == conv_onnx.read_bytes()


def test_external_data_is_copied_beside_the_engine(linear_onnx: Path, tmp_path: Path) -> None:
    """A model with its weights in ``<name>.data`` builds to an engine that loads and agrees."""
    model = onnx.load(linear_onnx)
    path = tmp_path / "engine.onnx"
    onnx.save_model(
        model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0
    )
    output = tmp_path / "output"
    output.mkdir()
    record = BUILDER.build(path, output, settings=SessionSettings())
    assert record.size_bytes == sum(file.stat().st_size for file in output.iterdir())
    x = np.ones((2, 4), dtype=np.float32)
    with (
        open_session(output / record.file, settings=SessionSettings()) as built,
        open_session(linear_onnx, settings=SessionSettings()) as original,
    ):
        np.testing.assert_array_equal(built.run({"x": x})["y"], original.run({"x": x})["y"])


def test_external_data_of_any_model_name_builds(linear_onnx: Path, tmp_path: Path) -> None:
    """The graph names its data file, so the copy keeps that name."""
    path = tmp_path / "bert.onnx"
    onnx.save_model(
        onnx.load(linear_onnx),
        path,
        save_as_external_data=True,
        location="bert.onnx.data",
        size_threshold=0,
    )
    output = tmp_path / "output"
    output.mkdir()
    record = BUILDER.build(path, output, settings=SessionSettings())
    with open_session(output / record.file, settings=SessionSettings()) as session:
        assert session.run({"x": np.ones((1, 4), dtype=np.float32)})["y"].shape == (1, 3)


def test_quantised_nodes_that_run_in_float_are_noted(tmp_path: Path) -> None:
    """Q/DQ around an operator without an integer kernel is said in words."""
    model = save(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        odd (float[n] x) => (float[n] y) {
            q = QuantizeLinear(x, scale, zero)
            d = DequantizeLinear(q, scale, zero)
            e = Erf(d)
            y = Sin(e)
        }
        """,
        tmp_path / "odd.onnx",
        scale=np.float32(0.1),
        zero=np.uint8(128),
    )
    record = BUILDER.build(model, tmp_path / "engine", settings=SessionSettings())
    assert record.notes == ("1 QuantizeLinear nodes, but no operator runs in integers",)


def test_dimensions_without_a_name_are_called_by_their_place(tmp_path: Path) -> None:
    """A spec has a name for every dynamic dimension, and equal names are not invented."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "nameless",
        [value("x", onnx.TensorProto.DOUBLE, [None, None, 2])],
        [value("y", onnx.TensorProto.DOUBLE, ["n", None, 2])],
    )
    path = tmp_path / "nameless.onnx"
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    with open_session(path, settings=SessionSettings()) as session:
        assert session.inputs == (
            TensorSpec(name="x", dtype="float64", shape=("x_dim0", "x_dim1", 2)),
        )
        assert session.outputs[0].shape[0] == "n"
        feeds = {"x": np.zeros((3, 5, 2))}
        assert session.run(feeds)["y"].shape == (3, 5, 2)


def test_an_operator_that_does_not_exist_is_a_source_error(tmp_path: Path) -> None:
    """The message names the file and what ONNX Runtime says, in one line."""
    path = save(
        """
        <ir_version: 9, opset_import: ["" : 20, "nobody" : 1]>
        odd (float[n] x) => (float[n] y) { y = nobody.Nothing(x) }
        """,
        tmp_path / "unheard.onnx",
    )
    with pytest.raises(SourceError, match=r"unheard\.onnx.*Nothing") as caught:
        open_session(path, settings=SessionSettings())
    assert "\n" not in caught.value.message
    assert caught.value.__cause__ is not None


def test_a_failure_at_run_time_is_a_backend_error(tmp_path: Path) -> None:
    """An index out of range is refused by the kernel; its words and cause are kept."""
    path = save(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        lookup (int64[n] ids) => (float[n, 2] y) { y = Gather(table, ids) }
        """,
        tmp_path / "lookup.onnx",
        table=np.zeros((3, 2), dtype=np.float32),
    )
    with (
        open_session(path, settings=SessionSettings()) as session,
        pytest.raises(BackendError, match="out of data bounds") as caught,
    ):
        session.run({"ids": np.array([5])})
    assert caught.value.__cause__ is not None


def test_settings_reach_onnx_runtime() -> None:
    """Threads, spinning and optimisation are set as asked."""
    options = session_options(SessionSettings(threads=3, optimize="none", spin=True))
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 1
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.graph_optimization_level == level
    spinning = "session.intra_op.allow_spinning"
    assert options.get_session_config_entry(spinning) == "1"
    assert session_options(SessionSettings()).get_session_config_entry(spinning) == "0"


def test_opening_a_session_turns_usage_events_off(linear_onnx: Path) -> None:
    """ONNX Runtime is told so before it is imported, in a process that did not say it."""
    program = (
        "import os, sys\nfrom pathlib import Path\n"
        "os.environ.pop('ORT_DISABLE_TELEMETRY', None)\n"
        "from equipoise.runtimes.onnxruntime.session import open_session\n"
        "from equipoise.runtimes.protocol import SessionSettings\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "open_session(Path(sys.argv[1]), settings=SessionSettings())\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    command = [sys.executable, "-c", program, str(linear_onnx)]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert child.stdout.strip() == "1"
