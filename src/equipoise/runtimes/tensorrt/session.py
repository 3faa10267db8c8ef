"""Run an engine of TensorRT. Imports nothing but NumPy and the vendor's package.

A serialised engine is code. None of it reaches the library before its manifest, its hash, the
version, the platform and the GPU have been checked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise.errors import BackendError, IncompatibleError, IntegrityError, SourceError
from equipoise.runtimes.base import BaseSession
from equipoise.runtimes.engine import EngineManifest, read_engine_manifest, this_platform
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.tensorrt.capabilities import refuse_other_gpu
from equipoise.runtimes.tensorrt.cuda import Device, require_gpu
from equipoise.runtimes.tensorrt.flavor import TENSORRT, Flavor, load, parts
from equipoise.runtimes.tensorrt.messages import listening, logger
from equipoise.runtimes.tensorrt.plan import Plan, read_plan
from equipoise.spec import Array, Feeds, TensorSpec

_NEXT_MAJOR: Final = {10: 11}
"""Major version -> the later one that loads its version-compatible engines."""


@dataclass(frozen=True, kw_only=True)
class CheckedEngine:
    """An engine that may be given to the library.

    Attributes:
        package: The library.
        plan: What stands beside the engine.
        data: Its bytes, which are what their hash says.
        directory: Where it lies.
        flavor: Which member of the family runs it.
    """

    package: Any
    plan: Plan
    data: bytes
    directory: Path
    flavor: Flavor


def check_engine(engine: Path, *, flavor: Flavor) -> CheckedEngine:
    """Read an engine, if it can be run here.

    Raises:
        IntegrityError: It is not what its manifest says, or has none.
        IncompatibleError: It is for another runtime, version, platform or GPU, or there is no GPU.
        MissingExtraError: The package is not installed.
    """
    manifest = read_engine_manifest(engine.parent)
    _check_kind(manifest, engine, flavor=flavor)
    plan = read_plan(engine.parent)
    package = load(flavor)
    _check_platform(manifest)
    _check_version(manifest, str(package.__version__), flavor=flavor, later=plan.later_versions)
    gpu = require_gpu(flavor.title)
    refuse_other_gpu(gpu, manifest.engine.compute_capabilities, later_gpus=plan.later_gpus)
    return CheckedEngine(
        package=package,
        plan=plan,
        data=_read(engine, manifest.files[engine.name]),
        directory=engine.parent,
        flavor=flavor,
    )


def _check_kind(manifest: EngineManifest, engine: Path, *, flavor: Flavor) -> None:
    if manifest.runtime != flavor.name:
        raise IncompatibleError(
            f"{engine} is an engine of {manifest.runtime!r}, not of {flavor.name!r}",
            hint="Open it with the runtime that its manifest names.",
        )
    if manifest.engine.file != engine.name:
        raise IntegrityError(
            f"the engine in {engine.parent} is {manifest.engine.file}, not {engine.name}"
        )


def _check_platform(manifest: EngineManifest) -> None:
    if manifest.platform != this_platform():
        raise IncompatibleError(
            f"the engine was built on {manifest.platform}; this machine is {this_platform()}",
            hint="Build it on a machine of this kind.",
        )


def _check_version(manifest: EngineManifest, version: str, *, flavor: Flavor, later: bool) -> None:
    built = manifest.engine.version
    if version == built or (later and _is_later(parts(version), parts(built))):
        return
    raise IncompatibleError(
        f"the engine is of {flavor.title} {built}{' or later' if later else ''}; {version} is"
        " installed here",
        hint=f"Install {flavor.module} {built}, or build the engine again with {version}.",
    )


def _is_later(version: tuple[int, ...], built: tuple[int, ...]) -> bool:
    """Whether ``version`` loads a version-compatible engine of ``built``."""
    if version[0] == built[0]:
        return version >= built
    return _NEXT_MAJOR.get(built[0]) == version[0]


def _read(engine: Path, expected: str) -> bytes:
    """The very bytes that have the hash: the file might change after it was checked."""
    data = engine.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise IntegrityError(f"{engine} changed while it was read")
    return data


class TensorRtSession(BaseSession):
    """An engine on the first GPU.

    Args:
        engine: Engine file, in the directory that its builder wrote.
        flavor: Which member of the family runs it.
    """

    def __init__(self, engine: Path, *, flavor: Flavor) -> None:
        checked = check_engine(engine, flavor=flavor)
        super().__init__(checked.plan.inputs, checked.plan.outputs)
        self._plan = checked.plan
        self._package = checked.package
        self._title = flavor.title
        self._device = Device()
        self._profile = 0
        try:
            self._runtime = self._package.Runtime(logger(self._package))
            self._engine = self._deserialized(checked)
            self._check_tensors()
            self._context = self._engine.create_execution_context()
            self._require(self._context is not None, "it made no execution context")
        except BaseException:
            self.close()
            raise

    def _require(self, condition: object, what: str) -> None:
        if not condition:
            raise BackendError(f"{self._title} failed: {what}")

    def _deserialized(self, checked: CheckedEngine) -> Any:
        # The engine carries code of its own for later versions; its hash has been checked.
        if checked.plan.later_versions:
            self._runtime.engine_host_code_allowed = True
        with listening(self._package) as heard:
            engine = self._runtime.deserialize_cuda_engine(checked.data)
            self._require(engine is not None, f"the engine does not load: {heard.reason()}")
            if checked.plan.weights:
                self._refit(engine, checked.directory / checked.plan.weights)
        return engine

    def _refit(self, engine: Any, weights: Path) -> None:
        """Put the weights in from the ONNX file."""
        package, log = self._package, logger(self._package)
        refitter = package.Refitter(engine, log)
        parser = package.OnnxParserRefitter(refitter, log)
        self._require(parser.refit_from_file(str(weights)), f"{weights} has not its weights")
        self._require(refitter.refit_cuda_engine(), f"weights of {weights} do not fit")

    def _check_tensors(self) -> None:
        """The engine has the tensors that stand beside it."""
        engine = self._engine
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        named = {spec.name for spec in (*self.inputs, *self.outputs)}
        if found != named:
            raise IntegrityError(
                f"the engine has the tensors {', '.join(sorted(found))}; beside it stand"
                f" {', '.join(sorted(named))}"
            )

    def _compute(self, feeds: Feeds) -> dict[str, Array]:
        profile = self._plan.profile_for(feeds)
        self._device.enter()
        with listening(self._package) as heard:
            self._use(profile)
            # Kept until the copies are done.
            arrays = {name: np.asarray(array, order="C") for name, array in feeds.items()}
            for name, array in arrays.items():
                shaped = self._context.set_input_shape(name, array.shape)
                self._require(shaped, f"input {name!r}: {heard.reason()}")
                self._context.set_tensor_address(name, self._device.upload(name, array))
            results = {spec.name: self._result(spec) for spec in self.outputs}
            ran = self._context.execute_async_v3(self._device.stream)
            self._require(ran, heard.reason())
        for name, array in results.items():
            self._device.download(name, array)
        self._device.synchronize()
        return results

    def _use(self, profile: int) -> None:
        if profile != self._profile:
            stream = self._device.stream
            chosen = self._context.set_optimization_profile_async(profile, stream)
            self._require(chosen, f"it has no optimisation profile {profile}")
            self._device.synchronize()
            self._profile = profile

    def _result(self, spec: TensorSpec) -> Array:
        """An array for an output, and memory for it on the GPU."""
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if any(size < 0 for size in shape):
            raise SourceError(
                f"the size of output {spec.name!r} depends on values, not on sizes; that is not"
                " supported",
                hint="Leave the operator that makes it, such as NonZero, out of the model.",
            )
        array = np.empty(shape, dtype=spec.dtype)
        address = self._device.memory(spec.name, max(array.nbytes, 1))
        self._context.set_tensor_address(spec.name, address)
        return array

    def close(self) -> None:
        """Free the engine, then the GPU's memory."""
        self._context = self._engine = self._runtime = None
        self._device.close()
        super().close()


def open_session(engine: Path, *, settings: SessionSettings) -> TensorRtSession:  # noqa: ARG001
    """Open ``engine``; what there is to set was set when it was built.

    Raises:
        IntegrityError: It is not what its manifest says.
        IncompatibleError: It is for another version, platform or GPU.
        MissingExtraError: tensorrt is not installed.
    """
    return TensorRtSession(engine, flavor=TENSORRT)
