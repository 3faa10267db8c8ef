"""What is installed here, what is missing, and which line installs it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from typing import Final

from equipoise import extras
from equipoise.runtimes.protocol import Availability
from equipoise.runtimes.registry import BUILDERS, builder
from equipoise.targets.machine import Machine, detect_machine
from equipoise.targets.profiles import cpu_scheme


@dataclass(frozen=True, kw_only=True)
class PackageState:
    """One optional package.

    Attributes:
        module: Import name.
        extra: The extra of equipoise that installs it.
        version: Installed version; empty when missing.
        install: The line that installs it; empty when it is there.
    """

    module: str
    extra: str
    version: str
    install: str


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """What was found.

    Attributes:
        python: Version of the interpreter.
        machine: This machine.
        packages: State of every optional package.
        runtimes: Runtime -> whether it can be used here.
        problems: What is wrong, in words, with the mend.
    """

    python: str
    machine: Machine
    packages: tuple[PackageState, ...]
    runtimes: dict[str, Availability]
    problems: tuple[str, ...]


_SHARED_NAMES: Final = {"onnxruntime", "tensorrt"}
"""Import names that several distributions install over each other."""

_PLUGINS: Final = {"onnxruntime-qnn", "tensorrt-rtx"}
"""Distributions that only sound like those: they live beside them."""


def examine() -> DoctorReport:
    """Look around, without importing anything heavy."""
    machine = detect_machine()
    owners = packages_distributions()
    return DoctorReport(
        python=platform.python_version(),
        machine=machine,
        packages=tuple(_state(module, extra, owners) for module, extra in extras.EXTRA_OF.items()),
        runtimes={name: builder(name).availability() for name in BUILDERS.names()},
        problems=(*_clashes(owners), *_broken_pairs(owners), *_hardware(machine)),
    )


def _state(module: str, extra: str, owners: Mapping[str, list[str]]) -> PackageState:
    distributions = owners.get(module, [])
    return PackageState(
        module=module,
        extra=extra,
        version=version(distributions[0]) if distributions else "",
        install="" if distributions else extras.install_line(extra),
    )


def _clashes(owners: Mapping[str, list[str]]) -> list[str]:
    problems = []
    for name in sorted(_SHARED_NAMES):
        rivals = sorted({*owners.get(name, [])} - _PLUGINS)
        if len(rivals) > 1:
            names = " and ".join(rivals)
            mend = f"pip uninstall {' '.join(rivals)} and install that one again"
            problems.append(f"{names} overwrite each other's files; keep one: {mend}")
    return problems


def _broken_pairs(owners: Mapping[str, list[str]]) -> list[str]:
    """A CUDA torchvision beside a CPU torch breaks the import of transformers."""
    if "torch" not in owners or "torchvision" not in owners:
        return []
    torch, vision = version("torch"), version("torchvision")
    if torch.endswith("+cpu") and not vision.endswith("+cpu"):
        why = f"torchvision {vision} does not fit torch {torch}"
        return [f"{why}; transformers cannot be imported beside it: pip uninstall torchvision"]
    return []


def _hardware(machine: Machine) -> list[str]:
    scheme = cpu_scheme(machine)
    return [f"int8 on this CPU: {scheme.reason}"] if scheme.saturates else []
