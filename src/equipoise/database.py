"""SQLite files: opened by one process at a time, their errors as errors of ours."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from equipoise import extras, fs
from equipoise.errors import (
    EquipoiseError,
    IncompatibleError,
    IntegrityError,
    LockError,
    OutputError,
)

WAIT_S: Final = 10.0
"""How long a connection waits for another one."""

_MAGIC: Final = b"SQLite format 3\x00"


def check_database(path: Path, *, table: str, what: str) -> None:
    """Refuse anything but no file, an empty one, or a database with a certain table.

    Args:
        path: The file.
        table: A table that it has to hold, unless it holds none.
        what: What it should be, for people: ``a journal of a search``.

    Raises:
        OutputError: It is a directory.
        IntegrityError: It is something else.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory; a file is needed for {what}")
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise _foreign(path, what, "it is no SQLite file")
    with contextlib.closing(sqlite3.connect(path, timeout=WAIT_S)) as connection:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        tables = {str(name) for (name,) in found}
    if tables and table not in tables:
        raise _foreign(path, what, f"it holds other tables: {', '.join(sorted(tables)[:3])}")


def _foreign(path: Path, what: str, reason: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is not {what}: {reason}", hint="Name another file; a new one is made."
    )


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """One process at a time on one file: a trial that runs elsewhere would count as dead.

    Raises:
        LockError: Another process has it.
        OutputError: Its place cannot be written.
    """
    filelock = extras.require("filelock")
    fs.make_directory(path.parent)
    lock = filelock.FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise LockError(
            f"another process searches in {path}",
            hint="Wait for it, or name another file.",
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot write beside {path}: {error.strerror or error}",
            hint="Choose a directory that you can write.",
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Errors of SQLite on ``path``, however they are wrapped, as errors of ours."""
    try:
        yield
    except EquipoiseError:
        raise
    except Exception as error:
        found = _translated(path, error)
        if found is None:
            raise
        raise found from error


def _translated(path: Path, error: BaseException) -> EquipoiseError | None:
    texts = [str(one) for one in _chain(error) if isinstance(one, sqlite3.Error)]
    text = texts[0].lower() if texts else ""
    if "locked" in text or "busy" in text:
        return LockError(f"{path} is locked by another program", hint="Close it and try again.")
    if any(word in text for word in ("readonly", "unable to open", "full", "disk i/o")):
        return OutputError(
            f"cannot write {path}: {texts[0]}", hint="Choose a file that you can write."
        )
    if text:
        return IntegrityError(
            f"{path} is damaged: {texts[0]}", hint="Remove it, or name another file."
        )
    if "compatible" in str(error) and isinstance(error, RuntimeError):
        return IncompatibleError(f"{path}: {error}", hint="Name another file.")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it wraps or came from."""
    while error is not None:
        yield error
        original = getattr(error, "orig", None)
        error = original if isinstance(original, BaseException) else error.__cause__
