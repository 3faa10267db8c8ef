"""What is particular to the OpenVINO adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from equipoise.data.store import write_rows
from equipoise.errors import BackendError, IncompatibleError, SourceError, UsageError
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.schemes import StaticInt8
from equipoise.runtimes.onnxruntime.session import open_session as open_onnxruntime
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import TensorSpec
from equipoise.targets.machine import detect_machine
from equipoise.targets.profiles import get_target

openvino = pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")

from equipoise.runtimes.openvino.builder import BUILDER, notes_on  # noqa: E402
from equipoise.runtimes.openvino.core import device_config, device_of  # noqa: E402
from equipoise.runtimes.openvino.session import open_session  # noqa: E402

PLAIN = SessionSettings()
VNNI = any("vnni" in flag for flag in detect_machine().flags)
NO_GPU = "GPU" not in {name.partition(".")[0] for name in openvino.Core().available_devices}


def save(text: str, path: Path, **weights: np.ndarray) -> Path:
    """Write the model that ``text`` describes with ``weights``."""
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def built(model: Path, folder: Path, settings: SessionSettings = PLAIN) -> Path:
    """The engine of ``model``."""
    return folder / BUILDER.build(model, folder, settings=settings).file


@pytest.fixture(scope="module")
def quantized(conv_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small CNN in integers, as the quantiser makes it for OpenVINO."""
    folder = tmp_path_factory.mktemp("quantized")
    random = np.random.default_rng(3)
    write_rows(
        folder / "rows",
        [{"x": random.normal(size=(1, 1, 8, 8)).astype(np.float32)} for _ in range(32)],
    )
    scheme = get_target("openvino", machine=detect_machine()).int8
    config = CalibrateConfig(model=conv_onnx, samples=folder / "rows", scheme=scheme)
    calibrate(config, output=folder)
    made = quantize(
        QuantizeConfig(
            model=conv_onnx,
            quantization=StaticInt8(),
            scheme=scheme,
            samples=folder / "rows",
            statistics=folder,
        ),
        output=folder,
    )
    return folder / made.file


def decibel(wanted: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(found.astype(np.float64) - wanted).mean()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).mean() / max(noise, 1e-30)))


def test_the_builder_names_the_installed_version() -> None:
    """Without the commit that OpenVINO adds."""
    found = BUILDER.availability()
    assert found.available
    assert openvino.__version__.startswith(f"{found.version}-")


def test_nothing_is_told_to_the_vendor(linear_onnx: Path, tmp_path: Path) -> None:
    """The package that reports each import is not loaded, and leaves no identifier at home."""
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from equipoise.runtimes.openvino.builder import BUILDER\n"
        "from equipoise.runtimes.openvino.session import open_session\n"
        "from equipoise.runtimes.protocol import SessionSettings\n"
        "made = BUILDER.build(Path(sys.argv[1]), Path(sys.argv[2]), settings=SessionSettings())\n"
        "open_session(Path(sys.argv[2]) / made.file, settings=SessionSettings()).close()\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    home = tmp_path / "home"
    home.mkdir()
    # In an environment of continuous integration, OpenVINO tells nothing in any case.
    kept = {k: v for k, v in os.environ.items() if k not in {"CI", "TF_BUILD", "JENKINS_URL"}}
    child = subprocess.run(
        [sys.executable, "-c", program, str(linear_onnx), str(tmp_path / "engine")],
        capture_output=True, text=True, check=True, timeout=120, env={**kept, "HOME": str(home)},
    )  # fmt: skip
    assert child.stdout.strip() == "[]"
    assert list(home.iterdir()) == []


@pytest.mark.skipif(not VNNI, reason="without VNNI, OpenVINO's int8 kernels saturate")
def test_a_quantised_model_runs_in_integers_as_well_as_in_onnx_runtime(
    quantized: Path, conv_onnx: Path, tmp_path: Path
) -> None:
    """Every layer has an integer kernel, and the noise is that of ONNX Runtime within 2 dB."""
    record = BUILDER.build(quantized, tmp_path, settings=PLAIN)
    layers = {n: c for n, c in record.kernels.items() if n.startswith(("Convol", "FullyConn"))}
    assert sum(layers.values()) >= 2
    assert {name.partition(" ")[2] for name in layers} <= {"u8", "i8"}
    assert record.notes == ()
    feeds = {"x": np.random.default_rng(4).normal(size=(64, 1, 8, 8)).astype(np.float32)}
    with (
        open_onnxruntime(conv_onnx, settings=PLAIN) as reference,
        open_onnxruntime(quantized, settings=PLAIN) as other,
        open_session(tmp_path / record.file, settings=PLAIN) as session,
    ):
        wanted = reference.run(feeds)["logits"]
        expected = decibel(wanted, other.run(feeds)["logits"])
        assert decibel(wanted, session.run(feeds)["logits"]) == pytest.approx(expected, abs=2)
    assert 20 < expected < 60


def test_without_optimisation_convolutions_of_integers_run_in_float(
    quantized: Path, tmp_path: Path
) -> None:
    """As the graph is written; said by the kernels, and no fault to note."""
    settings = SessionSettings(optimize="none")
    record = BUILDER.build(quantized, tmp_path, settings=settings)
    assert "Convolution f32" in record.kernels
    assert "Convolution u8" not in record.kernels
    assert record.notes == ()


def test_notes_say_what_runs_in_float_and_what_saturates(quantized: Path, conv_onnx: Path) -> None:
    """Of a quantised model alone; saturation where weights have eight bits and the CPU no VNNI."""
    kernels = {"Convolution f32": 2, "Pooling f32": 1, "FullyConnected u8": 1}
    floats = notes_on(quantized, kernels=kernels, flags=("avx2", "avx512_vnni"))
    assert floats == ("layers of a quantised model that run in float: 2 Convolution f32",)
    (saturates,) = notes_on(quantized, kernels={"Convolution u8": 2}, flags=("avx2", "fma"))
    assert "no VNNI" in saturates
    assert notes_on(conv_onnx, kernels=kernels, flags=("avx2",)) == ()


def test_a_model_with_types_of_all_kinds_keeps_them(tmp_path: Path) -> None:
    """Booleans, integers, halves, doubles, and a scalar."""
    path = save(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        kinds (bool[n] b, int32[n] i, int64 s, double[n] d, float16[n] h)
            => (bool[n] nb, int32[n] ni, int64 ns, double[n] nd, float16[n] nh) {
            nb = Not(b)
            ni = Add(i, i)
            ns = Neg(s)
            nd = Mul(d, d)
            nh = Neg(h)
        }
        """,
        tmp_path / "kinds.onnx",
    )
    feeds = {
        "b": np.array([True, False]),
        "i": np.array([3, -4], dtype=np.int32),
        "s": np.array(5),
        "d": np.array([0.5, 3.0]),
        "h": np.array([1.5, -2.0], dtype=np.float16),
    }
    with open_session(built(path, tmp_path / "engine"), settings=PLAIN) as session:
        found = session.run(feeds)
    expected = {
        "nb": np.array([False, True]),
        "ni": np.array([6, -8], dtype=np.int32),
        "ns": np.array(-5),
        "nd": np.array([0.25, 9.0]),
        "nh": np.array([-1.5, 2.0], dtype=np.float16),
    }
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array)


def test_an_engine_keeps_the_names_of_dynamic_dimensions(conv_onnx: Path, tmp_path: Path) -> None:
    """IR forgets them; the engine does not."""
    with open_session(built(conv_onnx, tmp_path), settings=PLAIN) as session:
        shape = ("batch", 1, 8, 8)
        assert session.inputs == (TensorSpec(name="x", dtype="float32", shape=shape),)
        assert session.outputs[0].shape == ("batch", 10)


def test_weights_keep_their_precision(tmp_path: Path) -> None:
    """OpenVINO would store them as float16 by itself."""
    weight = np.float32(1) + np.linspace(0, 1e-5, 4096, dtype=np.float32)
    path = save(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        exact (float[4096] x) => (float[4096] y) { y = Mul(x, w) }
        """,
        tmp_path / "exact.onnx",
        w=weight,
    )
    with open_session(built(path, tmp_path / "engine"), settings=PLAIN) as session:
        found = session.run({"x": np.ones(4096, dtype=np.float32)})["y"]
    np.testing.assert_array_equal(found, weight)


def test_settings_reach_openvino(conv_onnx: Path, tmp_path: Path) -> None:
    """Threads, hint, streams and precision."""
    engine = built(conv_onnx, tmp_path)
    with open_session(engine, settings=SessionSettings(threads=2)) as session:
        ask = session._compiled.get_property
        assert (ask("INFERENCE_NUM_THREADS"), ask("NUM_STREAMS")) == (2, 1)
        assert ask("INFERENCE_PRECISION_HINT") == openvino.Type.f32
        assert "LATENCY" in str(ask("PERFORMANCE_HINT"))
    with open_session(engine, settings=SessionSettings(hint="throughput")) as session:
        assert "THROUGHPUT" in str(session._compiled.get_property("PERFORMANCE_HINT"))


def test_threads_share_a_session(conv_onnx: Path, tmp_path: Path) -> None:
    """Each gets the outputs of its own inputs."""
    random = np.random.default_rng(5)
    feeds = [{"x": random.normal(size=(1, 1, 8, 8)).astype(np.float32)} for _ in range(200)]
    with open_session(built(conv_onnx, tmp_path), settings=PLAIN) as session:
        alone = [session.run(each)["logits"] for each in feeds]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda each: session.run(each)["logits"], feeds))
    np.testing.assert_array_equal(alone, together)


def _cut(engine: Path) -> None:
    weights = engine.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:100])


def _foreign(engine: Path) -> None:
    text = engine.read_text()
    engine.write_text(text.replace("<equipoise>", "<other>").replace("</equipoise>", "</other>"))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_cut, "Incorrect weights"),
        (lambda e: e.with_suffix(".bin").unlink(), "engine.xml"),
        (lambda e: e.write_text(e.read_text()[: e.stat().st_size // 2]), "Error parsing"),
        (lambda e: e.write_bytes(b"PK\x03\x04" + bytes(400)), "no OpenVINO IR"),
        (_foreign, "equipoise did not build"),
    ],
    ids=["short-weights", "no-weights", "short-graph", "foreign-file", "foreign-ir"],
)
def test_a_broken_engine_is_a_source_error_that_names_it(
    conv_onnx: Path, tmp_path: Path, harm, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing is written to the terminal by OpenVINO."""
    engine = built(conv_onnx, tmp_path)
    harm(engine)
    with pytest.raises(SourceError, match=words) as caught:
        open_session(engine, settings=PLAIN)
    assert str(engine) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU for OpenVINO")
def test_a_device_that_is_not_here_is_named_with_those_that_are(
    conv_onnx: Path, tmp_path: Path
) -> None:
    """An engine for it is built, not loaded; opening it is an IncompatibleError."""
    settings = SessionSettings(providers=("GPU",))
    record = BUILDER.build(conv_onnx, tmp_path, settings=settings)
    assert not record.loaded
    assert record.kernels == {}
    for providers in (("GPU",), ("GPU.1", "CPU")):
        with pytest.raises(IncompatibleError, match=rf"no device '{providers[0]}'.*CPU"):
            open_session(tmp_path / record.file, settings=SessionSettings(providers=providers))
    with open_session(tmp_path / record.file, settings=PLAIN) as session:
        assert session.run({"x": np.zeros((1, 1, 8, 8), np.float32)})["logits"].shape == (1, 10)


def test_what_is_no_device_is_a_usage_error(conv_onnx: Path, tmp_path: Path) -> None:
    """With the nearest name, for the builder and the session."""
    settings = SessionSettings(providers=("NPUs",))
    with pytest.raises(UsageError, match="unknown OpenVINO device 'NPUs'") as caught:
        BUILDER.build(conv_onnx, tmp_path, settings=settings)
    assert "'NPU'" in caught.value.hint
    with pytest.raises(UsageError, match="'NPUs'"):
        open_session(built(conv_onnx, tmp_path), settings=settings)


def test_several_devices_share_a_model_in_their_order() -> None:
    """One goes by its own name; settings of the CPU are for that alone."""
    shared = SessionSettings(providers=("GPU.1", "CPU"))
    assert device_of(shared) == "HETERO:GPU.1,CPU"
    assert device_config(shared) == {"PERFORMANCE_HINT": "LATENCY"}
    assert device_of(SessionSettings(providers=("NPU",))) == "NPU"
    gpu = device_config(SessionSettings(providers=("GPU",), hint="throughput"))
    assert gpu == {"PERFORMANCE_HINT": "THROUGHPUT", "EXECUTION_MODE_HINT": "ACCURACY"}


def test_the_cpu_can_be_named(conv_onnx: Path, tmp_path: Path) -> None:
    """It is what runs when nothing is."""
    settings = SessionSettings(providers=("CPU",))
    feeds = {"x": np.ones((2, 1, 8, 8), np.float32)}
    with (
        open_session(built(conv_onnx, tmp_path, settings), settings=settings) as named,
        open_session(tmp_path / "engine.xml", settings=PLAIN) as plain,
    ):
        np.testing.assert_array_equal(named.run(feeds)["logits"], plain.run(feeds)["logits"])


def test_refusals_name_the_operator(conv_onnx: Path, tmp_path: Path) -> None:
    """One that OpenVINO has no rule for; none of a model that it runs."""
    odd = save(
        """
        <ir_version: 9, opset_import: ["" : 20, "nobody" : 1]>
        odd (float[n] x) => (float[n] y) { y = nobody.Nothing(x) }
        """,
        tmp_path / "odd.onnx",
    )
    assert BUILDER.refusals(conv_onnx) == ()
    (why,) = BUILDER.refusals(odd) or ()
    assert "nobody.Nothing" in why
    with pytest.raises(SourceError, match=r"odd\.onnx.*nobody\.Nothing") as caught:
        BUILDER.build(odd, tmp_path / "engine", settings=PLAIN)
    assert "\n" not in caught.value.message


def test_a_failure_at_run_time_is_a_backend_error(tmp_path: Path) -> None:
    """Sizes that do not fit are refused by the kernel; the session goes on.

    One thread: OpenVINO's own ``infer`` then gives empty arrays and no error.
    """
    path = save(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        inner (float[n, k] x, float[m, 2] z) => (float[n, 2] y) { y = MatMul(x, z) }
        """,
        tmp_path / "inner.onnx",
    )
    z = np.zeros((4, 2), np.float32)
    with open_session(built(path, tmp_path / "engine"), settings=PLAIN) as session:
        with pytest.raises(BackendError, match="OpenVINO failed: ") as caught:
            session.run({"x": np.zeros((5, 3), np.float32), "z": z})
        assert caught.value.__cause__ is not None
        assert session.run({"x": np.zeros((3, 4), np.float32), "z": z})["y"].shape == (3, 2)
