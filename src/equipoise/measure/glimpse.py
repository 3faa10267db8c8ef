"""The machine at one moment: clock, heat, load, as the kernel tells them.

What is not there is None: other systems have no ``/proc``, and virtual machines no clock that can
be read.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CPU_FOLDER: Final = re.compile(r"cpu\d+")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the kernel says how the machine is.

    Attributes:
        proc: ``/proc``.
        sys: ``/sys``.
    """

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


@dataclass(frozen=True, kw_only=True)
class Glimpse:
    """The machine at one moment; None for what cannot be read.

    Attributes:
        wall_s: Of a monotonic clock.
        own_s: CPU time of this process.
        clock_mhz: Of the fastest core.
        throttled: How often cores and packages have throttled themselves since the machine
            started; cores of one package count the same event.
        waited_s: How long the first thread of this process, which measures, was ready to run
            while others had its core.
        quota_s: How long the control group of this process was kept from running.
        hottest_c: The hottest thermal zone, degrees Celsius.
        load: Processes that run or want to, mean of a minute.
        cores: Of the machine.
        busy_s: CPU time of all processes, over all cores.
        stolen_s: CPU time that the hypervisor gave to others.
    """

    wall_s: float
    own_s: float
    clock_mhz: float | None = None
    throttled: int | None = None
    waited_s: float | None = None
    quota_s: float | None = None
    hottest_c: float | None = None
    load: float | None = None
    cores: int | None = None
    busy_s: float | None = None
    stolen_s: float | None = None


def look(places: Places | None = None) -> Glimpse:
    """The machine now. Never fails: what is not there is None."""
    places = places or Places()
    ticks = _ticks_s(places.proc)
    return Glimpse(
        wall_s=time.monotonic(),
        own_s=time.process_time(),
        clock_mhz=_clock_mhz(places),
        throttled=_throttled(places.sys),
        waited_s=_waited_s(places.proc),
        quota_s=_quota_s(places.sys),
        hottest_c=_hottest_c(places.sys),
        load=_load(places.proc),
        cores=_cores(places.proc),
        busy_s=None if ticks is None else ticks[0],
        stolen_s=None if ticks is None else ticks[1],
    )


def _read(path: Path) -> str:
    """The text of a file of the kernel; empty where there is none, or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(paths: Iterable[Path]) -> list[int]:
    texts = (_read(path).strip() for path in paths)
    return [int(text) for text in texts if re.fullmatch(r"-?\d+", text)]


def _listed(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:  # a folder that may not be looked into
        return []


def _cpus(sys: Path) -> list[Path]:
    found = _listed(sys / "devices/system/cpu", "cpu*")
    return [path for path in found if _CPU_FOLDER.fullmatch(path.name)]


def _clock_mhz(places: Places) -> float | None:
    """Of the fastest core: the one that measures, since others may sleep.

    The number that /proc/cpuinfo has in a virtual machine never changes, whatever the clock does.
    """
    khz = _numbers(cpu / "cpufreq/scaling_cur_freq" for cpu in _cpus(places.sys))
    if khz:
        return max(khz) / 1000
    cpuinfo = _read(places.proc / "cpuinfo")
    if re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE):
        return None
    mhz = re.findall(r"^cpu MHz\s*:\s*(\d+(?:\.\d+)?)\s*$", cpuinfo, re.MULTILINE)
    return max(map(float, mhz), default=None)


def _throttled(sys: Path) -> int | None:
    """All counts together, so that a rise of any shows."""
    folders = (cpu / "thermal_throttle" for cpu in _cpus(sys))
    counts = _numbers(path for folder in folders for path in _listed(folder, "*_count"))
    return sum(counts) if counts else None


def _waited_s(proc: Path) -> float | None:
    """Nanoseconds that ran, that waited, and time slices (the kernel's sched-stats.rst)."""
    found = re.fullmatch(r"\d+ (\d+) \d+", _read(proc / "self/schedstat").strip())
    return int(found.group(1)) * 1e-9 if found else None


def _quota_s(sys: Path) -> float | None:
    """Control groups of version 2 count microseconds, those of version 1 nanoseconds."""
    group = sys / "fs/cgroup"
    for file, key, unit in (
        ("cpu.stat", "throttled_usec", 1e-6),
        ("cpu/cpu.stat", "throttled_time", 1e-9),
    ):
        found = re.search(rf"^{key} (\d+)$", _read(group / file), re.MULTILINE)
        if found:
            return int(found.group(1)) * unit
    return None


def _hottest_c(sys: Path) -> float | None:
    zones = _numbers(_listed(sys / "class/thermal", "thermal_zone*/temp"))
    return max(zones) / 1000 if zones else None


def _load(proc: Path) -> float | None:
    first = _read(proc / "loadavg").split(" ")[0]
    return float(first) if re.fullmatch(r"\d+\.\d+", first) else None


def _cores(proc: Path) -> int | None:
    return len(re.findall(r"^cpu\d+ ", _read(proc / "stat"), re.MULTILINE)) or None


def _ticks_s(proc: Path) -> tuple[float, float] | None:
    """Seconds that all cores were busy, and that were stolen from them, since the machine started.

    Columns of ``/proc/stat``: user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
    """
    found = re.search(r"^cpu +([\d ]+)$", _read(proc / "stat"), re.MULTILINE)
    columns = [int(text) for text in found.group(1).split()] if found else []
    if len(columns) < 8:
        return None
    per_second = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, soft, stolen = columns[:8]
    return (user + nice + system + irq + soft) / per_second, stolen / per_second
