"""Execution providers of ONNX Runtime: by name, where they come from, and no others.

Those of the package onnxruntime itself are named when a session is made. Those of other packages
are libraries: they are registered once in a process, offer devices, and a session gets these.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from equipoise import extras
from equipoise.errors import IncompatibleError, MissingExtraError, UsageError, unknown_name

CPU: Final = "CPUExecutionProvider"
_NO_CPU: Final = "session.disable_cpu_ep_fallback"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a provider comes from.

    Attributes:
        package: The package that brings it, as ``pip install`` takes it.
        module: Import name of that package when it is a plugin; empty where the provider is part of
            a build of onnxruntime.
    """

    package: str
    module: str = ""


ORIGINS: Final = {
    CPU: Origin(package="onnxruntime"),
    "CUDAExecutionProvider": Origin(package="onnxruntime-gpu"),
    "TensorrtExecutionProvider": Origin(package="onnxruntime-gpu"),
    "VitisAIExecutionProvider": Origin(package="AMD's build of onnxruntime"),
    "QNNExecutionProvider": Origin(package="onnxruntime-qnn", module="onnxruntime_qnn"),
    "OpenVINOExecutionProvider": Origin(
        package="onnxruntime-ep-openvino", module="onnxruntime_ep_openvino"
    ),
    "NvTensorRTRTXExecutionProvider": Origin(
        package="onnxruntime-ep-nv-tensorrt-rtx-cu13", module="onnxruntime_ep_nv_tensorrt_rtx"
    ),
}
"""Provider -> where it comes from. Those of other builds of onnxruntime are found when they are
there."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A provider that settings name.

    Attributes:
        name: Its name.
        options: What to tell it.
    """

    name: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> Origin:
        """Where it comes from."""
        return ORIGINS.get(self.name, Origin(package="another build of onnxruntime"))


def wanted_providers(texts: Sequence[str]) -> tuple[Wanted, ...]:
    """``QNNExecutionProvider:htp_arch=75,backend_type=htp`` and so on; the CPU for none.

    Raises:
        UsageError: No such provider, one is named twice, or an option is no ``name=value``.
    """
    wanted = tuple(_wanted(text) for text in texts or (CPU,))
    names = [each.name for each in wanted]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"the execution provider {name} is named twice")
    if len({bool(each.origin.module) for each in wanted if each.name != CPU}) > 1:
        raise UsageError(
            f"{' and '.join(names)} cannot share a session: some are part of onnxruntime, some are"
            " plugins, and ONNX Runtime takes the ones or the others",
            hint=f"Name providers of one kind; {CPU} goes with both.",
        )
    return wanted


def _wanted(text: str) -> Wanted:
    name, colon, tail = text.partition(":")
    known = {*ORIGINS, *extras.require("onnxruntime").get_available_providers()}
    if name not in known:
        raise unknown_name("execution provider", name, known)
    options = {}
    for part in tail.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise UsageError(
                f"{part!r} of {text!r} is no option of a provider; expected name=value",
                hint=f"Write {name}:name=value,other=value.",
            )
        options[key] = value
    return Wanted(name=name, options=options)


def place(wanted: Sequence[Wanted], *, options: Any) -> list[tuple[str, dict[str, str]]] | None:
    """Let ``wanted`` run a session, and the CPU only if it is among them.

    Args:
        wanted: Providers, in order.
        options: The ``onnxruntime.SessionOptions``; changed.

    Returns:
        What to name when the session is made; None when ``options`` say it all.

    Raises:
        MissingExtraError: A package is not installed.
        IncompatibleError: A library does not load, or finds no device.
    """
    if all(each.name != CPU for each in wanted):
        options.add_session_config_entry(_NO_CPU, "1")
    if not any(each.origin.module for each in wanted):
        for each in wanted:
            _check_built_in(each)
        return [(each.name, each.options) for each in wanted]
    for each in wanted:
        if each.name != CPU:  # it comes last by itself
            options.add_provider_for_devices(_devices(each), each.options)
    return None


def _check_built_in(wanted: Wanted) -> None:
    ort: Any = extras.require("onnxruntime")
    available = ort.get_available_providers()
    if wanted.name not in available:
        raise MissingExtraError(
            f"onnxruntime {ort.__version__} here was built without {wanted.name}; it has"
            f" {', '.join(available)}",
            hint=f"Install {wanted.origin.package} in place of onnxruntime.",
        )


def _devices(wanted: Wanted) -> list[Any]:
    """The devices that a plugin offers."""
    ort: Any = extras.require("onnxruntime")
    found = [device for device in ort.get_ep_devices() if device.ep_name == wanted.name]
    if not found:
        _register(wanted.name, wanted.origin)
        found = [device for device in ort.get_ep_devices() if device.ep_name == wanted.name]
    if not found:
        raise IncompatibleError(
            f"{wanted.name} of {wanted.origin.package} finds no device on this machine",
            hint="Its vendor's documentation lists devices and drivers.",
        )
    return found


@functools.cache
def _register(name: str, origin: Origin) -> None:
    """Load the library of a plugin. It stays loaded: sessions hold code of it."""
    if not extras.installed(origin.module):
        raise MissingExtraError(
            f"{name} needs the package {origin.package!r}, which is not installed",
            hint=f"Install it with: pip install {origin.package}",
        )
    try:
        library = importlib.import_module(origin.module).get_library_path()
        # The QNN plugin works under the provider's name alone; the others take any.
        extras.require("onnxruntime").register_execution_provider_library(name, library)
    except Exception as error:  # a package of a vendor may raise anything when it is imported
        raise IncompatibleError(
            f"{name}: the library of {origin.package} does not load: {first_line(error)}",
            hint="Install the driver or library that is named.",
        ) from error


def first_line(error: Exception) -> str:
    """The first line of what a vendor says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def check_placed(session: Any, wanted: Sequence[Wanted], *, engine: Path) -> None:
    """Raise IncompatibleError when a session left out a provider, as it does without a word."""
    present = session.get_providers()
    for each in wanted:
        if each.name not in present:
            raise IncompatibleError(
                f"{each.name} did not start for {engine}; ONNX Runtime would run it on"
                f" {', '.join(present)}",
                hint=f"{each.origin.package} needs its vendor's driver and libraries; ONNX Runtime"
                " wrote to stderr which of them is missing.",
            )


def refused(
    error: Exception, wanted: Sequence[Wanted], *, engine: Path
) -> IncompatibleError | None:
    """What ``error`` says if it is about where ``engine`` runs, and not about its file."""
    names = ", ".join(each.name for each in wanted)
    if "fallback to CPU EP has been explicitly disabled" in str(error):
        return IncompatibleError(
            f"{names} does not take every node of {engine}",
            hint=f"Name {CPU} after it to let the CPU run the rest, or give the model what the"
            " provider wants: fixed sizes, its integer types.",
        )
    of_the_file = {"InvalidProtobuf", "NoSuchFile", "InvalidGraph", "NoModel"}
    if names == CPU or type(error).__name__ in of_the_file:
        return None
    return IncompatibleError(f"{names} cannot run {engine}: {first_line(error)}")
