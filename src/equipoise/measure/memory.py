"""Peak memory and start of an engine, each time in a new process."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final, Literal

from equipoise import fs, progress, record
from equipoise.data.store import Rows
from equipoise.errors import BackendError, IncompatibleError, UsageError
from equipoise.isolation import run_isolated
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener

_TIME_LIMIT_S: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What to load.

    Attributes:
        engine: Engine file.
        samples: Directory of inputs; the largest sample of the first 64 is run.
        machine: Description of the machine, so that a result is never taken for another's.
        runtime: Runtime of the engine.
        threads: Threads per operator.
        processes: How many processes open it, one after the other.
        take: Which of several measurements of the same; it tells their kept results apart.
    """

    engine: Path
    samples: Path
    machine: str
    runtime: str = "onnxruntime"
    threads: int = 1
    processes: int = 3
    take: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryRecord:
    """What a fresh process needed: of each figure the median over processes.

    The engine's files were read a moment before, so they come from the page cache. After a restart
    of the machine the disk adds to ``load_ms``; only root can empty the cache to measure that.

    Attributes:
        peak_bytes: Peak resident memory of the process, interpreter and runtime included.
        before_bytes: The same before the engine was loaded.
        load_ms: Time to open the engine, the import of its runtime included.
        first_ms: Time of the first inference after that.
        processes: How many were measured.
        page_cache: That the files were in it.
    """

    peak_bytes: int
    before_bytes: int
    load_ms: float
    first_ms: float
    processes: int = 1
    page_cache: Literal["warm"] = "warm"


def measure_memory(config: MemoryConfig, *, output: Path) -> MemoryRecord:  # noqa: ARG001
    """Load and run ``config.engine`` in new processes, one after the other.

    Raises:
        InputError: The samples do not fit the engine.
        IncompatibleError: This system does not tell peak memory.
        UsageError: There is no process to measure.
    """
    if config.processes < 1:
        raise UsageError(f"{config.processes} processes to measure memory; at least 1 is needed")
    found = [
        _in_child(config) for _ in progress.track(range(config.processes), total=config.processes)
    ]
    return _middle(found)


def _in_child(config: MemoryConfig) -> MemoryRecord:
    with fs.scratch_directory() as folder:
        text = run_isolated(
            f"{__name__}:measure_here",
            config,
            output=folder,
            on_progress=lambda _done, _total: None,
            time_limit_s=_TIME_LIMIT_S,
        )
    return record.loads(MemoryRecord, text, where="memory", error=BackendError)


def _middle(found: Sequence[MemoryRecord]) -> MemoryRecord:
    return MemoryRecord(
        peak_bytes=int(median(one.peak_bytes for one in found)),
        before_bytes=int(median(one.before_bytes for one in found)),
        load_ms=median(one.load_ms for one in found),
        first_ms=median(one.first_ms for one in found),
        processes=len(found),
    )


def measure_here(config: MemoryConfig, *, output: Path) -> MemoryRecord:  # noqa: ARG001
    """Load ``config.engine`` here, run it, and read the peak resident memory of this process.

    Must be called in a fresh process: the peak never falls.
    """
    rows = Rows(config.samples)
    samples = [rows[i] for i in range(min(len(rows), 64))]
    feeds = max(samples, key=lambda row: sum(array.nbytes for array in row.values()))
    open_session = session_opener(config.runtime)
    before = peak_resident_bytes()
    begin = time.perf_counter()
    with open_session(config.engine, settings=SessionSettings(threads=config.threads)) as session:
        loaded = time.perf_counter()
        session.run(feeds)
        ran = time.perf_counter()
        session.run(feeds)
    return MemoryRecord(
        peak_bytes=peak_resident_bytes(),
        before_bytes=before,
        load_ms=(loaded - begin) * 1000,
        first_ms=(ran - loaded) * 1000,
    )


def peak_resident_bytes() -> int:
    """Peak resident memory of this process.

    Linux: ``VmHWM``, because ``ru_maxrss`` of a child also remembers the parent it came from.

    Raises:
        IncompatibleError: The system tells neither.
    """
    if platform.system() == "Linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError as error:  # Windows
        raise IncompatibleError(
            f"{platform.system()} does not tell a process its peak memory as Linux and macOS do",
            hint="Measure on the target itself, or on Linux or macOS.",
        ) from error
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
