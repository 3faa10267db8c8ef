"""The SQLite file of a study, which Optuna writes."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equipoise import extras, fs
from equipoise.database import WAIT_S, check_database


@contextlib.contextmanager
def open_storage(path: Path) -> Iterator[Any]:
    """Optuna's storage in ``path``, made when it is not there."""
    optuna = extras.require("optuna")
    check_database(path, table="studies", what="a study of training settings")
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
    connection = sqlite3.connect(path, timeout=WAIT_S)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection
