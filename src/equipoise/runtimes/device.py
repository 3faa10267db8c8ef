"""What this device is, for the choice among the engines of a bundle."""

from __future__ import annotations

from equipoise import extras
from equipoise.bundle.chooser import Device
from equipoise.errors import IncompatibleError, MissingExtraError
from equipoise.runtimes.engine import this_platform
from equipoise.runtimes.registry import PACKAGES, SESSIONS, is_known
from equipoise.runtimes.tensorrt.cuda import find_gpu
from equipoise.runtimes.tensorrt.flavor import TENSORRT
from equipoise.targets.machine import detect_machine


def this_device() -> Device:
    """This device; nothing is looked up before it is asked for."""
    return Device(
        platform=this_platform(),
        cpu_flags=lambda: frozenset(detect_machine().flags),
        check_runtime=check_runtime,
        runtime_version=_version,
        compute_capability=_compute_capability,
    )


def check_runtime(name: str) -> None:
    """Check that a runtime is known and its package installed; nothing is imported.

    Raises:
        IncompatibleError: It is not known here.
        MissingExtraError: It is not installed; the message has the line that installs it.
    """
    if not is_known(name):
        raise IncompatibleError(
            f"unknown runtime {name!r}; this equipoise knows {', '.join(SESSIONS.names())}",
            hint="Update equipoise on this device, or install the package that adds the runtime.",
        )
    package = PACKAGES.get(name)
    if package is not None and not extras.installed(package):
        extra = extras.install_line(extras.EXTRA_OF.get(package, "all"))
        line = TENSORRT.install if name == TENSORRT.name else extra
        raise MissingExtraError(
            f"the runtime {name!r} needs the package {package!r}, which is not installed",
            hint=f"Install it with: {line}",
        )


def _version(name: str) -> str:
    package = PACKAGES.get(name)
    return str(extras.require(package).__version__) if package else ""


def _compute_capability() -> str:
    gpu = find_gpu()
    return gpu.compute_capability if gpu else ""
