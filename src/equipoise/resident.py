"""Resident memory of a process and of everything that it started."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from equipoise import extras

_PROC: Final = Path("/proc")
_VMSTAT: Final = Path("/proc/vmstat")


def family(pid: int) -> list[int]:
    """``pid`` and all its descendants, parents first; empty when it is gone."""
    if not (_PROC / "self" / "stat").exists():
        return [pid, *_told_by_psutil(pid)]
    if not (_PROC / str(pid)).exists():
        return []
    found = [pid]
    for known in found:  # grows while it is walked
        found.extend(_children(known))
    return found


def resident_bytes(pids: list[int]) -> int:
    """Resident memory of processes, what they share counted once as far as the system says.

    The sum of their resident sets is at least that, and cheap; the proportional sets (``Pss`` of
    Linux's ``smaps_rollup``) are not cheap, so `exceeds` looks at them only when it matters.
    """
    return sum(_proportional_bytes(pid) for pid in pids)


def exceeds(pid: int, limit_bytes: int) -> int:
    """Bytes that the family of ``pid`` has when they are above the limit, else 0."""
    pids = family(pid)
    if sum(_resident_bytes(one) for one in pids) <= limit_bytes:
        return 0
    found = resident_bytes(pids)
    return found if found > limit_bytes else 0


def can_be_watched() -> bool:
    """Whether memory can be seen here; says so, once per process, where it cannot."""
    if (_PROC / "self" / "statm").exists() or extras.installed("psutil"):
        return True
    warnings.warn(
        "the memory limit of stages is not enforced: this system has no /proc, and the package"
        " psutil is not installed",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory; 0 where it does not say."""
    try:
        lines = _VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _children(pid: int) -> Iterator[int]:
    if not _has_children_file():
        yield from _children_by_search(pid)
        return
    with contextlib.suppress(OSError):  # the process is gone
        for thread in (_PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):  # the thread is
                yield from map(int, (thread / "children").read_text(encoding="ascii").split())


def _has_children_file() -> bool:
    """Kernels without CONFIG_PROC_CHILDREN have none."""
    return (_PROC / "self" / "task" / str(os.getpid()) / "children").exists()


def _children_by_search(pid: int) -> Iterator[int]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and _parent(int(entry.name)) == pid:
            yield int(entry.name)


def _parent(pid: int) -> int:
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])


def _resident_bytes(pid: int) -> int:
    try:
        text = (_PROC / str(pid) / "statm").read_text(encoding="ascii")
    except OSError:
        return _bytes_by_psutil(pid)
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _proportional_bytes(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return _resident_bytes(pid)
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")]
    return sizes[0] if sizes else _resident_bytes(pid)


def _told_by_psutil(pid: int) -> list[int]:
    if not extras.installed("psutil"):
        return []
    psutil: Any = extras.require("psutil")
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _bytes_by_psutil(pid: int) -> int:
    if not extras.installed("psutil"):
        return 0
    psutil: Any = extras.require("psutil")
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
