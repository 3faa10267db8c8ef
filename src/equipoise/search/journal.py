"""What a search has tried, in an SQLite file that outlives it.

A trial is written down when it begins and again when it ends, so a run that is killed loses the
running one at most. Numbers are kept by the cache of stages; the journal says what was tried, in
which order, how it ended and how long it took.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Final, Self

from equipoise import fs, record
from equipoise.database import WAIT_S, check_database, database_errors, only_one
from equipoise.errors import IncompatibleError, IntegrityError
from equipoise.recipe import Recipe

_FORMAT: Final = 1
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS trials (
    id INTEGER PRIMARY KEY,
    recipe TEXT NOT NULL,
    origin TEXT NOT NULL,
    began_s REAL NOT NULL,
    seconds REAL,
    verdict TEXT,
    reason TEXT
);
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A trial of an earlier run.

    Attributes:
        number: Its place in the journal.
        recipe: What was tried.
        origin: What proposed it.
        began_s: Seconds into the search, earlier runs included.
        seconds: How long it took; None if the run was killed in it.
        verdict: How it ended; None if it did not, ``finished`` if it was measured to the end.
        reason: Why, in words.
    """

    number: int
    recipe: Recipe
    origin: str
    began_s: float
    seconds: float | None
    verdict: str | None
    reason: str


class Journal:
    """The trials of one search. A context manager; its methods may be called from any thread.

    Args:
        path: The SQLite file; made when it is not there.

    Raises:
        LockError: Another process searches with it.
        IntegrityError: It is no journal, or is damaged.
        IncompatibleError: A later version wrote it.
        OutputError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(only_one(path))
            self._connection = self._stack.enter_context(contextlib.closing(_opened(path)))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def entries(self) -> tuple[Entry, ...]:
        """All trials, in the order in which they began."""
        query = (
            "SELECT id, recipe, origin, began_s, seconds, verdict, reason FROM trials ORDER BY id"
        )
        return tuple(self._entry(row) for row in self._run(query))

    def clear(self) -> None:
        """Forget all trials."""
        self._run("DELETE FROM trials")

    def begin(self, recipe: Recipe, *, origin: str, began_s: float) -> int:
        """Write down that a trial begins, so many seconds into the search; gives its number."""
        rows = self._run(
            "INSERT INTO trials (recipe, origin, began_s) VALUES (?, ?, ?) RETURNING id",
            (record.dumps(recipe), origin, began_s),
        )
        return int(str(rows[0][0]))

    def end(self, number: int, *, verdict: str, reason: str, seconds: float) -> None:
        """Write down how a trial ended."""
        self._run(
            "UPDATE trials SET verdict = ?, reason = ?, seconds = ? WHERE id = ?",
            (verdict, reason, seconds, number),
        )

    def spent_s(self) -> float:
        """Seconds in all trials that came to an end."""
        rows = self._run("SELECT COALESCE(SUM(seconds), 0) FROM trials")
        return float(str(rows[0][0]))

    def _entry(self, row: tuple[object, ...]) -> Entry:
        number, text, origin, began_s, seconds, verdict, reason = row
        return Entry(
            number=int(str(number)),
            recipe=record.loads(
                Recipe, str(text), where=f"{self._path}, trial {number}", error=IntegrityError
            ),
            origin=str(origin),
            began_s=float(str(began_s)),
            seconds=None if seconds is None else float(str(seconds)),
            verdict=None if verdict is None else str(verdict),
            reason=str(reason or ""),
        )

    def _run(self, query: str, values: Sequence[object] = ()) -> list[tuple[object, ...]]:
        with self._lock, database_errors(self._path), self._connection:
            return self._connection.execute(query, tuple(values)).fetchall()


def _opened(path: Path) -> sqlite3.Connection:
    with database_errors(path):
        check_database(path, table="trials", what="a journal of a search")
        fs.check_writable(path.parent)
        connection = sqlite3.connect(path, timeout=WAIT_S, check_same_thread=False)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found > _FORMAT:
        raise IncompatibleError(
            f"{path} is a journal of format {found}; this version reads up to {_FORMAT}",
            hint="Use the version of equipoise that wrote it, or another output directory.",
        )
    # What a commit returned from is on disk, whatever kills the process or the machine.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    with connection:
        connection.executescript(_TABLES)
        connection.execute(f"PRAGMA user_version = {_FORMAT}")
