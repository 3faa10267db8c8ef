"""TensorRT-RTX builds real engines here; TensorRT by a fake; nothing is loaded unchecked."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from equipoise import fs, progress, testing
from equipoise.data.readers.npz import read_arrays
from equipoise.errors import (
    EquipoiseError,
    IncompatibleError,
    InputError,
    IntegrityError,
    MissingExtraError,
    SourceError,
    UsageError,
)
from equipoise.quantize.blockwise import BlockGrid, Gptq
from equipoise.quantize.halves import Halves
from equipoise.quantize.schemes import Quantization, StaticInt8
from equipoise.quantize.weight_only import WeightOnly
from equipoise.quantizing import QuantizeRequest, quantize_model
from equipoise.runtimes.build import BuildConfig, build
from equipoise.runtimes.engine import (
    ENGINE_MANIFEST,
    manifest_sha256,
    read_engine_manifest,
)
from equipoise.runtimes.protocol import (
    BuildSettings,
    EngineRecord,
    SessionSettings,
    SizeRange,
)
from equipoise.runtimes.registry import builder, session_opener
from equipoise.runtimes.tensorrt import session as sessions
from equipoise.runtimes.tensorrt.builder import layer_kinds
from equipoise.runtimes.tensorrt.cuda import Gpu, find_gpu
from equipoise.runtimes.tensorrt.plan import read_plan

trt = pytest.importorskip("tensorrt_rtx")

CAPABILITIES = ("8.6", "8.9", "12.0")
PRECISIONS: dict[str, Quantization | None] = {
    "float32": None,
    "float16": Halves(dtype="float16"),
    "int8": StaticInt8(),
    "int4": WeightOnly(
        grid=BlockGrid(bits=4, block_size=32, symmetric=True),
        algorithm=Gptq(),
        form="qdq",
        tables="float",
    ),
}
LEAST_SQNR_DB = {"float16": 30.0, "int8": 20.0, "int4": 20.0}
NO_GPU = pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU here")
GPU_HERE = pytest.mark.skipif(find_gpu() is not None, reason="there is an NVIDIA GPU here")
CNN = """
    <ir_version: 9, opset_import: ["" : 20]>
    digits (float[batch, 1, 8, 8] x) => (float[batch, 10] logits) {
        c1 = Conv <pads = [1, 1, 1, 1]> (x, k1, b1)
        r1 = Relu(c1)
        c2 = Conv <pads = [1, 1, 1, 1]> (r1, k2, b2)
        s = Add(c2, r1)
        r2 = Relu(s)
        f = Flatten(r2)
        logits = Gemm(f, w, b)
    }
"""
SHAPES = {
    "k1": (8, 1, 3, 3),
    "b1": (8,),
    "k2": (8, 8, 3, 3),
    "b2": (8,),
    "w": (512, 10),
    "b": (10,),
}
"""Of the weights of CNN, which is of the size of a net for scikit-learn's digits."""

Make = Callable[[str, str], Path]


# Models.


def parsed(text: str) -> Any:
    """A model from ONNX text."""
    return onnx.parser.parse_model(text)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name -> a float model, and inputs to calibrate on."""
    folder = tmp_path_factory.mktemp("floats")
    random = np.random.default_rng(0)
    cnn = parsed(CNN)
    for name, shape in SHAPES.items():
        array = random.normal(scale=0.2, size=shape).astype(np.float32)
        cnn.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(cnn, folder / "cnn.onnx")
    testing.write_model(folder / "conformance.onnx")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    pictures = (digits.data[:128] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    feeds = {"cnn": {"x": pictures}, "conformance": testing.sample_feeds(128)}
    for name, arrays in feeds.items():
        np.savez(folder / f"{name}.npz", **arrays, label=np.zeros(128, dtype=np.int64))
    return {name: (folder / f"{name}.onnx", folder / f"{name}.npz") for name in feeds}


@pytest.fixture(scope="module")
def made(floats: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A model at a precision, quantised for TensorRT-RTX."""
    folder = tmp_path_factory.mktemp("made")

    def make(name: str, precision: str, target: str = "tensorrt-rtx") -> Path:
        model, data = floats[name]
        scheme = PRECISIONS[precision]
        if scheme is None:
            return model
        path = folder / f"{name}-{precision}-{target}.onnx"
        if not path.exists():
            request = QuantizeRequest(
                model=model, output=path, data=str(data), quantization=scheme, target=target
            )
            quantize_model(request)
        return path

    return make


def build_rtx(model: Path, output: Path, **options: Any) -> EngineRecord:
    """Build for TensorRT-RTX, with the manifest."""
    fs.make_directory(output)
    config = BuildConfig(
        model=model,
        runtime="tensorrt-rtx",
        settings=SessionSettings(),
        options=BuildSettings(**{"compute_capabilities": ("8.6",), **options}),
    )
    return build(config, output=output)


def saved(text: str, path: Path) -> Path:
    """A model without weights from ONNX text, in a file."""
    onnx.save(parsed(text), path)
    return path


# Engines that are really built.

CASES = [(name, p) for name in ("conformance", "cnn") for p in PRECISIONS]
CASES.remove(("conformance", "int4"))  # its product has four rows; a block has sixteen at least


@pytest.mark.parametrize(("name", "precision"), CASES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_engines_are_built_without_a_gpu(
    made: Make, tmp_path: Path, name: str, precision: str, capability: str
) -> None:
    """For each capability an engine whose record and manifest say what it is."""
    found = build_rtx(made(name, precision), tmp_path / "e", compute_capabilities=(capability,))
    assert found.version == trt.__version__
    assert found.compute_capabilities == (capability,)
    assert found.loaded == (find_gpu() is not None and capability == find_gpu().compute_capability)
    manifest = read_engine_manifest(tmp_path / "e")
    assert set(manifest.files) == {"engine.rtx", "plan.json"}
    assert (tmp_path / "e" / "engine.rtx").stat().st_size > 50_000


def sqnr_db(reference: dict[str, Any], found: dict[str, Any]) -> float:
    """The least signal to noise of all outputs."""
    ratios = []
    for name, signal in reference.items():
        wanted = np.asarray(signal, dtype=np.float64)
        noise = np.square(found[name] - wanted).sum()
        ratios.append(10 * np.log10(np.square(wanted).sum() / max(noise, 1e-30)))
    return float(min(ratios))


def outputs_of(model: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    """By ONNX Runtime, without its int8 kernels, which saturate on CPUs without VNNI."""
    settings = SessionSettings(optimize="none")
    with session_opener("onnxruntime")(model, settings=settings) as session:
        return session.run(feeds)


def inputs_of(data: Path, count: int) -> dict[str, Any]:
    """The first rows of a file of inputs."""
    arrays = read_arrays(data)
    return {name: array[:count] for name, array in arrays.items() if name != "label"}


@pytest.mark.parametrize(("name", "precision"), [c for c in CASES if c[1] != "float32"])
def test_what_the_parser_takes_is_close_to_float_on_onnxruntime(
    made: Make, floats: dict[str, tuple[Path, Path]], name: str, precision: str
) -> None:
    """The same file: no refusal, and the signal to noise of its precision."""
    model, data = floats[name]
    path = made(name, precision)
    assert builder("tensorrt-rtx").refusals(path) == ()
    feeds = inputs_of(data, 64)
    ratio = sqnr_db(outputs_of(model, feeds), outputs_of(path, feeds))
    assert ratio > LEAST_SQNR_DB[precision]


def test_integers_stay_integers_in_the_network(made: Make) -> None:
    """Q/DQ arrive as int8 and blocks as int4: nothing was folded into floats on the way."""
    from equipoise.runtimes.tensorrt.flavor import RTX
    from equipoise.runtimes.tensorrt.parsing import attempt

    for precision, wanted in (("int8", trt.int8), ("int4", trt.int4)):
        network = attempt(trt, made("cnn", precision), flavor=RTX)[0].network
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        read = {x.get_input(0).dtype for x in layers if x.type == trt.LayerType.DEQUANTIZE}
        assert read == {wanted}


def test_one_engine_may_be_for_several_gpus_and_sizes(made: Make, tmp_path: Path) -> None:
    """Capabilities sorted and each once; profiles beside the engine; no note."""
    batches = [{"batch": SizeRange(least=1, usual=n, largest=n)} for n in (16, 1)]
    found = build_rtx(
        made("cnn", "float16"),
        tmp_path / "e",
        compute_capabilities=("12.0", "8.6", "12.0"),
        profiles=tuple(batches),
    )
    assert found.compute_capabilities == ("8.6", "12.0")
    assert found.notes == ()
    plan = read_plan(tmp_path / "e")
    assert list(plan.profiles) == batches
    feeds = [{"x": np.zeros((n, 1, 8, 8), dtype=np.float32)} for n in (1, 2, 16, 17)]
    assert [plan.profile_for(f) for f in feeds[:3]] == [1, 0, 0]
    with pytest.raises(InputError, match=r"takes batch 17; .* batch 1 to 16 or batch 1 to 1"):
        plan.profile_for(feeds[3])
    smaller = build_rtx(made("cnn", "float16"), tmp_path / "one", profiles=(batches[1],))
    assert smaller.size_bytes < found.size_bytes


def test_a_dimension_without_a_profile_gets_a_range_that_is_told(tmp_path: Path) -> None:
    """Batches 1 to 8, sequences 1 to 256; what a profile names it decides."""
    text = """
        <ir_version: 9, opset_import: ["" : 20]>
        rows (float[N, seq_len, 4] x) => (float[N, seq_len, 4] y) { y = Relu(x) }
    """
    model = saved(text, tmp_path / "rows.onnx")
    found = build_rtx(model, tmp_path / "e")
    assert [("'N'" in n and "1 to 8" in n) for n in found.notes] == [True, False]
    assert "'seq_len': it takes 1 to 256 and is fast at 64" in found.notes[1]
    one = SizeRange(least=2, usual=2, largest=2)
    found = build_rtx(model, tmp_path / "two", profiles=({"N": one},))
    assert len(found.notes) == 1
    assert read_plan(tmp_path / "two").profiles[0]["N"] == one


def test_the_default_is_every_usual_gpu(made: Make, tmp_path: Path) -> None:
    """Where neither the user nor a GPU says which."""
    found = build_rtx(made("cnn", "float32"), tmp_path / "e", compute_capabilities=())
    assert found.compute_capabilities in {
        ("8.0", "8.6", "8.9", "12.0"),
        *((c,) for c in CAPABILITIES),
    }


def test_building_reports_progress(made: Make, tmp_path: Path) -> None:
    """Whole phases, up to their ends."""
    heard: list[tuple[int, int]] = []
    progress.listen(lambda done, total: heard.append((done, total)))
    build_rtx(made("cnn", "float32"), tmp_path / "e")
    assert heard
    assert heard[-1][0] == heard[-1][1]
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_two_builds_give_the_same_specs_and_an_unused_timing_cache_is_told(
    made: Make, tmp_path: Path
) -> None:
    """TensorRT-RTX times nothing while it builds."""
    cache = tmp_path / "timings.bin"
    found = build_rtx(made("cnn", "float32"), tmp_path / "e", timing_cache=cache)
    assert any("times no kernels" in note for note in found.notes)
    assert not cache.exists()
    plan = read_plan(tmp_path / "e")
    assert [str(s) for s in plan.inputs] == ["x: float32[batch, 1, 8, 8]"]
    assert [str(s) for s in plan.outputs] == ["logits: float32[batch, 10]"]


# What cannot be built.


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"compute_capabilities": ("8.7",)}, IncompatibleError, "8.7; it can for 7.5, 8.0, 8.6"),
        ({"compute_capabilities": ("8.6", "9.0")}, IncompatibleError, "capability 9.0"),
        ({"compute_capabilities": ("11.0",)}, IncompatibleError, "capability 11.0"),
        ({"compute_capabilities": ("7.5",)}, SourceError, "FP32 GEMM is not supported"),
        ({"version_compatible": True}, IncompatibleError, "no --version-compatible"),
        ({"hardware_compatible": True}, IncompatibleError, "name every compute capability"),
        ({"strip_weights": True}, IncompatibleError, "without weights"),
        (
            {"profiles": ({"bath": SizeRange(least=1, usual=1, largest=2)},)},
            UsageError,
            "Did you mean 'batch'",
        ),
        (
            {"profiles": ({"batch": SizeRange(least=3, usual=2, largest=4)},)},
            UsageError,
            "3:2:4; expected 1 <= least",
        ),
    ],
)
def test_options_that_cannot_be_had_are_refused(
    made: Make, tmp_path: Path, options: dict[str, Any], error: type[EquipoiseError], words: str
) -> None:
    """Each with its reason; nothing is left behind."""
    with pytest.raises(error) as caught:
        build_rtx(made("cnn", "float32"), tmp_path / "e", **options)
    assert words in str(caught.value)
    assert caught.value.exit_code == error.exit_code
    assert not list((tmp_path / "e").iterdir())


def test_turing_takes_float16(made: Make, tmp_path: Path) -> None:
    """What the message about 7.5 advises works."""
    found = build_rtx(made("cnn", "float16"), tmp_path / "e", compute_capabilities=("7.5",))
    assert found.compute_capabilities == ("7.5",)


def test_a_profile_for_fixed_sizes_is_refused(tmp_path: Path) -> None:
    """There is nothing that it could say."""
    text = """
        <ir_version: 9, opset_import: ["" : 20]>
        fixed (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }
    """
    model = saved(text, tmp_path / "fixed.onnx")
    one = {"x": SizeRange(least=2, usual=2, largest=2)}
    with pytest.raises(IncompatibleError, match="every size of the model is fixed"):
        build_rtx(model, tmp_path / "e", profiles=(one,))
    assert build_rtx(model, tmp_path / "e").notes == ()


def test_the_integers_of_another_target_are_refused_node_by_node(
    made: Make, tmp_path: Path
) -> None:
    """All of them: int32 biases, zero points, and uint8 that would be read as int8."""
    model = made("cnn", "int8", "x86-vnni")  # type: ignore[call-arg]
    graph = onnx.load(model).graph
    refused = builder("tensorrt-rtx").refusals(model)
    assert refused is not None
    biases = [n.name for n in graph.node if n.name.endswith("bias.DequantizeLinear")]
    quantizers = [n.name for n in graph.node if n.op_type == "QuantizeLinear"]
    assert len(biases) == 3
    assert sorted(line.split("'")[1] for line in refused) == sorted(biases + quantizers)
    assert sum("has type Int32" in line for line in refused) == len(biases)
    assert sum("read as int8" in line or "Non-zero" in line for line in refused) == len(quantizers)
    with pytest.raises(SourceError) as caught:
        build_rtx(model, tmp_path / "e")
    assert "bias.DequantizeLinear" in caught.value.message
    assert "input has type Int32 but must have type" in caught.value.message
    assert "--target tensorrt-rtx" in caught.value.hint


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ("int8 z = {3}", "Non-zero zero point"),
        ("uint8 z = {128}", "Non-zero zero point"),
        ("uint8 z = {0}", "would be read as int8"),
        ("int8 z = {0}", ""),
    ],
)
def test_zero_points(tmp_path: Path, zero: str, words: str) -> None:
    """The parser takes uint8 with zero point 0, and would cut its upper half; we do not."""
    text = f"""
        <ir_version: 9, opset_import: ["" : 20]>
        q (float[batch, 8] x) => (float[batch, 8] y) <float s = {{0.1}}, {zero}> {{
            a = QuantizeLinear(x, s, z)
            b = DequantizeLinear(a, s, z)
            c = QuantizeLinear(b, s, z)
            d = DequantizeLinear(c, s, z)
            y = Relu(d)
        }}
    """
    refused = builder("tensorrt-rtx").refusals(saved(text, tmp_path / "q.onnx"))
    assert refused is not None
    assert len(refused) == (2 if words else 0)
    assert all(line.startswith("QuantizeLinear") and words in line for line in refused)


def test_unknown_operators_are_refused_all_at_once(tmp_path: Path) -> None:
    """With their names, and without the words of the parser's own source."""
    text = """
        <ir_version: 9, opset_import: ["" : 20, "mine" : 1]>
        odd (float[batch, 8] x) => (float[batch, 8] y) {
            a = Relu(x)
            b = mine.Strange(a)
            c = Bernoulli(b)
            y = Relu(c)
        }
    """
    model = saved(text, tmp_path / "odd.onnx")
    refused = builder("tensorrt-rtx").refusals(model)
    assert refused == (
        "Strange 'b': the operator is not supported",
        "Bernoulli 'c': the operator is not supported",
    )
    with pytest.raises(SourceError, match=r"odd\.onnx: Strange number 1: the operator is not"):
        build_rtx(model, tmp_path / "e")


def test_an_input_whose_values_are_sizes_is_refused(tmp_path: Path) -> None:
    """It could be built, and would not run."""
    text = """
        <ir_version: 9, opset_import: ["" : 20]>
        shaped (float[batch, 8] x, int64[2] to) => (float[a, b] y) {
            r = Relu(x)
            y = Reshape(r, to)
        }
    """
    with pytest.raises(SourceError, match="input 'to' are sizes"):
        build_rtx(saved(text, tmp_path / "shaped.onnx"), tmp_path / "e")


BUILDING = (
    "says-whether-it-is-available",
    "builds-an-engine-that-its-record-describes",
    "leaves-the-model-as-it-was",
    "refuses-a-model-that-is-none",
)
"""Cases of the conformance suite that open no session."""


@pytest.mark.parametrize("name", BUILDING)
def test_conformance_of_building(name: str, tmp_path: Path) -> None:
    """What can be said on a machine without a GPU."""
    by_name = {str(case): case for case in testing.cases()}
    by_name[name].run("tensorrt-rtx", folder=tmp_path)


# Nothing is deserialised unchecked.


@pytest.fixture(scope="module")
def engine(made: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an engine for 8.6 and 8.9."""
    output = tmp_path_factory.mktemp("engine") / "e"
    build_rtx(made("cnn", "float32"), output, compute_capabilities=("8.6", "8.9"))
    return output


@pytest.fixture
def copy(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, with a runtime that must not be asked."""

    def never(*_: object) -> None:
        pytest.fail("a session deserialised an engine that it should have refused")

    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", never)
    shutil.copytree(engine, tmp_path / "e")
    return tmp_path / "e"


def edit_manifest(directory: Path, **changes: Any) -> None:
    """Change fields of the manifest, and its own hash with them."""
    path = directory / ENGINE_MANIFEST
    found = json.loads(path.read_text())
    own = {k: v for k, v in changes.items() if k in found}
    found["engine"].update({k: v for k, v in changes.items() if k not in own})
    found |= own
    path.write_text(json.dumps(found | {"sha256": manifest_sha256(found)}))


def open_it(directory: Path) -> None:
    """Open the engine in a directory."""
    session_opener("tensorrt-rtx")(directory / "engine.rtx", settings=SessionSettings())


def truncate(directory: Path) -> None:
    path = directory / "engine.rtx"
    path.write_bytes(path.read_bytes()[:-1])


def flip(directory: Path) -> None:
    path = directory / "engine.rtx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_sizes(directory: Path) -> None:
    path = directory / "plan.json"
    path.write_text(path.read_text().replace("batch", "botch"))


WRONG: dict[str, tuple[Callable[[Path], None], type[EquipoiseError], str]] = {
    "no manifest": (lambda d: (d / ENGINE_MANIFEST).unlink(), IntegrityError, "engine.json"),
    "truncated": (truncate, IntegrityError, "not what its hash says"),
    "one bit": (flip, IntegrityError, "not what its hash says"),
    "its sizes": (other_sizes, IntegrityError, "plan.json is not what its hash says"),
    "an extra file": (lambda d: (d / "x.so").write_text("x"), IntegrityError, "x.so is not listed"),
    "another runtime": (
        lambda d: edit_manifest(d, runtime="tensorrt"),
        IncompatibleError,
        "an engine of 'tensorrt'",
    ),
    "another version": (
        lambda d: edit_manifest(d, version="1.6.0.1"),
        IncompatibleError,
        "is of TensorRT-RTX 1.6.0.1",
    ),
    "another platform": (
        lambda d: edit_manifest(d, platform="windows-AMD64"),
        IncompatibleError,
        "built on windows-AMD64",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_engine_that_is_not_what_it_says_is_never_loaded(
    copy: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the right GPU is there."""
    monkeypatch.setattr(sessions, "require_gpu", lambda _: Gpu(name="A", compute_capability="8.6"))
    spoil, error, words = WRONG[what]
    spoil(copy)
    with pytest.raises(error) as caught:
        open_it(copy)
    assert words in str(caught.value)
    assert caught.value.exit_code == error.exit_code


def test_an_engine_for_another_gpu_is_never_loaded(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names both, and the option to build for the one that is there."""
    gpu = Gpu(name="NVIDIA H100", compute_capability="9.0")
    monkeypatch.setattr(sessions, "require_gpu", lambda _: gpu)
    with pytest.raises(IncompatibleError, match=r"is for compute capability 8\.6, 8\.9; this GPU"):
        open_it(copy)


def test_an_engine_that_changes_while_it_is_read_is_never_loaded(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that are loaded are hashed themselves."""

    def swap(_: str) -> Gpu:
        flip(copy)
        return Gpu(name="A", compute_capability="8.6")

    monkeypatch.setattr(sessions, "require_gpu", swap)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        open_it(copy)


@GPU_HERE
def test_without_a_gpu_an_engine_is_not_loaded_and_it_is_said_what_to_do(copy: Path) -> None:
    """Exit code 5."""
    with pytest.raises(IncompatibleError, match="needs an NVIDIA driver and GPU") as caught:
        open_it(copy)
    assert caught.value.exit_code == 5
    assert "to the device" in caught.value.hint


def test_the_check_that_nothing_is_deserialised_can_fail(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is right reaches the runtime, which these tests would see."""
    monkeypatch.setattr(sessions, "require_gpu", lambda _: Gpu(name="A", compute_capability="8.6"))
    monkeypatch.setattr(sessions, "Device", Closable)
    with pytest.raises(pytest.fail.Exception, match="deserialised an engine"):
        open_it(copy)


class Closable:
    def close(self) -> None:
        """Nothing to free."""


EDGE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"onnx", "onnxruntime", "torch", "typer", "rich", "pynvml"}:
            raise ImportError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
from pathlib import Path
from equipoise.errors import IncompatibleError
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener

try:
    session_opener("tensorrt-rtx")(Path(sys.argv[1]), settings=SessionSettings())
except IncompatibleError as error:
    print(error.message)
print(sorted({n.split(".")[1] for n in sys.modules if n.startswith("equipoise.")}))
"""


@GPU_HERE
def test_a_device_needs_numpy_and_the_package_alone(engine: Path) -> None:
    """Up to the GPU, which is missing here, nothing that makes engines is imported."""
    command = [sys.executable, "-c", EDGE, str(engine / "engine.rtx")]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert child.returncode == 0, child.stderr
    message, modules = child.stdout.splitlines()
    assert "needs an NVIDIA driver and GPU" in message
    light = {
        "errors",
        "extras",
        "fs",
        "progress",
        "record",
        "registry",
        "vouching",
        "runtimes",
        "spec",
    }
    assert set(ast.literal_eval(modules)) <= light


# TensorRT, which is not in any index that these tests can reach.


def test_tensorrt_says_that_it_is_missing(made: Make, tmp_path: Path) -> None:
    """With the line that installs it; its engines are not opened either."""
    if builder("tensorrt").availability().available:
        pytest.skip("tensorrt is installed here")
    found = builder("tensorrt").availability()
    assert "tensorrt" in found.install
    model = made("cnn", "float32")
    with pytest.raises(MissingExtraError, match="TensorRT is not installed"):
        builder("tensorrt").build(model, tmp_path, settings=SessionSettings())
    assert builder("tensorrt").refusals(model) is None
    assert not list(tmp_path.iterdir())


def test_layers_are_counted_from_what_the_inspector_says() -> None:
    """With details, with names alone, and where it says nothing."""
    text = '{"Layers": [{"LayerType": "gemm"}, {"LayerType": "gemm"}, {"LayerType": "kgen"}]}'
    assert layer_kinds(text) == {"gemm": 2, "kgen": 1}
    assert layer_kinds('{"Layers": ["a", "b"]}') == {}
    assert layer_kinds("") == {}


# On a GPU.


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("case", testing.cases(), ids=str)
def test_conformance_on_a_gpu(case: testing.Case, tmp_path: Path) -> None:
    """The whole suite."""
    case.run("tensorrt-rtx", folder=tmp_path)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_compute_what_onnxruntime_computes_on_a_gpu(
    made: Make, floats: dict[str, tuple[Path, Path]], tmp_path: Path, precision: str
) -> None:
    """The same file on both, at two sizes."""
    model = made("cnn", precision)
    found = build_rtx(model, tmp_path / "e", compute_capabilities=())
    assert found.loaded
    with session_opener("tensorrt-rtx")(
        tmp_path / "e" / found.file, settings=SessionSettings()
    ) as session:
        for count in (1, 8):
            feeds = inputs_of(floats["cnn"][1], count)
            assert sqnr_db(outputs_of(model, feeds), session.run(feeds)) > 30
        with pytest.raises(InputError, match="no optimisation profile"):
            session.run(inputs_of(floats["cnn"][1], 9))
