"""What this machine is, and which targets it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from equipoise import extras
from equipoise.targets.gpus import Gpu, detect_gpus
from equipoise.targets.machine import Machine, detect_machine, physical_memory_bytes
from equipoise.targets.profile import Target
from equipoise.targets.profiles import get_target, is_here, target_names


@dataclass(frozen=True, kw_only=True)
class Detected:
    """What was found.

    Attributes:
        machine: The CPU and what of it may be used.
        cores_present: Cores that the machine has.
        memory_present_bytes: Memory that it has.
        gpus: NVIDIA GPUs.
        no_gpu: Why there are none, in words.
        targets: Names of the targets that this machine is.
    """

    machine: Machine
    cores_present: int
    memory_present_bytes: int
    gpus: tuple[Gpu, ...]
    no_gpu: str
    targets: tuple[str, ...]


def detect_all() -> Detected:
    """What this machine is."""
    machine, gpus = detect_machine(), detect_gpus()
    targets = [get_target(name, machine=machine) for name in target_names()]
    return Detected(
        machine=machine,
        cores_present=os.cpu_count() or 1,
        memory_present_bytes=physical_memory_bytes(),
        gpus=gpus,
        no_gpu="" if gpus else _no_gpu(),
        targets=tuple(t.name for t in targets if is_here(t, machine) or _has_gpu(t, gpus)),
    )


def _no_gpu() -> str:
    if extras.installed("pynvml"):
        return "none: no NVIDIA driver answers"
    return f"not looked for: {extras.install_line('nvidia')}"


def _has_gpu(target: Target, gpus: tuple[Gpu, ...]) -> bool:
    wanted = target.hardware.compute_capability
    return bool(wanted) and any(gpu.compute_capability == wanted for gpu in gpus)
