"""The package openvino without its telemetry; its devices, its files and its errors."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras, record
from equipoise.errors import IncompatibleError, SourceError, unknown_name
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import TensorSpec

SPECS: Final = ["equipoise", "specs"]
"""Where an engine keeps its :class:`Specs`: IR forgets names of dynamic dimensions."""

DEVICES: Final = ("CPU", "GPU", "NPU")
_IR_HEAD_BYTES: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Specs:
    """What goes in and out of an engine."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def openvino() -> Any:
    """The package. Raises MissingExtraError when it is not installed."""
    # It reports every import to its vendor, with an identifier that it writes to the user's home,
    # unless the package for that is missing; there is no switch that a library could turn.
    with _hidden("openvino_telemetry"):
        return extras.require("openvino")


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Let imports of ``name`` fail inside the block."""
    modules: dict[str, Any] = sys.modules
    present = {key: modules[key] for key in (name,) if key in modules}
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]
        modules.update(present)


def version() -> str:
    """``2026.4.1``, without the commit that it was built from."""
    return str(openvino().__version__).partition("-")[0]


@functools.cache
def core() -> Any:
    """The ``openvino.Core`` of this process; plugins are loaded once."""
    return openvino().Core()


def first_line(error: Exception) -> str:
    """What OpenVINO says, without the lines that say where in its own sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(told) or str(error).strip() or type(error).__name__


def device_of(settings: SessionSettings) -> str:
    """``CPU``, or the devices that ``settings`` name, which share a model in their order.

    Raises:
        UsageError: A name is no device of OpenVINO.
    """
    for name in settings.providers:
        if name.partition(".")[0] not in DEVICES:
            raise unknown_name("OpenVINO device", name, DEVICES)
    names = settings.providers or ("CPU",)
    return names[0] if len(names) == 1 else f"HETERO:{','.join(names)}"


def missing_devices(settings: SessionSettings) -> tuple[str, ...]:
    """Devices that ``settings`` name and that are not here."""
    present = set(core().available_devices)
    present |= {name.partition(".")[0] for name in present}
    return tuple(name for name in settings.providers or ("CPU",) if name not in present)


def check_devices(settings: SessionSettings) -> None:
    """Raise IncompatibleError for a device that is not here, and UsageError for none at all."""
    device_of(settings)
    for name in missing_devices(settings):
        raise IncompatibleError(
            f"OpenVINO {version()} finds no device {name!r} here; it finds"
            f" {', '.join(core().available_devices) or 'none'}",
            hint="Install the vendor's driver for it, or name a device that is here.",
        )


def device_config(settings: SessionSettings) -> dict[str, Any]:
    """The properties with which a model is compiled."""
    device = device_of(settings)
    config: dict[str, Any] = {"PERFORMANCE_HINT": settings.hint.upper()}
    if device == "CPU":
        # Without the hint, a CPU with bfloat16 computes float32 models in that.
        config |= {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": settings.threads}
        if settings.hint == "latency":
            config["NUM_STREAMS"] = 1
        if settings.optimize == "none":
            config |= {"LP_TRANSFORMS_MODE": False, "SNIPPETS_MODE": "DISABLE"}
    elif device.partition(".")[0] == "GPU":
        config["EXECUTION_MODE_HINT"] = "ACCURACY"
    return config


def read_ir(engine: Path) -> Any:
    """The model in ``engine``. Raises SourceError: no such file, or no IR that can be read."""
    if not engine.is_file():
        raise SourceError(f"no such engine file: {engine}")
    with engine.open("rb") as file:
        # Other frontends of OpenVINO guess at what is no IR, and write to stderr.
        if b"<net " not in file.read(_IR_HEAD_BYTES):
            raise SourceError(f"{engine} is no OpenVINO IR", hint="Build the engine again.")
    weights = engine.with_suffix(".bin")
    try:
        return core().read_model(engine, weights)
    except Exception as error:  # RuntimeError, but nothing promises that
        raise SourceError(
            f"OpenVINO {version()} cannot load {engine} with {weights.name}: {first_line(error)}",
            hint="Build the engine again; its .xml and .bin belong together.",
        ) from error


def specs_of(model: Any, engine: Path) -> Specs:
    """What the builder wrote into the engine. Raises SourceError when it did not make it."""
    if not model.has_rt_info(SPECS):
        raise SourceError(
            f"{engine} is an OpenVINO IR that equipoise did not build",
            hint="Build it from the ONNX file with `equipoise build`.",
        )
    text = model.get_rt_info(SPECS).astype(str)
    return record.loads(Specs, text, where=str(engine), error=SourceError)


def compile_model(model: Any, *, settings: SessionSettings, where: Path) -> Any:
    """``openvino.CompiledModel`` on the device of ``settings``.

    Raises:
        IncompatibleError: The device is not here.
        SourceError: It refuses the model, which comes from the file ``where``.
    """
    check_devices(settings)
    try:
        return core().compile_model(model, device_of(settings), device_config(settings))
    except Exception as error:  # as above
        raise SourceError(
            f"OpenVINO {version()} cannot compile {where} for"
            f" {device_of(settings)}: {first_line(error)}"
        ) from error
