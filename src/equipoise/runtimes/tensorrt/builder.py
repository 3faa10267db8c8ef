"""Make an engine for TensorRT, of whichever flavour.

Precision comes from the graph alone: the network is strongly typed, and TF32 is off, so that
float32 means float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, onnxio, record
from equipoise.errors import BackendError, EquipoiseError, IncompatibleError, SourceError
from equipoise.runtimes.protocol import (
    Availability,
    BuildSettings,
    EngineRecord,
    SessionSettings,
)
from equipoise.runtimes.tensorrt.capabilities import chosen
from equipoise.runtimes.tensorrt.cuda import Gpu, find_gpu
from equipoise.runtimes.tensorrt.flavor import TENSORRT, Flavor, load
from equipoise.runtimes.tensorrt.messages import Heard, listening, logger, monitor
from equipoise.runtimes.tensorrt.parsing import Network, parse
from equipoise.runtimes.tensorrt.plan import PLAN_FILE, WEIGHTS_FILE, Plan
from equipoise.runtimes.tensorrt.profiles import Profiles, add_profiles, complete
from equipoise.runtimes.tensorrt.refusing import all_refusals
from equipoise.spec import TensorSpec

_OF_THE_MODEL: Final = ("not supported", "Cannot compile", "Could not find any implementation")
"""Words of the library when it is the model that cannot be built."""


@dataclass(frozen=True, kw_only=True)
class TensorRtBuilder:
    """See :class:`equipoise.runtimes.protocol.Builder`.

    Attributes:
        flavor: Which member of the family.
    """

    flavor: Flavor

    def availability(self) -> Availability:
        """Whether the package is installed and of a version that is known."""
        if not extras.installed(self.flavor.module):
            reason = f"the package {self.flavor.module} is not installed"
            return Availability(available=False, reason=reason, install=self.flavor.install)
        try:
            package = load(self.flavor)
        except IncompatibleError as error:
            return Availability(available=False, reason=error.message, install=error.hint)
        return Availability(available=True, version=str(package.__version__))

    def build(
        self,
        model: Path,
        output: Path,
        *,
        settings: SessionSettings,  # noqa: ARG002
        options: BuildSettings | None = None,
    ) -> EngineRecord:
        """Write the engine and what stands beside it to ``output``; load it where a GPU is.

        Raises:
            SourceError: The file is no ONNX model, or the parser or the compiler refuses it.
            UsageError: A profile names what the model has not.
            IncompatibleError: ``options`` ask for what cannot be had, or the package is missing.
            BackendError: The library failed.
        """
        inputs, outputs = onnxio.file_specs(model)
        asked = options or BuildSettings()
        refuse_lacking(self.flavor, asked)
        profiles = complete(asked.profiles, inputs)
        package, gpu = load(self.flavor), find_gpu()
        capabilities = chosen(
            self.flavor,
            asked.compute_capabilities,
            gpu=gpu,
            compatible=asked.hardware_compatible,
        )
        job = Job(
            flavor=self.flavor,
            package=package,
            model=model,
            options=asked,
            inputs=inputs,
            profiles=profiles,
            capabilities=capabilities,
        )
        made = compile_engine(job)
        _write(job, made, outputs=outputs, directory=output)
        return _record(job, made, gpu=gpu, directory=output)

    def refusals(self, model: Path) -> tuple[str, ...] | None:
        """Every node that the parser refuses; None where the package is not installed.

        Raises:
            SourceError: It is no ONNX model.
        """
        onnxio.file_specs(model)
        if not self.availability().available:
            return None
        return tuple(map(str, all_refusals(load(self.flavor), model, flavor=self.flavor)))


def refuse_lacking(flavor: Flavor, options: BuildSettings) -> None:
    """Raise IncompatibleError when ``options`` ask for what ``flavor`` does not have."""
    for name, why in flavor.lacks.items():
        if getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise IncompatibleError(
                f"{flavor.title} has no {option}: {why}", hint=f"Build without {option}."
            )


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that one engine is built from.

    Attributes:
        flavor: Which member of the family.
        package: Its module.
        model: ONNX file.
        options: What was asked for.
        inputs: Specs of the model's inputs.
        profiles: Complete profiles.
        capabilities: Compute capabilities to build for.
    """

    flavor: Flavor
    package: Any
    model: Path
    options: BuildSettings
    inputs: tuple[TensorSpec, ...]
    profiles: Profiles
    capabilities: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler gave.

    Attributes:
        data: Buffer with the engine.
        notes: What was noticed, in words.
    """

    data: Any
    notes: tuple[str, ...]


def compile_engine(job: Job) -> Compiled:
    """Parse and compile.

    Raises:
        SourceError: The model is refused.
        BackendError: The library failed.
    """
    parsed = parse(job.package, job.model, flavor=job.flavor)
    with listening(job.package) as heard:
        try:
            config, notes = _config(job, parsed)
            data = parsed.builder.build_serialized_network(parsed.network, config)
        except EquipoiseError:
            raise
        except Exception as error:  # the bindings raise what they like
            raise BackendError(f"{job.flavor.title} failed: {error}") from error
        if data is None:
            raise _failure(job, heard)
        notes += _keep_timings(job, config)
    return Compiled(data=data, notes=(*job.profiles.notes, *notes, *heard.notes()))


def _failure(job: Job, heard: Heard) -> EquipoiseError:
    said = (
        f"{job.flavor.title} {job.package.__version__} cannot build {job.model}: {heard.reason()}"
    )
    if not any(word in said for word in _OF_THE_MODEL):
        return BackendError(said)
    turing = "7.5" in job.capabilities and "Turing" in said
    hint = "Build from a float16 file (equipoise quantize --scheme float16), or without 7.5."
    return SourceError(said, hint=hint if turing else "")


def _config(job: Job, parsed: Network) -> tuple[Any, tuple[str, ...]]:
    config = parsed.builder.create_builder_config()
    config.progress_monitor = monitor(job.package)
    config.profiling_verbosity = job.package.ProfilingVerbosity.DETAILED
    config.clear_flag(job.package.BuilderFlag.TF32)
    _set_flags(job, config)
    if job.flavor.capabilities:
        _set_capabilities(job, config)
    add_profiles(config, parsed.builder, profiles=job.profiles.profiles, inputs=job.inputs)
    return config, _take_timings(job, config)


def _set_flags(job: Job, config: Any) -> None:
    package, options = job.package, job.options
    if options.version_compatible:
        config.set_flag(package.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = package.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.strip_weights:
        config.set_flag(package.BuilderFlag.STRIP_PLAN)
        # The weights put back are those it was built with, so kernels may be chosen by them.
        config.set_flag(package.BuilderFlag.REFIT_IDENTICAL)


def _set_capabilities(job: Job, config: Any) -> None:
    config.num_compute_capabilities = len(job.capabilities)
    for index, capability in enumerate(job.capabilities):
        member = getattr(job.package.ComputeCapability, f"SM{capability.replace('.', '')}")
        if not config.set_compute_capability(member, index):
            raise IncompatibleError(f"{job.flavor.title} refuses compute capability {capability}")


def _take_timings(job: Job, config: Any) -> tuple[str, ...]:
    """Give the kept kernel timings to ``config``; what was noticed."""
    path = job.options.timing_cache
    if path is None:
        return ()
    if not job.flavor.timing_cache:
        return (f"{job.flavor.title} times no kernels while it builds; {path} is not used",)
    kept = path.read_bytes() if path.is_file() else b""
    if config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False):
        return ()
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return (f"the timings in {path} are of another GPU or version; they are taken anew",)


def _keep_timings(job: Job, config: Any) -> tuple[str, ...]:
    path = job.options.timing_cache
    if path is not None and job.flavor.timing_cache:
        fs.write_bytes(path, bytes(config.get_timing_cache().serialize()))
    return ()


def _write(job: Job, made: Compiled, *, outputs: Sequence[TensorSpec], directory: Path) -> None:
    stripped = job.options.strip_weights
    if stripped:
        onnxio.copy_model(job.model, directory / WEIGHTS_FILE)
    with fs.replacing(directory / job.flavor.engine_file) as path, path.open("wb") as file:
        file.write(memoryview(made.data))
    plan = Plan(
        inputs=job.inputs,
        outputs=tuple(outputs),
        profiles=job.profiles.profiles,
        later_versions=job.options.version_compatible,
        later_gpus=job.options.hardware_compatible,
        weights=WEIGHTS_FILE if stripped else "",
    )
    fs.write_json(directory / PLAN_FILE, plan)


def _record(job: Job, made: Compiled, *, gpu: Gpu | None, directory: Path) -> EngineRecord:
    here = gpu is not None and gpu.compute_capability in job.capabilities
    kernels = engine_kernels(job, made) if here else {}
    return EngineRecord(
        file=job.flavor.engine_file,
        size_bytes=fs.tree_size_bytes(directory),
        kernels=kernels,
        notes=made.notes,
        version=str(job.package.__version__),
        compute_capabilities=job.capabilities,
        loaded=here,
    )


def engine_kernels(job: Job, made: Compiled) -> dict[str, int]:
    """Load the engine that was just built, and count its layers. Needs a GPU.

    Raises:
        BackendError: It does not load.
    """
    with listening(job.package) as heard:
        runtime = job.package.Runtime(logger(job.package))
        if job.options.version_compatible:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(made.data)
        if engine is None:
            raise BackendError(f"{job.flavor.title} does not load its engine: {heard.reason()}")
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(job.package.LayerInformationFormat.JSON)
    return layer_kinds(text)


def layer_kinds(text: str) -> dict[str, int]:
    """Layer type -> count, from what the engine inspector says; {} where it says only names."""
    try:
        found: Any = record.parse(text)
    except ValueError:
        return {}
    layers = found.get("Layers", []) if isinstance(found, dict) else []
    kinds = [layer.get("LayerType") for layer in layers if isinstance(layer, dict)]
    return dict(sorted(Counter(str(kind) for kind in kinds if kind).items()))


BUILDER: Final = TensorRtBuilder(flavor=TENSORRT)
