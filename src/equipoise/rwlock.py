"""A fair readers-writer lock among the threads of a process and among processes of one machine.

Readers share it, a writer has it alone, and whoever came first goes first: a writer that waits
keeps later readers out, so that it is not starved. Among threads a queue says who is first. Among
processes the classic turnstile does: everyone passes through one exclusive lock, and a writer
stays in it until the last reader has left.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from equipoise import fs

_POLL_S: Final = 0.02
_NO_LOCKS: Final = frozenset({errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS})
"""What a file system says that cannot lock a directory: NFS, some FUSE ones."""


class ReadersWriterLock:
    """See the module.

    Where the system has no locks between processes, or the file system of ``folder`` none, it is
    one among threads alone.

    Args:
        folder: Directory that stands for what is locked. Processes that name the same one exclude
            each other; the kernel frees what a process held when it dies.
    """

    def __init__(self, folder: Path) -> None:
        self._turnstile, self._room = folder / "turnstile", folder / "room"
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._readers = 0
        self._writing = False

    @contextmanager
    def reading(self, *, deadline: float | None = None) -> Iterator[None]:
        """Share it. Raises TimeoutError at ``deadline`` (``time.monotonic``)."""
        with self._held(alone=False, deadline=deadline):
            yield

    @contextmanager
    def writing(self, *, deadline: float | None = None) -> Iterator[None]:
        """Have it alone. Raises TimeoutError at ``deadline`` (``time.monotonic``)."""
        with self._held(alone=True, deadline=deadline):
            yield

    @contextmanager
    def _held(self, *, alone: bool, deadline: float | None) -> Iterator[None]:
        self._enter(alone=alone, deadline=deadline)
        try:
            with self._among_processes(alone=alone, deadline=deadline):
                yield
        finally:
            with self._changed:
                if alone:
                    self._writing = False
                else:
                    self._readers -= 1
                self._changed.notify_all()

    def _enter(self, *, alone: bool, deadline: float | None) -> None:
        place = object()
        with self._changed:
            self._queue.append(place)
            try:
                left = None if deadline is None else deadline - time.monotonic()
                if not self._changed.wait_for(lambda: self._free(place, alone=alone), left):
                    raise TimeoutError("the lock was not free in time")
                self._writing = alone
                self._readers += not alone
            finally:
                self._queue.remove(place)
                self._changed.notify_all()

    def _free(self, place: object, *, alone: bool) -> bool:
        first = self._queue[0] is place
        return first and not self._writing and not (alone and self._readers)

    @contextmanager
    def _among_processes(self, *, alone: bool, deadline: float | None) -> Iterator[None]:
        with ExitStack() as room:
            with _locked(self._turnstile, alone=True, deadline=deadline):
                room.enter_context(_locked(self._room, alone=alone, deadline=deadline))
            yield


@contextmanager
def _locked(directory: Path, *, alone: bool, deadline: float | None) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield
        return
    end = math.inf if deadline is None else deadline
    descriptor = fs.open_to_read(fs.make_directory(directory), directory=True)
    try:
        # Each holder has a descriptor of its own, so this holds among threads as well.
        operation = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB
        while not _taken(descriptor, operation):
            if time.monotonic() >= end:
                raise TimeoutError(f"{directory} was not free in time")
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int, operation: int) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
