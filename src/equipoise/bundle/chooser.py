"""Which engine of a bundle a device runs: the first in the bundle's order that fits it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from equipoise.bundle.manifest import Engine
from equipoise.errors import IncompatibleError

_FIRST_COMPATIBLE: Final = (8, 0)
"""Compute capability from which an engine for later GPUs holds; NVIDIA's Ampere."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device is, asked only as far as an engine needs it.

    Attributes:
        platform: System and architecture: ``linux-x86_64``.
        cpu_flags: Gives the features of its CPU.
        check_runtime: Raises IncompatibleError where a runtime is not installed or not known.
        runtime_version: Gives the version of an installed runtime.
        compute_capability: Gives that of its NVIDIA GPU; empty where no driver shows one.
    """

    platform: str
    cpu_flags: Callable[[], frozenset[str]]
    check_runtime: Callable[[str], None]
    runtime_version: Callable[[str], str]
    compute_capability: Callable[[], str]


def check_fits(engine: Engine, device: Device) -> None:
    """Check what can be checked before an engine is opened.

    Raises:
        IncompatibleError: The engine needs what the device has not; says what, and what there is.
    """
    needs = engine.needs
    if needs.platform and needs.platform != device.platform:
        raise _unfit(f"it is for {needs.platform}; this device is {device.platform}")
    if needs.any_cpu_flag and not device.cpu_flags() & set(needs.any_cpu_flag):
        flags = " or ".join(needs.any_cpu_flag)
        raise _unfit(f"it needs a CPU with {flags}; this one has not")
    if needs.compute_capabilities:
        _check_gpu(engine, device.compute_capability())
    device.check_runtime(engine.runtime)
    if needs.runtime_version:
        _check_version(engine, device.runtime_version(engine.runtime))


def _check_gpu(engine: Engine, capability: str) -> None:
    wanted = ", ".join(engine.needs.compute_capabilities)
    if not capability:
        raise _unfit(f"it needs an NVIDIA GPU of compute capability {wanted}; there is none")
    later = engine.needs.later_gpus and numbers(capability) >= _FIRST_COMPATIBLE
    if capability not in engine.needs.compute_capabilities and not later:
        raise _unfit(f"it is for compute capability {wanted}; this GPU has {capability}")


def _check_version(engine: Engine, version: str) -> None:
    wanted, later = engine.needs.runtime_version, engine.needs.later_versions
    if version != wanted and not (later and numbers(version) >= numbers(wanted)):
        or_later = " or later" if later else ""
        raise _unfit(f"it is for {engine.runtime} {wanted}{or_later}; {version} is installed here")


def _unfit(why: str) -> IncompatibleError:
    return IncompatibleError(why, hint="Pack an engine for this device too.")


def numbers(version: str) -> tuple[int, ...]:
    """``10.13.2`` as (10, 13, 2); what is no number ends it."""
    found: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def none_fits(where: str, refused: Mapping[str, IncompatibleError]) -> IncompatibleError:
    """The error for a bundle of which no engine can be opened here.

    Args:
        where: The bundle.
        refused: Engine -> why not; the class of the only one is kept.
    """
    if len(refused) == 1:
        ((name, only),) = refused.items()
        return type(only)(f"{where}: the engine {name!r}: {only.message}", hint=only.hint)
    reasons = "".join(f"\n  {name}: {error.message}" for name, error in refused.items())
    hints = dict.fromkeys(error.hint for error in refused.values() if error.hint)
    return IncompatibleError(
        f"{where}: none of its {len(refused)} engines runs on this device:{reasons}",
        hint=" ".join(hints),
    )
