"""What is handed to TensorRT 10 and 11 and to the driver, by fakes: neither can be had here.

The fake driver has its memory in this process, and the fake engine computes with NumPy. So these
tests show that arguments go where they belong, and nothing about TensorRT itself.
"""

from __future__ import annotations

import ctypes
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise import extras, fs, testing
from equipoise.errors import BackendError, IncompatibleError, InputError
from equipoise.runtimes.build import BuildConfig, build
from equipoise.runtimes.protocol import BuildSettings, EngineRecord, SessionSettings, SizeRange
from equipoise.runtimes.registry import builder, session_opener
from equipoise.runtimes.tensorrt import builder as builders
from equipoise.runtimes.tensorrt import flavor as flavors
from equipoise.runtimes.tensorrt import session as sessions
from equipoise.runtimes.tensorrt.cuda import Device, Gpu
from equipoise.runtimes.tensorrt.flavor import RTX, TENSORRT, network_flags

STREAM = 7
STRONGLY_TYPED = 3


class FakeDriver:
    """The functions of libcuda that are called, on memory of this process."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.current = 0
        self.retained = 0
        self.streams = 0
        self.full = False

    def cuDeviceGet(self, device: Any, _index: int) -> int:  # noqa: N802
        device._obj.value = 0
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, _device: Any) -> int:  # noqa: N802
        context._obj.value = 5
        self.retained += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, _device: Any) -> int:  # noqa: N802
        self.retained -= 1
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        self.current = context.value
        return 0

    def cuStreamCreate(self, stream: Any, _flags: int) -> int:  # noqa: N802
        stream._obj.value = STREAM
        self.streams += 1
        return 0

    def cuStreamDestroy_v2(self, _stream: Any) -> int:  # noqa: N802
        self.streams -= 1
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        return int(stream.value != STREAM)

    def cuMemAlloc_v2(self, block: Any, size: Any) -> int:  # noqa: N802
        if self.full:
            return 2
        buffer = ctypes.create_string_buffer(size.value)
        block._obj.value = ctypes.addressof(buffer)
        self.blocks[block._obj.value] = buffer
        return 0

    def cuMemFree_v2(self, block: Any) -> int:  # noqa: N802
        del self.blocks[block.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        return self._move(to, source, size, stream)

    def cuMemcpyDtoHAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        return self._move(to, source, size, stream)

    def _move(self, to: Any, source: Any, size: Any, stream: Any) -> int:
        inside = {to.value, source.value} & set(self.blocks)
        ctypes.memmove(to.value, source.value, size.value)
        return int(stream.value != STREAM or len(inside) != 1)

    def cuGetErrorName(self, _code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
        return 0


class Recorder:
    """Keeps the arguments of every method, which gives True."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def method(*arguments: Any, **named: Any) -> bool:
            self.calls.append((name, *arguments, *named.values()))
            return True

        return method


class FakeCache:
    def __init__(self, kept: bytes) -> None:
        self.kept = kept

    def serialize(self) -> bytes:
        return self.kept + b"+timings"


class FakeConfig(Recorder):
    def add_optimization_profile(self, profile: Recorder) -> int:
        self.calls.append(("profile", profile.calls))
        return 0

    def create_timing_cache(self, kept: bytes) -> FakeCache:
        return FakeCache(kept)

    def set_timing_cache(self, cache: FakeCache, *, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not ignore_mismatch and cache.kept != b"of another GPU"

    def get_timing_cache(self) -> FakeCache:
        return self.cache


class FakeContext:
    """Computes testing's model on the memory whose addresses it is given."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profiles: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profiles.append(index)
        return stream == STREAM

    def get_tensor_shape(self, _name: str) -> tuple[int, ...]:
        return (self.shapes["ids"][0], 3)

    def execute_async_v3(self, stream: int) -> bool:
        types_ = {"x": np.float32, "ids": np.int64}
        feeds = {name: self._array(name, self.shapes[name], kind) for name, kind in types_.items()}
        for name, array in testing.expected_outputs(feeds).items():
            self._array(name, array.shape, np.float32)[:] = array
        return stream == STREAM

    def _array(self, name: str, shape: tuple[int, ...], kind: Any) -> Any:
        count = int(np.prod(shape)) * np.dtype(kind).itemsize
        memory = (ctypes.c_char * count).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype=kind).reshape(shape)


class FakeEngine:
    names = ("x", "ids", "y", "rows")
    num_io_tensors = len(names)

    def __init__(self, context: FakeContext) -> None:
        self.context = context

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context(self) -> FakeContext:
        return self.context

    def create_engine_inspector(self) -> Any:
        text = '{"Layers": [{"LayerType": "gemm"}]}'
        return types.SimpleNamespace(get_engine_information=lambda _: text)


class Fake(types.ModuleType):
    """A module that looks like ``tensorrt`` where it is used."""

    def __init__(self, version: str) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.config, self.network, self.refitter = FakeConfig(), Recorder(), Recorder()
        self.network.num_inputs = 0
        self.network_flags: list[int] = []
        self.context = FakeContext()
        self.runtimes: list[Any] = []
        base = type("Base", (), {"__init__": lambda _: None})
        severity = types.SimpleNamespace(WARNING=2, ERROR=1, INTERNAL_ERROR=0)
        self.ILogger = type("ILogger", (base,), {"Severity": severity})
        self.IProgressMonitor = base
        self.ProfilingVerbosity = types.SimpleNamespace(DETAILED=2)
        self.LayerInformationFormat = types.SimpleNamespace(JSON=1)
        self.HardwareCompatibilityLevel = types.SimpleNamespace(AMPERE_PLUS="ampere")
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=STRONGLY_TYPED)
        names = ("TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT_IDENTICAL")
        self.BuilderFlag = types.SimpleNamespace(**{name: name for name in names})

    def Builder(self, _log: Any) -> Any:  # noqa: N802
        def create_network(flags: int) -> Recorder:
            self.network_flags.append(flags)
            return self.network

        return types.SimpleNamespace(
            create_network=create_network,
            create_builder_config=lambda: self.config,
            create_optimization_profile=Recorder,
            build_serialized_network=lambda *_: b"a plan",
        )

    def OnnxParser(self, _network: Any, _log: Any) -> Any:  # noqa: N802
        return types.SimpleNamespace(parse_from_file=lambda _: True, num_errors=0)

    def Runtime(self, _log: Any) -> Any:  # noqa: N802
        def deserialize(data: Any) -> FakeEngine | None:
            return FakeEngine(self.context) if bytes(data) == b"a plan" else None

        self.runtimes.append(
            types.SimpleNamespace(
                deserialize_cuda_engine=deserialize, engine_host_code_allowed=False
            )
        )
        return self.runtimes[-1]

    def Refitter(self, _engine: Any, _log: Any) -> Recorder:  # noqa: N802
        return self.refitter

    def OnnxParserRefitter(self, refitter: Recorder, _log: Any) -> Recorder:  # noqa: N802
        return refitter


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture(params=["10.16.1.11", "11.4.0.106"])
def fake(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, driver: FakeDriver
) -> Fake:
    """A fake of each generation, on a fake GPU of compute capability 8.7."""
    package, gpu = Fake(request.param), Gpu(name="Orin", compute_capability="8.7")
    for module in (builders, sessions):
        monkeypatch.setattr(module, "load", lambda _: package)
    monkeypatch.setattr(builders, "find_gpu", lambda: gpu)
    monkeypatch.setattr(sessions, "require_gpu", lambda _: gpu)
    monkeypatch.setattr(sessions, "Device", lambda: Device(driver))
    return package


def build_fake(folder: Path, **options: Any) -> tuple[EngineRecord, Path]:
    """Build testing's model with the fake."""
    model, output = folder / "model.onnx", folder / "e"
    testing.write_model(model)
    fs.make_directory(output)
    config = BuildConfig(
        model=model,
        runtime="tensorrt",
        settings=SessionSettings(),
        options=BuildSettings(**options),
    )
    return build(config, output=output), output


@pytest.mark.parametrize("case", testing.cases(), ids=str)
@pytest.mark.usefixtures("fake")
def test_the_suite_on_a_fake_driver_and_engine(case: testing.Case, tmp_path: Path) -> None:
    """Shapes, addresses, copies and buffers go where they belong."""
    case.run("tensorrt", folder=tmp_path)


def test_a_session_on_a_fake_driver_frees_everything(
    fake: Fake, driver: FakeDriver, tmp_path: Path
) -> None:
    """Memory grows with the batch, and none is left after close."""
    made, output = build_fake(tmp_path)
    with session_opener("tensorrt")(output / made.file, settings=SessionSettings()) as session:
        session.run(testing.sample_feeds(1))
        assert len(driver.blocks) == 4
        session.run(testing.sample_feeds(8))
        assert len(driver.blocks) == 4
        assert driver.current == 5
        with pytest.raises(InputError, match=r"takes batch 9; .* batch 1 to 8"):
            session.run(testing.sample_feeds(9))
        driver.full = True
        session.run(testing.sample_feeds(8))
    assert (driver.blocks, driver.retained, driver.streams) == ({}, 0, 0)
    assert fake.context.profiles == []


@pytest.mark.usefixtures("fake")
def test_a_fake_driver_without_memory_is_a_backend_error(
    driver: FakeDriver, tmp_path: Path
) -> None:
    """With the driver's own word for it."""
    made, output = build_fake(tmp_path)
    with session_opener("tensorrt")(output / made.file, settings=SessionSettings()) as session:
        driver.full = True
        with pytest.raises(BackendError, match=r"cuMemAlloc_v2.*CUDA_ERROR_OUT_OF_MEMORY"):
            session.run(testing.sample_feeds(1))


def test_a_fake_engine_gets_the_profile_that_fits(fake: Fake, tmp_path: Path) -> None:
    """Changed only when it has to be."""
    ranges = [SizeRange(least=1, usual=1, largest=1), SizeRange(least=2, usual=4, largest=8)]
    made, output = build_fake(tmp_path, profiles=tuple({"batch": r} for r in ranges))
    shapes = [
        [c for c in call[1] if c[0] == "set_shape"]
        for call in fake.config.calls
        if call[0] == "profile"
    ]
    assert shapes[1] == [
        ("set_shape", "x", (2, 4), (4, 4), (8, 4)),
        ("set_shape", "ids", (2,), (4,), (8,)),
    ]
    with session_opener("tensorrt")(output / made.file, settings=SessionSettings()) as session:
        for batch in (1, 1, 3, 8, 1):
            session.run(testing.sample_feeds(batch))
    assert fake.context.profiles == [1, 0]


def test_a_fake_tensorrt_is_told_what_its_generation_needs(fake: Fake, tmp_path: Path) -> None:
    """Strong typing where it is a choice, no TF32, no capabilities; the engine is of this GPU."""
    found, _ = build_fake(tmp_path, compute_capabilities=("8.7",))
    strongly = 1 << STRONGLY_TYPED
    assert fake.network_flags == [strongly if fake.__version__.startswith("10") else 0]
    assert ("clear_flag", "TF32") in fake.config.calls
    assert not any(call[0] in {"set_flag", "set_compute_capability"} for call in fake.config.calls)
    assert (found.version, found.compute_capabilities) == (fake.__version__, ("8.7",))
    assert (found.loaded, found.kernels, found.file) == (True, {"gemm": 1}, "engine.plan")


def test_a_fake_engine_without_weights_gets_them_from_the_file_beside_it(
    fake: Fake, tmp_path: Path
) -> None:
    """The ONNX file is part of the directory, so its hash is checked too."""
    made, output = build_fake(tmp_path, strip_weights=True)
    assert ("set_flag", "STRIP_PLAN") in fake.config.calls
    assert ("set_flag", "REFIT_IDENTICAL") in fake.config.calls
    session_opener("tensorrt")(output / made.file, settings=SessionSettings()).close()
    asked = ("refit_from_file", str(output / "weights.onnx"))
    assert fake.refitter.calls == [asked, ("refit_cuda_engine",)]


def test_a_fake_engine_may_hold_for_later_versions_and_gpus(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later minor versions, and 11 after 10; GPUs from 8.0."""
    made, output = build_fake(tmp_path, version_compatible=True, hardware_compatible=True)
    assert ("set_flag", "VERSION_COMPATIBLE") in fake.config.calls
    assert fake.config.hardware_compatibility_level == "ampere"
    built = fake.__version__

    def opens(version: str, capability: str) -> bool:
        fake.__version__ = version
        gpu = Gpu(name="another", compute_capability=capability)
        monkeypatch.setattr(sessions, "require_gpu", lambda _: gpu)
        try:
            session_opener("tensorrt")(output / made.file, settings=SessionSettings()).close()
        except IncompatibleError:
            return False
        return fake.runtimes[-1].engine_host_code_allowed

    assert opens(built, "9.0")
    assert opens("11.9.0.1", "8.0")
    assert not opens(built, "7.5")
    assert not opens("10.0.0.1", "8.7")
    assert not opens("12.0.0.1", "8.7")


def test_a_fake_timing_cache_is_read_and_written(fake: Fake, tmp_path: Path) -> None:
    """One of another GPU is told and begun anew."""
    cache = tmp_path / "timings.bin"
    found, _ = build_fake(tmp_path, timing_cache=cache)
    assert cache.read_bytes() == b"+timings"
    build_fake(tmp_path, timing_cache=cache)
    assert cache.read_bytes() == b"+timings+timings"
    assert not any("timings in" in note for note in found.notes)
    cache.write_bytes(b"of another GPU")
    found, _ = build_fake(tmp_path, timing_cache=cache)
    assert any("of another GPU or version" in note for note in found.notes)
    assert cache.read_bytes() == b"+timings"
    assert fake.config.calls


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("asked", ["8.6", "11.0"])
def test_a_fake_tensorrt_builds_for_the_gpu_here_alone(tmp_path: Path, asked: str) -> None:
    """Unless the engine is to be hardware-compatible."""
    with pytest.raises(IncompatibleError, match=f"compute capability 8.7, not for {asked}"):
        build_fake(tmp_path, compute_capabilities=(asked,))
    found, _ = build_fake(tmp_path, compute_capabilities=(asked,), hardware_compatible=True)
    assert found.compute_capabilities == ("8.7",)


@pytest.mark.usefixtures("fake")
def test_a_fake_tensorrt_without_a_gpu_or_with_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says to build on the device."""
    monkeypatch.setattr(builders, "find_gpu", lambda: None)
    with pytest.raises(IncompatibleError, match="there is none here"):
        build_fake(tmp_path)
    old = Gpu(name="T4", compute_capability="7.5")
    monkeypatch.setattr(builders, "find_gpu", lambda: old)
    with pytest.raises(IncompatibleError, match=r"8\.0 or later"):
        build_fake(tmp_path, hardware_compatible=True)
    assert build_fake(tmp_path)[0].compute_capabilities == ("7.5",)


def test_flags_and_generations_by_fake_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 8 and 12 are not known; TensorRT-RTX 1 takes no flag."""
    assert network_flags(TENSORRT, Fake("10.3.0")) == 1 << STRONGLY_TYPED
    assert network_flags(TENSORRT, Fake("11.4.1")) == 0
    assert network_flags(RTX, Fake("1.7.1.116")) == 0
    monkeypatch.setattr(extras, "installed", lambda _: True)
    for version in ("8.6.1", "12.0.0"):
        monkeypatch.setattr(extras, "require", lambda _, version=version: Fake(version))
        with pytest.raises(IncompatibleError, match="knows its major version 10 or 11"):
            flavors.load(TENSORRT)
        found = builder("tensorrt").availability()
        assert (found.available, version in found.reason) == (False, True)
