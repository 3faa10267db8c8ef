"""The readers-writer lock: shared by readers, alone for a writer, first come first served."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from equipoise.rwlock import ReadersWriterLock

HOLDER = """
import sys, time
from pathlib import Path
from equipoise.rwlock import ReadersWriterLock

lock = ReadersWriterLock(Path(sys.argv[1]))
with (lock.writing if sys.argv[2] == "w" else lock.reading)():
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> ReadersWriterLock:
    return ReadersWriterLock(tmp_path / "lock")


class Visit:
    """A thread that goes in and stays until it is told to leave."""

    def __init__(self, lock: ReadersWriterLock, *, writes: bool) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()
        self._enter = lock.writing if writes else lock.reading
        self._thread = threading.Thread(target=self._go, daemon=True)
        self._thread.start()

    def _go(self) -> None:
        with self._enter():
            self.inside.set()
            self.leave.wait(20)

    def end(self) -> None:
        self.leave.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def waiting(lock: ReadersWriterLock, count: int) -> None:
    """Wait until so many threads stand in the queue."""
    end = time.monotonic() + 10
    while len(lock._queue) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_readers_share_it(lock: ReadersWriterLock) -> None:
    """Two are inside at once."""
    visits = [Visit(lock, writes=False) for _ in range(2)]
    assert all(visit.inside.wait(10) for visit in visits)
    for visit in visits:
        visit.end()


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_a_writer_is_alone(lock: ReadersWriterLock, *, first: bool, second: bool) -> None:
    """Whoever of the two came first."""
    one = Visit(lock, writes=first)
    assert one.inside.wait(10)
    other = Visit(lock, writes=second)
    assert not other.inside.wait(0.2)
    one.end()
    assert other.inside.wait(10)
    other.end()


def test_a_reader_does_not_overtake_a_writer_that_waits(lock: ReadersWriterLock) -> None:
    """Otherwise readers that follow each other would keep it out for ever."""
    reader = Visit(lock, writes=False)
    assert reader.inside.wait(10)
    writer = Visit(lock, writes=True)
    waiting(lock, 1)
    late = Visit(lock, writes=False)
    waiting(lock, 2)
    assert not late.inside.wait(0.1)
    reader.end()
    assert writer.inside.wait(10)
    assert not late.inside.is_set()
    writer.end()
    assert late.inside.wait(10)
    late.end()


def test_an_error_inside_frees_it(lock: ReadersWriterLock) -> None:
    """For a reader as for a writer."""
    for enter in (lock.reading, lock.writing):
        with pytest.raises(ZeroDivisionError), enter():
            raise ZeroDivisionError
    with lock.writing(deadline=time.monotonic() + 5):
        pass


@pytest.mark.parametrize("other_lock", [False, True], ids=["threads", "as-processes"])
def test_a_deadline_ends_the_wait_and_leaves_the_queue(tmp_path: Path, *, other_lock: bool) -> None:
    """TimeoutError; who comes later does not wait for who has gone."""
    lock = ReadersWriterLock(tmp_path)
    late = ReadersWriterLock(tmp_path) if other_lock else lock
    reader = Visit(lock, writes=False)
    assert reader.inside.wait(10)
    with pytest.raises(TimeoutError), late.writing(deadline=time.monotonic() + 0.2):
        pytest.fail("it got in")
    with late.reading(deadline=time.monotonic() + 5):
        pass
    reader.end()


@pytest.fixture
def holder(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Start a process that holds the lock."""

    def start(kind: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "lock"), kind],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        return process

    return start


@pytest.mark.parametrize("kind", ["r", "w"])
def test_another_process_keeps_a_writer_out_until_it_is_killed(
    lock: ReadersWriterLock, holder: Callable[[str], subprocess.Popen[str]], kind: str
) -> None:
    """The kernel frees what a killed process held."""
    process = holder(kind)
    try:
        with pytest.raises(TimeoutError), lock.writing(deadline=time.monotonic() + 0.3):
            pytest.fail("it got in")
        if kind == "r":
            with lock.reading(deadline=time.monotonic() + 5):
                pass
    finally:
        process.kill()
        process.communicate()
    with lock.writing(deadline=time.monotonic() + 5):
        pass


def test_many_threads_never_meet_a_writer(lock: ReadersWriterLock) -> None:
    """A count of who is inside, looked at by everybody there."""
    inside = {"readers": 0, "writers": 0}
    guard, seen = threading.Lock(), []

    def visit(*, writes: bool) -> None:
        kind = "writers" if writes else "readers"
        for _ in range(5):
            with (lock.writing if writes else lock.reading)():
                with guard:
                    inside[kind] += 1
                    seen.append((kind, dict(inside)))
                time.sleep(0.001)
                with guard:
                    inside[kind] -= 1

    threads = [threading.Thread(target=visit, kwargs={"writes": n % 3 == 0}) for n in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == 45
    assert all(i["readers"] == 0 and i["writers"] == 1 for kind, i in seen if kind == "writers")
    assert all(i["writers"] == 0 for kind, i in seen if kind == "readers")
