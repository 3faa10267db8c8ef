"""The journal: what is in it outlives the process, and what is no journal is refused."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.errors import IncompatibleError, IntegrityError, LockError, OutputError
from equipoise.quantize.schemes import StaticInt8
from equipoise.recipe import Recipe
from equipoise.search.journal import Journal

RECIPE = Recipe(name="int8-static", summary="", quantization=StaticInt8(min_sqnr_db=12.5))


def test_trials_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    with Journal(path) as journal:
        number = journal.begin(RECIPE, origin="model", began_s=1.5)
        journal.end(number, verdict="failed", reason="no memory", seconds=2.5)
        journal.begin(RECIPE, origin="optuna", began_s=1.5)
    with Journal(path) as journal:
        first, second = journal.entries()
        assert journal.spent_s() == 2.5
    assert (first.recipe, first.origin, first.verdict) == (RECIPE, "model", "failed")
    assert (first.reason, first.seconds) == ("no memory", 2.5)
    assert (second.verdict, second.seconds) == (None, None)


def test_cleared(tmp_path: Path) -> None:
    """What is asked for afresh is not answered from before."""
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.begin(RECIPE, origin="start", began_s=0.0)
        journal.clear()
        assert journal.entries() == ()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    with Journal(path), pytest.raises(LockError, match=r"j\.sqlite"):
        Journal(path)
    Journal(path).__exit__(None, None, None)


WRITE = """
import sys, os, signal
from pathlib import Path
from equipoise.recipe import Recipe
from equipoise.search.journal import Journal
with Journal(Path(sys.argv[1])) as journal:
    for index in range(1000):
        number = journal.begin(Recipe(name=f"r{index}", summary=""), origin="start", began_s=1.5)
        journal.end(number, verdict="finished", reason="", seconds=1.0)
        print(index, flush=True)
"""


def test_sigkill_loses_nothing_that_was_told(tmp_path: Path) -> None:
    """Killed in the middle: every trial that had ended is there, and at most one has no end."""
    path = tmp_path / "j.sqlite"
    child = subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE)
    told = -1
    while told < 20:
        told = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with Journal(path) as journal:
        entries = journal.entries()
    ended = [e.recipe.name for e in entries if e.seconds is not None]
    assert ended[: told + 1] == [f"r{i}" for i in range(told + 1)]
    assert len(entries) - len(ended) <= 1


def test_what_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello" * 100)
    with pytest.raises(IntegrityError, match="no SQLite file"):
        Journal(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE cats (name TEXT)")
    with pytest.raises(IntegrityError, match="cats"):
        Journal(tmp_path / "other")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="directory"):
        Journal(tmp_path / "folder")


def test_damaged_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    with Journal(path) as journal:
        for _ in range(50):
            journal.begin(RECIPE, origin="start", began_s=1.5)
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"j\.sqlite"), Journal(path) as journal:
        journal.entries()


def test_journal_of_the_future(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE trials (id INTEGER)")
        other.execute("PRAGMA user_version = 99")
    with pytest.raises(IncompatibleError, match="format 99"):
        Journal(path)
