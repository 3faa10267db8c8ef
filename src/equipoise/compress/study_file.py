"""The SQLite file of a study: opened by one process at a time, its errors as errors of ours."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs
from equipoise.errors import (
    EquipoiseError,
    IncompatibleError,
    IntegrityError,
    LockError,
    OutputError,
)

_SQLITE_WAIT_S: Final = 10.0
_MAGIC: Final = b"SQLite format 3\x00"


@contextlib.contextmanager
def open_storage(path: Path) -> Iterator[Any]:
    """Optuna's storage in ``path``, made when it is not there."""
    optuna = extras.require("optuna")
    _check_file(path)
    fs.check_writable(path.parent)
    # By a function and not by an address: a path may hold what an address gives a meaning to.
    options = {"creator": lambda: _connect(path)}
    storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs=options)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _connect(path: Path) -> sqlite3.Connection:
    """A connection whose commits outlive a killed process; a power cut may take the last ones."""
    connection = sqlite3.connect(path, timeout=_SQLITE_WAIT_S)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _check_file(path: Path) -> None:
    """Nothing, an empty file, or a study of Optuna."""
    if path.is_dir():
        raise OutputError(f"{path} is a directory; a file is needed for the study")
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise _foreign(path, "it is no SQLite file")
    with contextlib.closing(sqlite3.connect(path, timeout=_SQLITE_WAIT_S)) as connection:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        tables = {str(name) for (name,) in found}
    if tables and "studies" not in tables:
        raise _foreign(path, f"it holds other tables: {', '.join(sorted(tables)[:3])}")


def _foreign(path: Path, reason: str) -> IntegrityError:
    return IntegrityError(
        f"{path} holds no study of training settings: {reason}",
        hint="Name another file; a new one is made.",
    )


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """One search at a time on one file: a trial that runs elsewhere would count as dead."""
    filelock = extras.require("filelock")
    extras.require("optuna")
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
