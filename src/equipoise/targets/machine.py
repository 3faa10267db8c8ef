"""The machine that this process runs on."""

from __future__ import annotations

import functools
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_FLAGS_THAT_MATTER: Final = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve2",
)  # fmt: skip

_ARM_PARTS: Final = {
    "0xd03": "Cortex-A53", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76", "0xd0c": "Neoverse N1", "0xd40": "Neoverse V1", "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse N2", "0xd4f": "Neoverse V2",
}  # fmt: skip
"""CPU part of /proc/cpuinfo, implementer 0x41 (Arm), from the Linux kernel's cputype.h."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that measured.

    Attributes:
        cpu: Model name of the processor.
        architecture: ``x86_64`` or ``aarch64``.
        cores: Cores that this process may use.
        flags: CPU features that decide the scheme: ``avx2``, ``avx512_vnni``, ``asimddp``.
        memory_bytes: Memory that this process may use.
        system: Operating system and release.
    """

    cpu: str
    architecture: str
    cores: int
    flags: tuple[str, ...]
    memory_bytes: int
    system: str


@functools.cache
def detect_machine() -> Machine:
    """What this machine is and what of it this process may use."""
    cpuinfo = _read(Path("/proc/cpuinfo"))
    return Machine(
        cpu=parse_cpu_name(cpuinfo) or platform.processor() or "unknown",
        architecture=platform.machine(),
        cores=_usable_cores(),
        flags=parse_flags(cpuinfo),
        memory_bytes=_usable_memory_bytes(),
        system=f"{platform.system()} {platform.release()}",
    )


def _read(path: Path) -> str:
    """The text of a file of the kernel; empty where the system has none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _fields(cpuinfo: str) -> dict[str, str]:
    """Key -> first value in the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def parse_cpu_name(cpuinfo: str) -> str:
    """The processor's name in the text of /proc/cpuinfo; by its part number on Arm."""
    fields = _fields(cpuinfo)
    part = fields.get("CPU part", "")
    arm = f"Arm {_ARM_PARTS.get(part, f'part {part}')}" if part else ""
    return fields.get("model name") or arm


def parse_flags(cpuinfo: str) -> tuple[str, ...]:
    """The features that matter, in the text of /proc/cpuinfo."""
    fields = _fields(cpuinfo)
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return tuple(flag for flag in _FLAGS_THAT_MATTER if flag in present)


def parse_quota(version_2: str, quota_v1: str, period_v1: str) -> int | None:
    """Whole cores that a control group grants; None without a limit.

    Args:
        version_2: Text of ``cpu.max``: ``"max 100000"`` or ``"150000 100000"``.
        quota_v1: Text of ``cpu.cfs_quota_us``; ``-1`` is no limit.
        period_v1: Text of ``cpu.cfs_period_us``.
    """
    quota, period = (version_2.split() or [quota_v1.strip(), period_v1.strip()])[:2]
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return max(1, math.ceil(int(quota) / int(period)))


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    group = Path("/sys/fs/cgroup")
    quota = parse_quota(
        _read(group / "cpu.max"),
        _read(group / "cpu/cpu.cfs_quota_us"),
        _read(group / "cpu/cpu.cfs_period_us"),
    )
    return min(cores or 1, quota or cores or 1)


def physical_memory_bytes() -> int:
    """Memory of the whole machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _usable_memory_bytes() -> int:
    physical = physical_memory_bytes()
    group = Path("/sys/fs/cgroup")
    limits = (
        _read(group / name).strip() for name in ("memory.max", "memory/memory.limit_in_bytes")
    )
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])
