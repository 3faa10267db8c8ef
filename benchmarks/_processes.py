"""Time and memory of a tree of processes. Linux only: memory is read from ``/proc``."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a tree of processes took.

    Attributes:
        wall_s: From the start of the first process to the exit of the last.
        largest_bytes: Peak resident memory of the largest single process of the tree, as the
            kernel keeps it (``VmHWM``), looked at every 50 ms. Not ``ru_maxrss``, which starts at
            what the benchmark itself had resident.
        sum_bytes: Largest sum over the tree of what its processes had resident at one time, looked
            at every 50 ms. What processes share is counted for each of them: an upper bound, and
            one that does not depend on what else runs on the machine.
        code: Exit code of the first process.
        timed_out: Whether it was stopped for its time.
        log: End of what it wrote.
    """

    wall_s: float
    largest_bytes: int
    sum_bytes: int
    code: int
    timed_out: bool
    log: str

    @property
    def failure(self) -> str:
        """Why there is no result, in one line; empty where it ended well."""
        if self.timed_out:
            return f"not finished after {self.wall_s:.0f} s"
        if not self.code:
            return ""
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        lines = [line for line in self.log.splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith("error: ")]  # a hint follows it
        return [f"exit code {self.code}", *lines, *ours][-1][:300]


def run(
    command: Sequence[str],
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    limit_s: float = 3600.0,
) -> Cost:
    """Run a command in ``folder``, to its end or to the limit."""
    environment = os.environ | (environment or {})
    with (folder / "log").open("wb") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
        try:
            largest, most, timed_out = _watch(process, until=begin + limit_s)
        finally:
            _stop(process)
        wall = time.perf_counter() - begin
    text = (folder / "log").read_text(encoding="utf-8", errors="replace")
    return Cost(
        wall_s=wall,
        largest_bytes=largest,
        sum_bytes=most,
        code=process.returncode,
        timed_out=timed_out,
        log=text[-4000:],
    )


def _watch(process: subprocess.Popen[bytes], *, until: float) -> tuple[int, int, bool]:
    """Largest single process, largest sum of memory seen, and whether it was stopped."""
    largest = most = 0
    timed_out = False
    while process.poll() is None:
        seen = [_memory_bytes(pid) for pid in _tree(process.pid)]
        largest = max(largest, *(peak for peak, _ in seen))
        most = max(most, sum(resident for _, resident in seen))
        if time.perf_counter() > until:
            timed_out = True
            _stop(process)
        time.sleep(LOOK_EVERY_S)
    return largest, most, timed_out


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and all of its session: nothing may outlive a benchmark."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tree(root: int) -> Iterator[int]:
    """The process and all below it."""
    yield root
    try:
        text = Path(f"/proc/{root}/task/{root}/children").read_text(encoding="ascii")
    except OSError:  # it has ended since
        return
    for child in text.split():
        yield from _tree(int(child))


def _memory_bytes(pid: int) -> tuple[int, int]:
    """What a process had resident at most, and has now; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0, 0
    lines = (line.split() for line in text.splitlines() if line.startswith(("VmHWM:", "VmRSS:")))
    found = {words[0]: int(words[1]) * 1024 for words in lines}
    return found.get("VmHWM:", 0), found.get("VmRSS:", 0)
