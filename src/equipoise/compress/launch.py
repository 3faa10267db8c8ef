"""Several processes on this machine, each a child that runs the same function of a stage.

Each is a child as ``isolation.py`` has them: it dies with its parent, leaves its error as a file,
and tells its progress. They find each other through a file, so no port has to be free and no name
to resolve. When one dies, the others are killed at once, and the error says which was the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from equipoise import fs, progress, record
from equipoise.compress.distributed import check_devices
from equipoise.errors import BackendError, EquipoiseError
from equipoise.isolation import Request, death_of, forward, last_words, told_error

_INTERVAL_S: Final = 0.05
_LOST: Final = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_GRACE_S: Final = 0.5
"""So long, the one that died first may be known later than those that it took along."""


def launch(function: str, config: object, *, processes: int, threads: int, output: Path) -> str:
    """Run ``function`` in so many processes; return the record of the first as JSON text.

    Args:
        function: ``module:function`` with the signature ``(config, *, output) -> record``.
        config: Frozen dataclass with a field ``rendezvous``, a file that does not exist, in a
            directory that all processes see.
        processes: How many.
        threads: Threads of each.
        output: Directory for the files.

    Raises:
        EquipoiseError: What the process that failed first has raised.
        BackendError: One was killed or died; says which and how.
        UsageError: There are not as many GPUs as processes.
    """
    check_devices(processes)
    with fs.scratch_directory() as folder:
        ranks = [fs.make_directory(folder / f"rank-{rank}") for rank in range(processes)]
        request = Request(
            function=function,
            config=record.dumps(config),
            output=output.resolve(),
            search_path=(str(Path.cwd()),),
        )
        for place in ranks:
            fs.write_json(place / "request.json", request)
        _run(ranks, threads=threads)
        return fs.read_text(ranks[0] / "result.json", error=BackendError)


def _run(ranks: Sequence[Path], *, threads: int) -> None:
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank, place in enumerate(ranks):
            environment = _environment(rank, world=len(ranks), threads=threads)
            children.append(_start(place, environment, first=rank == 0))
        while None in (codes := [child.poll() for child in children]) and not any(codes):
            time.sleep(_INTERVAL_S)
        if any(codes):
            raise _failure(ranks, children)
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def _environment(rank: int, *, world: int, threads: int) -> dict[str, str]:
    """What torchrun would set, and Gloo on the loopback device: a host may not know its name."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return loopback | dict(os.environ) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip


def _start(place: Path, environment: dict[str, str], *, first: bool) -> subprocess.Popen[bytes]:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "equipoise.isolation", str(place), str(writer)]
    with fs.appending(place / "log.txt") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=log, pass_fds=[writer], env=environment
        )
    os.close(writer)
    listener = progress.report if first else _ignore
    threading.Thread(target=forward, args=(reader, listener), daemon=True).start()
    return child


def _ignore(_done: int, _total: int) -> None:
    """All processes are equally far."""


def _failure(ranks: Sequence[Path], children: Sequence[Any]) -> EquipoiseError:
    """What went wrong first: an error that was told, else a death, else an exit.

    The others fail too, when the connection to it breaks, and may be known before it is.
    """
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and not any(map(_is_cause, ranks, children)):
        time.sleep(_INTERVAL_S)
    told = [error for error in map(told_error, ranks) if error is not None]
    if told:
        return told[0]
    codes = {rank: child.poll() for rank, child in enumerate(children)}
    dead = {rank: code for rank, code in codes.items() if code}
    rank = min(dead, key=lambda r: (dead[r] >= 0, _lost_another(ranks[r]), r))
    words = last_words(ranks[rank])
    return BackendError(
        f"process {rank} of {len(ranks)} {death_of(dead[rank])}"
        + (f"; its last words:\n{words}" if words else ""),
    )


def _lost_another(place: Path) -> bool:
    """Whether a process ended because another one had, by Gloo's words for it."""
    words = last_words(place)
    return any(said in words for said in _LOST)


def _is_cause(place: Path, child: Any) -> bool:
    return (child.poll() or 0) < 0 or (place / "error.json").exists()


def threads_each(threads: int | None, *, processes: int) -> int:
    """Threads of one process: what was asked for, or the usable cores divided between them."""
    if threads is not None:
        return threads
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable is not None else os.cpu_count() or 1
    return max(cores // processes, 1)
