"""Peak memory and load time of an engine in a process of its own."""

from __future__ import annotations

import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from equipoise.data.store import Rows
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What to load.

    Attributes:
        engine: Engine file.
        samples: Directory of inputs; the largest sample of the first 64 is run.
        machine: Description of the machine, so that a result is never taken for another's.
        runtime: Runtime of the engine.
        threads: Threads per operator.
    """

    engine: Path
    samples: Path
    machine: str
    runtime: str = "onnxruntime"
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class MemoryRecord:
    """What a fresh process needed.

    Attributes:
        peak_bytes: Peak resident memory of the process, interpreter and runtime included.
        before_bytes: The same before the engine was loaded.
        load_ms: Time to open the engine.
        first_run_ms: Time of the first inference.
    """

    peak_bytes: int
    before_bytes: int
    load_ms: float
    first_run_ms: float


def measure_memory(config: MemoryConfig, *, output: Path) -> MemoryRecord:  # noqa: ARG001
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
        first_run_ms=(ran - loaded) * 1000,
    )


def peak_resident_bytes() -> int:
    """Peak resident memory of this process.

    Linux: ``VmHWM``, because ``ru_maxrss`` of a child also remembers the parent it came from.
    """
    if platform.system() == "Linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
