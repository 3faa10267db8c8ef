"""Run a stage in a child process, so that a crash, a hang or a leak of a backend stays there.

``python -m equipoise.isolation REQUEST`` is the child. It reads ``request.json``, calls the
function, and leaves ``result.json`` or ``error.json`` beside it. Progress comes back over a pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from equipoise import fs, progress, record, resident
from equipoise.errors import BackendError, EquipoiseError, ResourceError, error_class

_LOG_TAIL_CHARACTERS: Final = 2000
_LOOK_S: Final = 0.1
"""How often the memory of a child is looked at."""
_LINUX_PARENT_DEATH_SIGNAL: Final = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the child is to do.

    Attributes:
        function: ``module:function`` with the signature ``(config, *, output) -> record``.
        config: The config as JSON text.
        output: Directory for the stage's files.
        search_path: Entries for the front of ``sys.path``.
    """

    function: str
    config: str
    output: Path
    search_path: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a child may take.

    Attributes:
        time_s: It is killed after so many seconds.
        memory_bytes: It is killed when it and its own children have more resident memory than
            that; None for no limit.
    """

    time_s: float
    memory_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """An error of the tree, as it crosses the process boundary."""

    error: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: EquipoiseError) -> Failure:
        """``error``, to be sent."""
        return cls(error=type(error).__name__, message=error.message, hint=error.hint)

    def raised(self) -> EquipoiseError:
        """The error that was sent."""
        return error_class(self.error)(self.message, hint=self.hint)


def run_isolated(  # noqa: PLR0913  what is called, and its limits
    function: str,
    config: object,
    *,
    output: Path,
    on_progress: Callable[[int, int], None],
    time_limit_s: float,
    memory_limit_bytes: int | None = None,
) -> str:
    """Call ``function`` in a child process; return its record as JSON text.

    Args:
        function: ``module:function``.
        config: Frozen dataclass that the function's first parameter is annotated with.
        output: Existing directory for the stage's files.
        on_progress: Called with steps done and steps in all.
        time_limit_s: The child is killed after so many seconds.
        memory_limit_bytes: The child is killed when it and its own children have more resident
            memory than that.

    Raises:
        EquipoiseError: Whatever the function raised.
        BackendError: The child died; the message has the signal and the end of its log.
        ResourceError: The time limit passed, or the memory limit, or the kernel killed the child
            for want of memory.
    """
    text = record.dumps(config)
    request = Request(
        function=function, config=text, output=output.resolve(), search_path=(str(Path.cwd()),)
    )
    limits = Limits(time_s=time_limit_s, memory_bytes=memory_limit_bytes)
    return run_request(request, limits=limits, on_progress=on_progress)


def run_request(
    request: Request, *, limits: Limits, on_progress: Callable[[int, int], None]
) -> str:
    """Do in a child process what ``request`` says; returns and raises as `run_isolated`."""
    with fs.scratch_directory() as folder:
        fs.write_json(folder / "request.json", request)
        kills = resident.kernel_kills()
        code = _run_child(folder, on_progress=on_progress, limits=limits)
        if code == -signal.SIGKILL and resident.kernel_kills() > kills:
            raise _killed_by_kernel(request.function, folder)
        return _read_result(folder, function=request.function, code=code)


def _killed_by_kernel(function: str, folder: Path) -> ResourceError:
    return ResourceError(
        f"{function} was killed by SIGKILL while the kernel was out of memory; its last words:\n"
        f"{last_words(folder)}",
        hint="Use less data or a smaller model, run less at once, or set a memory limit.",
    )


def _run_child(folder: Path, *, on_progress: Callable[[int, int], None], limits: Limits) -> int:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "equipoise.isolation", str(folder), str(writer)]
    with fs.appending(folder / "log.txt") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[writer])
    os.close(writer)
    listener = threading.Thread(target=forward, args=(reader, on_progress), daemon=True)
    listener.start()
    try:
        return _wait(child, limits=limits)
    finally:
        _end(child)
        listener.join(timeout=5)


def _wait(child: subprocess.Popen[bytes], *, limits: Limits) -> int:
    """The exit code of ``child``. Raises ResourceError as soon as it passes a limit."""
    end = time.monotonic() + limits.time_s
    watched = limits.memory_bytes if limits.memory_bytes and resident.can_be_watched() else None
    while True:
        left = max(0.0, end - time.monotonic())
        try:
            return child.wait(timeout=left if watched is None else min(left, _LOOK_S))
        except subprocess.TimeoutExpired as error:
            if time.monotonic() >= end:
                raise ResourceError(
                    f"a stage did not finish within {limits.time_s:.0f} s",
                    hint="Use less data, a smaller model, or a larger --time-limit.",
                ) from error
        if watched is not None:
            _check_memory(child.pid, limit_bytes=watched)


def _check_memory(pid: int, *, limit_bytes: int) -> None:
    found = resident.exceeds(pid, limit_bytes)
    if found:
        raise ResourceError(
            f"a stage had {found:,} bytes of resident memory, with its children; its limit is"
            f" {limit_bytes:,}",
            hint="Use less data, a smaller model, or a larger memory limit.",
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that still runs, and all that it started."""
    if child.poll() is not None:
        return
    started = resident.family(child.pid)[1:]
    child.kill()
    for pid in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def forward(reader: int, on_progress: Callable[[int, int], None]) -> None:
    """Pass on the progress that a child writes to a pipe, until it closes it."""
    with os.fdopen(reader, "r", encoding="ascii") as lines:
        for line in lines:
            done, total = map(int, line.split())
            on_progress(done, total)


def _read_result(folder: Path, *, function: str, code: int) -> str:
    if code == 0 and (folder / "result.json").exists():
        return (folder / "result.json").read_text(encoding="utf-8")
    told = told_error(folder)
    if told is not None:
        raise told
    raise BackendError(f"{function} {death_of(code)}; its last words:\n{last_words(folder)}")


def told_error(folder: Path) -> EquipoiseError | None:
    """The error of the tree that a child left in ``folder``, if it left one."""
    if not (folder / "error.json").exists():
        return None
    text = (folder / "error.json").read_text(encoding="utf-8")
    failure = record.loads(Failure, text, where="error.json", error=BackendError)
    return failure.raised()


def death_of(code: int) -> str:
    """How a child ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def last_words(folder: Path) -> str:
    """The end of what a child printed into ``log.txt``."""
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    return text[-_LOG_TAIL_CHARACTERS:].strip()


def _die_with_parent() -> None:
    """A killed parent must not leave a child that trains or measures for nobody."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_LINUX_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _call(request: Request) -> object:
    sys.path[:0] = request.search_path
    module, _, name = request.function.partition(":")
    function: Any = getattr(importlib.import_module(module), name)
    config_type: Any = typing.get_type_hints(function)["config"]
    config: Any = record.loads(config_type, request.config, where="request.json")
    return function(config, output=request.output)


@contextlib.contextmanager
def _failures_to(folder: Path) -> Iterator[None]:
    """Leave ``error.json`` for an error of ours; let everything else end in the log."""
    try:
        yield
    except EquipoiseError as error:
        fs.write_json(folder / "error.json", Failure.of(error))
        raise
    except MemoryError:
        failure = Failure(
            error="ResourceError",
            message="a stage ran out of memory",
            hint="Use fewer or smaller samples.",
        )
        fs.write_json(folder / "error.json", failure)
        raise


def main(folder: Path, writer: int) -> None:
    """The child process."""
    _die_with_parent()
    text = fs.read_text(folder / "request.json", error=BackendError)
    request = record.loads(Request, text, where="request.json")
    with os.fdopen(writer, "w", encoding="ascii", buffering=1) as pipe, _failures_to(folder):
        progress.listen(lambda done, total: print(done, total, file=pipe, flush=True))
        fs.write_text(folder / "result.json", json.dumps(record.to_json(_call(request))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
