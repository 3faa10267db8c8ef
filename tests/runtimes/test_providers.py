"""Execution providers of ONNX Runtime: by name, strictly, with options, from where they come.

What needs the QNN emulator runs where the package onnxruntime-qnn is installed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from equipoise import extras
from equipoise.errors import IncompatibleError, InputError, MissingExtraError, UsageError
from equipoise.runtimes.onnxruntime import providers
from equipoise.runtimes.onnxruntime.builder import BUILDER
from equipoise.runtimes.onnxruntime.feeds import Buffers, dimensions_of, fast_check
from equipoise.runtimes.onnxruntime.providers import (
    Wanted,
    check_placed,
    place,
    refused,
    wanted_providers,
)
from equipoise.runtimes.onnxruntime.session import open_session, session_options
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import TensorSpec, check_feeds
from equipoise.targets.machine import detect_machine

PLAIN = SessionSettings()
CPU = "CPUExecutionProvider"
HTP = "QNNExecutionProvider:htp_arch=75,backend_type=htp"
FALLBACK = "session.disable_cpu_ep_fallback"
qnn = pytest.mark.skipif(
    not extras.installed("onnxruntime_qnn"), reason="onnxruntime-qnn is not installed"
)
STOCK = set(onnxruntime.get_available_providers()) <= {"AzureExecutionProvider", CPU}


def residual(activation: str, path: Path) -> Path:
    """Two convolutions, each added to its input, with activations of a type; fixed sizes."""
    random = np.random.default_rng(6)
    zero = np.array(0 if activation == "int8" else 128, dtype=activation)
    arrays: dict[str, Any] = {"zero": zero, "zeros": np.zeros(8, np.int8)}
    nodes: list[Any] = []

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def rounded(name: str, scale: float) -> str:
        arrays[f"{name}_scale"] = np.float32(scale)
        stored = add("QuantizeLinear", [name, f"{name}_scale", "zero"], f"{name}_q")
        return add("DequantizeLinear", [stored, f"{name}_scale", "zero"], f"{name}_d")

    last = rounded("x", 0.03)
    for n in range(2):
        arrays[f"w{n}"] = random.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
        arrays[f"s{n}"] = np.full(8, 0.002, np.float32)
        weight = add("DequantizeLinear", [f"w{n}", f"s{n}", "zeros"], f"w{n}_d", axis=0)
        made = rounded(add("Conv", [last, weight], f"c{n}", pads=[1, 1, 1, 1]), 0.03)
        last = rounded(add("Add", [made, last], f"a{n}"), 0.05)
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 8, 16, 16])
        for name in ("x", last)
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "residual", values[:1], values[1:], tensors)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def pictures(seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(1, 8, 16, 16)).astype(np.float32)}


def entry(options: Any, key: str) -> str | None:
    """What session options say under ``key``."""
    try:
        return str(options.get_session_config_entry(key))
    except RuntimeError:
        return None


# Names, options, and what they lead to.


def test_options_stand_behind_a_colon() -> None:
    """A name alone, options, a value with a colon; the CPU when nothing is named."""
    assert wanted_providers(()) == (Wanted(name=CPU),)
    path = "QNNExecutionProvider:backend_path=c:/qnn.dll"
    assert wanted_providers((path, CPU)) == (
        Wanted(name="QNNExecutionProvider", options={"backend_path": "c:/qnn.dll"}),
        Wanted(name=CPU),
    )
    (htp,) = wanted_providers((HTP,))
    assert htp.options == {"htp_arch": "75", "backend_type": "htp"}


@pytest.mark.parametrize(
    ("names", "words", "hint"),
    [
        (("QNNExecutionProvidr",), "unknown execution provider", "'QNNExecutionProvider'"),
        (("QNNExecutionProvider:htp",), "'htp' of .* is no option", "name=value"),
        (("QNNExecutionProvider:",), "is no option", "name=value"),
        (("QNNExecutionProvider:=75",), "is no option", "name=value"),
        ((CPU, CPU), f"{CPU} is named twice", ""),
        ((HTP, "CUDAExecutionProvider"), "cannot share a session", "of one kind"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(
    linear_onnx: Path, names: tuple[str, ...], words: str, hint: str
) -> None:
    """An unknown name with the nearest one, a malformed option, a name twice, two kinds."""
    with pytest.raises(UsageError, match=words) as caught:
        open_session(linear_onnx, settings=SessionSettings(providers=names))
    assert hint in caught.value.hint


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="onnxruntime has no second provider",
)
def test_the_cpu_runs_what_another_provider_leaves_only_if_it_is_named() -> None:
    """ONNX Runtime lets it otherwise, without a word."""
    azure = Wanted(name="AzureExecutionProvider", options={"a": "1"})
    alone, both = session_options(PLAIN), session_options(PLAIN)
    assert place((azure,), options=alone) == [("AzureExecutionProvider", {"a": "1"})]
    assert entry(alone, FALLBACK) == "1"
    named = place((azure, Wanted(name=CPU)), options=both)
    assert named == [("AzureExecutionProvider", {"a": "1"}), (CPU, {})]
    assert entry(both, FALLBACK) is None


@pytest.mark.skipif(not STOCK, reason="onnxruntime has providers besides the CPU's")
@pytest.mark.parametrize("name", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_provider_of_another_build_names_the_package(linear_onnx: Path, name: str) -> None:
    """ONNX Runtime itself would warn, and run on the CPU."""
    settings = SessionSettings(providers=(name, CPU))
    with pytest.raises(MissingExtraError, match=f"was built without {name}; it has") as caught:
        open_session(linear_onnx, settings=settings)
    assert "onnxruntime-gpu" in caught.value.hint


@pytest.mark.parametrize(
    "name",
    ["QNNExecutionProvider", "OpenVINOExecutionProvider", "NvTensorRTRTXExecutionProvider"],
)
def test_a_plugin_that_is_not_installed_names_the_package(linear_onnx: Path, name: str) -> None:
    """With the line that installs it."""
    origin = providers.ORIGINS[name]
    if extras.installed(origin.module):
        pytest.skip(f"{origin.package} is installed")
    with pytest.raises(MissingExtraError, match=origin.package) as caught:
        open_session(linear_onnx, settings=SessionSettings(providers=(name,)))
    assert f"pip install {origin.package}" in caught.value.hint


def test_a_plugin_whose_library_does_not_load_says_what_onnx_runtime_says(
    linear_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package with a library that is none, as where a driver is missing."""
    package = tmp_path / "broken_plugin"
    package.mkdir()
    (package / "broken.so").write_text("no library")
    (package / "__init__.py").write_text(
        f"def get_library_path():\n    return {str(package / 'broken.so')!r}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "QNNExecutionProvider"
    origin = providers.Origin(package="broken-plugin", module="broken_plugin")
    monkeypatch.setitem(providers.ORIGINS, name, origin)
    with pytest.raises(IncompatibleError, match=r"broken-plugin does not load: .*broken\.so"):
        open_session(linear_onnx, settings=SessionSettings(providers=(name,)))


def test_a_provider_that_was_left_out_is_named(linear_onnx: Path) -> None:
    """ONNX Runtime goes on without a provider whose library does not load."""
    session = onnxruntime.InferenceSession(linear_onnx, providers=[CPU])
    wanted = (Wanted(name="CUDAExecutionProvider"), Wanted(name=CPU))
    with pytest.raises(IncompatibleError, match=r"CUDAExecutionProvider did not start.*on CPU"):
        check_placed(session, wanted, engine=linear_onnx)
    check_placed(session, wanted[1:], engine=linear_onnx)


def test_a_failure_of_a_provider_is_no_failure_of_the_file(linear_onnx: Path) -> None:
    """Nor the other way round."""
    cuda = (Wanted(name="CUDAExecutionProvider"),)
    error = RuntimeError("CUDA failure 35: driver is insufficient\nmore")
    found = refused(error, cuda, engine=linear_onnx)
    assert "CUDAExecutionProvider cannot run" in str(found)
    assert "more" not in str(found)
    assert refused(error, (Wanted(name=CPU),), engine=linear_onnx) is None
    broken = type("InvalidProtobuf", (Exception,), {})("no model")
    assert refused(broken, cuda, engine=linear_onnx) is None


@pytest.mark.skipif(not STOCK, reason="onnxruntime has providers besides the CPU's")
def test_an_engine_for_a_provider_that_is_not_here_is_only_built(
    linear_onnx: Path, tmp_path: Path
) -> None:
    """Proved on the CPU, and said so."""
    settings = SessionSettings(providers=("CUDAExecutionProvider",))
    record = BUILDER.build(linear_onnx, tmp_path, settings=settings)
    assert not record.loaded
    assert "on the CPU alone: onnxruntime" in record.notes[0]
    named = BUILDER.build(linear_onnx, tmp_path, settings=SessionSettings(providers=(CPU,)))
    assert named.loaded
    assert named.notes == ()


# The emulator of Qualcomm's NPU.


@qnn
def test_the_emulator_runs_a_quantised_model(tmp_path: Path) -> None:
    """All of it, within three steps of the CPU's result."""
    model = residual("uint8", tmp_path / "residual.onnx")
    settings = SessionSettings(providers=(HTP,))
    record = BUILDER.build(model, tmp_path / "engine", settings=settings)
    assert record.kernels["Conv QNNExecutionProvider"] == 2
    assert record.notes[0].startswith("nodes by execution provider: QNNExecutionProvider ")
    assert CPU not in record.notes[0]
    with (
        open_session(tmp_path / "engine" / record.file, settings=settings) as npu,
        open_session(model, settings=PLAIN) as cpu,
    ):
        given = npu._session.get_provider_options()["QNNExecutionProvider"]
        assert given == {"htp_arch": "75", "backend_type": "htp"}
        (found,), (expected,) = npu.run(pictures()).values(), cpu.run(pictures()).values()
        buffer = np.empty_like(found)
        name = npu.outputs[0].name
        assert npu.run(pictures(), out={name: buffer})[name] is buffer
    assert np.abs(found - expected).max() <= 0.15 + 1e-6
    assert np.abs(expected).max() > 2
    np.testing.assert_array_equal(buffer, found)


@qnn
def test_the_emulator_takes_a_whole_model_or_none(linear_onnx: Path, tmp_path: Path) -> None:
    """Dynamic sizes are not for it; the CPU takes them when it is named."""
    strict = SessionSettings(providers=(HTP,))
    with pytest.raises(IncompatibleError, match="does not take every node") as caught:
        BUILDER.build(linear_onnx, tmp_path, settings=strict)
    assert CPU in caught.value.hint
    assert not any(tmp_path.iterdir())
    shared = SessionSettings(providers=(HTP, CPU))
    record = BUILDER.build(linear_onnx, tmp_path, settings=shared)
    assert record.notes[0].startswith(f"nodes by execution provider: {CPU} ")
    with open_session(linear_onnx, settings=shared) as session:
        assert session.run({"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 3)


# Integers.


def test_exact_integers_reach_onnx_runtime() -> None:
    """Off unless asked for."""
    key = "session.x64quantprecision"
    assert entry(session_options(PLAIN), key) is None
    assert entry(session_options(SessionSettings(exact_integers=True)), key) == "1"


@pytest.mark.skipif(detect_machine().architecture != "x86_64", reason="no x86 CPU")
def test_residuals_of_signed_integers_run_in_float_and_are_noted(tmp_path: Path) -> None:
    """ONNX Runtime has kernels for them that take many times longer; unsigned ones are fast."""
    signed = BUILDER.build(residual("int8", tmp_path / "s.onnx"), tmp_path / "s", settings=PLAIN)
    assert signed.kernels["Conv"] == 2
    assert any("2 layers of integers run in float" in note for note in signed.notes)
    assert any("quantise activations to uint8" in note for note in signed.notes)
    plain = BUILDER.build(residual("uint8", tmp_path / "u.onnx"), tmp_path / "u", settings=PLAIN)
    assert plain.kernels["QLinearConv"] == 2
    assert plain.notes == ()


# Feeds and buffers.

SPECS = (
    TensorSpec(name="a", dtype="float32", shape=("batch", 3, "width")),
    TensorSpec(name="b", dtype="int64", shape=("batch", 2)),
    TensorSpec(name="c", dtype="float64", shape=()),
)


def good() -> dict[str, Any]:
    return {
        "a": np.zeros((4, 3, 5), np.float32),
        "b": np.zeros((4, 2), np.int64),
        "c": np.array(1.0),
    }


@pytest.mark.parametrize(
    "harm",
    [
        {"a": np.zeros((4, 2, 5), np.float32)},
        {"a": np.zeros((4, 3), np.float32)},
        {"a": np.zeros((4, 3, 5))},
        {"a": [1.0]},
        {"b": np.zeros((3, 2), np.int64)},
        {"b": np.zeros((4, 3), np.int64)},
        {"c": np.zeros(1)},
        {"c": 1.0},
        {"d": np.zeros(1)},
    ],
)
def test_the_fast_check_lets_nothing_through_that_the_full_one_refuses(harm) -> None:
    """Sizes before and behind dynamic ones, shared sizes, ranks, types, names."""
    fit = fast_check(SPECS)
    assert fit(good())
    feeds = {**good(), **harm}
    assert not fit(feeds)
    with pytest.raises(InputError):
        check_feeds(feeds, SPECS)
    for name in good():
        assert not fit({key: array for key, array in good().items() if key != name})


def test_buffers_are_bound_only_where_they_surely_fit() -> None:
    """Large, of the type and sizes that the inputs say, contiguous and writeable."""
    outputs = (TensorSpec(name="y", dtype="float32", shape=("batch", 100_000)),)
    buffers, feeds = Buffers(outputs, dimensions_of(SPECS)), good()
    right = np.zeros((4, 100_000), np.float32)
    locked = right.copy()
    locked.flags.writeable = False
    assert buffers.take({"y": right}, feeds)
    for wrong in (
        np.zeros((3, 100_000), np.float32),
        np.zeros((4, 100_001), np.float32),
        np.zeros((4, 100_000)),
        np.zeros((4, 200_000), np.float32)[:, ::2],
        np.zeros(400_000, np.float32),
        locked,
    ):
        assert not buffers.take({"y": wrong}, feeds)
    assert not buffers.take({"z": right}, feeds)
    unknown = (TensorSpec(name="y", dtype="float32", shape=("rows", 100_000)),)
    assert not Buffers(unknown, dimensions_of(SPECS)).take({"y": right}, feeds)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two large outputs and a small one."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        wide (float[batch, 65536] x) => (float[batch, 65536] y, float[batch, 65536] z,
                                         float[batch] m) {
            y = Relu(x)
            z = Neg(x)
            axis = Constant <value_ints = [1]> ()
            m = ReduceMax <keepdims = 0> (x, axis)
        }
        """
    )
    path = tmp_path_factory.mktemp("wide") / "wide.onnx"
    onnx.save(model, path)
    return path


def test_large_outputs_are_computed_where_the_caller_wants_them(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some bound and some new; the same bytes as without; a buffer of another size is refused."""
    x = np.random.default_rng(1).normal(size=(3, 65536)).astype(np.float32)
    with open_session(wide, settings=PLAIN) as session:
        plain = session.run({"x": x})
        bound: list[str] = []
        compute = session._compute_into
        monkeypatch.setattr(
            session, "_compute_into", lambda out, feeds: bound.extend(out) or compute(out, feeds)
        )
        y, m = np.full((3, 65536), 7.0, np.float32), np.full(3, 7.0, np.float32)
        for given in (x, np.asfortranarray(x)):
            found = session.run({"x": given}, out={"y": y, "m": m})
            assert found["y"] is y
            assert found["m"] is m
            for name, array in plain.items():
                np.testing.assert_array_equal(found[name], array)
            y[...] = m[...] = 7.0
        assert bound == ["y", "m"] * 2
        assert list(found) == ["y", "z", "m"]
        with pytest.raises(InputError, match="'y'"):
            session.run({"x": x}, out={"y": np.zeros((2, 65536), np.float32)})
        with pytest.raises(InputError, match="'q'"):
            session.run({"x": x}, out={"q": np.zeros((3, 65536), np.float32)})


def test_threads_share_a_session(wide: Path) -> None:
    """Each with buffers of its own and without; nothing is mixed up."""
    rows = [np.full((1, 65536), n, np.float32) for n in range(1, 65)]

    def largest(row: np.ndarray) -> tuple[float, float]:
        y = np.empty_like(row)
        session.run({"x": row}, out={"y": y})
        return float(y.max()), float(session.run({"x": row})["m"][0])

    with open_session(wide, settings=PLAIN) as session, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(largest, rows)) == [(n, n) for n in range(1, 65)]


def test_the_check_of_placement_asks_what_a_session_has() -> None:
    """Providers in any order, more than were asked for."""
    session = SimpleNamespace(get_providers=lambda: ["A", CPU])
    check_placed(session, (Wanted(name=CPU), Wanted(name="A")), engine=Path("engine.onnx"))
