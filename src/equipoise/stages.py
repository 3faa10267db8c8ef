"""Stages and their cache.

A stage takes files and a small frozen config and gives back files and a small typed record. Its
result is kept under the SHA-256 of everything that went into it: the config, the content of every
file that the config names, the code of equipoise and the versions of the packages it uses. So a
run that was killed goes on where it was, and nothing runs twice.

    <cache>/<stage>/<key>/record.json    the record, the SHA-256 of every output file, where it ran
    <cache>/<stage>/<key>/files/         the outputs

Threads may run stages at once. One that measures has its machine to itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from equipoise import extras, fs, record
from equipoise.content import (
    NOT_IN_KEY,
    by_content,
    code_sha256,
    content_sha256,
    tree_sha256,
    versions_of,
)
from equipoise.errors import IntegrityError, LockError
from equipoise.isolation import Limits
from equipoise.launch import (
    Launch,
    LaunchHere,
    Order,
    Ran,
    Stage,
    lock_of_machine,
    time_is_over,
    time_left_s,
)

__all__ = [
    "NOT_IN_KEY",
    "Observer",
    "Stage",
    "StageResult",
    "StageRunner",
    "by_content",
    "code_sha256",
    "content_sha256",
    "default_cache",
    "locked",
    "stage_key",
    "tree_sha256",
    "versions_of",
]

R = TypeVar("R")
_LOCK_WAIT_S: Final = 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult(Generic[R]):
    """What a stage left.

    Attributes:
        record: Its record.
        files: The directory with its outputs. Read only: it belongs to the cache.
        cached: Whether it had run before.
        ran: Where and when; None in a result of an earlier version, which did not keep that.
    """

    record: R
    files: Path
    cached: bool
    ran: Ran | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    record: str
    record_sha256: str
    sha256: dict[str, str]
    ran: Ran | None = None


class Observer:
    """Hears of stages as they start, advance and end. This one does nothing."""

    def started(self, label: str) -> None:
        """A stage begins; ``label`` tells a person what it does."""

    def advanced(self, done: int, total: int) -> None:
        """The running stage has done ``done`` of ``total`` steps."""

    def ended(self, label: str, *, cached: bool) -> None:
        """The stage is done; ``cached`` when it had been done before."""

    def failed(self, label: str) -> None:
        """The stage raised an error."""

    def say(self, line: str) -> None:
        """A line for people, between stages."""


class StageRunner:
    """Runs stages in child processes and keeps their results. Threads may share one.

    Args:
        cache: Directory of the cache. Processes of one distributed run (``RANK`` of the
            environment) each have a part of their own: in a common one the first would hold the
            lock of a stage in which it waits for the others.
        observer: Hears of progress, in the thread that runs the stage or one that belongs to it.
        time_limit_s: Limit for one stage.
        memory_limit_bytes: Limit for the resident memory of one stage and its children.
        fresh: Run every stage again and replace what is kept.
        launch: Computes a stage; in a child process of this machine when None.
        slots: How many threads may well run stages at once.
    """

    def __init__(  # noqa: PLR0913  every one is a setting of its own
        self,
        cache: Path,
        *,
        observer: Observer | None = None,
        time_limit_s: float = 3600.0,
        memory_limit_bytes: int | None = None,
        fresh: bool = False,
        launch: Launch | None = None,
        slots: int = 1,
    ) -> None:
        self._cache = _own_part(cache)
        self._observer = observer or Observer()
        self._limits = Limits(time_s=time_limit_s, memory_bytes=memory_limit_bytes)
        self._fresh = fresh
        self._launch = launch or LaunchHere(lock_of_machine(self._cache))
        self._deadline: float | None = None
        self.slots = slots

    def stop_at(self, deadline: float | None) -> None:
        """Let no stage run beyond ``deadline``, a moment of ``time.monotonic``; None lifts that.

        What is kept is still found afterwards. Stages that run already are not concerned.
        """
        self._deadline = deadline

    def run(
        self, stage: Stage[R], config: object, *, label: str = "", fresh: bool = False
    ) -> StageResult[R]:
        """Run ``stage`` unless its result is there already; run it in any case where ``fresh``.

        Raises:
            EquipoiseError: Whatever the stage raises; nothing is kept then.
            ResourceError: It took more than its limits, or the time of `stop_at` was over.
            LockError: Another process has worked on the same stage for over an hour.
        """
        label = label or stage.name
        place = self._cache / stage.name / stage_key(stage, config)
        deadline = self._deadline
        self._observer.started(label)
        try:
            with locked(place.with_suffix(".lock"), deadline=deadline):
                kept = None if self._fresh or fresh else self._find(stage, place)
                result = kept or self._make(stage, config, place=place, deadline=deadline)
        except BaseException:
            self._observer.failed(label)
            raise
        self._observer.ended(label, cached=result.cached)
        return result

    def _find(self, stage: Stage[R], place: Path) -> StageResult[R] | None:
        """The kept result, unless any of its bytes have changed: then it is as if not there."""
        if not place.exists():
            return None
        try:
            entry = _read_entry(place)
            if tree_sha256(place / "files") != entry.sha256:
                return None
            kept = record.loads(stage.record, entry.record, where=str(place), error=IntegrityError)
        except IntegrityError:
            return None
        return StageResult(record=kept, files=place / "files", cached=True, ran=entry.ran)

    def _make(
        self, stage: Stage[R], config: object, *, place: Path, deadline: float | None
    ) -> StageResult[R]:
        with fs.staged_directory(place) as staging:
            files = fs.make_directory(staging / "files")
            order = Order(
                stage=stage,
                config=config,
                output=files,
                on_progress=self._observer.advanced,
                limits=self._limits,
                deadline=deadline,
            )
            done = self._launch(order)
            made = record.loads(stage.record, done.record, where=stage.name, error=IntegrityError)
            entry = _Entry(
                record=done.record,
                record_sha256=_text_sha256(done.record),
                sha256=tree_sha256(files),
                ran=done.ran,
            )
            fs.write_json(staging / "record.json", entry)
        return StageResult(record=made, files=place / "files", cached=False, ran=done.ran)


def _read_entry(place: Path) -> _Entry:
    """What stands in ``place``. Raises IntegrityError when that is not what was written."""
    text = fs.read_text(place / "record.json", error=IntegrityError)
    entry = record.loads(_Entry, text, where=str(place / "record.json"), error=IntegrityError)
    if _text_sha256(entry.record) != entry.record_sha256:
        raise IntegrityError(f"{place / 'record.json'} is not what its hash says")
    return entry


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def locked(path: Path, *, deadline: float | None = None) -> Iterator[None]:
    """One process and thread at a time on one key; the kernel frees it when the holder dies.

    Raises:
        LockError: Another has held it for over an hour.
        ResourceError: ``deadline`` (``time.monotonic``) passed meanwhile.
    """
    filelock = extras.require("filelock")
    fs.make_directory(path.parent)
    lock = filelock.FileLock(path)
    wait_s = max(0.0, time_left_s(deadline))
    try:
        lock.acquire(timeout=min(wait_s, _LOCK_WAIT_S))
    except filelock.Timeout as error:
        if wait_s < _LOCK_WAIT_S:
            raise time_is_over(path.parent.name) from error
        raise LockError(f"another process has held {path} for {_LOCK_WAIT_S:.0f} s") from error
    try:
        yield
    finally:
        lock.release()


def stage_key(stage: Stage[Any], config: object) -> str:
    """SHA-256 of everything that goes into ``stage`` under ``config``."""
    parts = {
        "stage": stage.name,
        "function": stage.function,
        "config": by_content(config),
        "code": code_sha256(),
        "packages": versions_of(stage.packages),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _own_part(cache: Path) -> Path:
    rank = os.environ.get("RANK", "0")
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or rank == "0"
    return cache if alone else cache / f"rank-{rank}"


def default_cache() -> Path:
    """``$EQUIPOISE_CACHE_DIR``, or the user's cache directory."""
    named = os.environ.get("EQUIPOISE_CACHE_DIR")
    if named:
        return Path(named)
    platformdirs: Any = extras.require("platformdirs")
    return Path(platformdirs.user_cache_dir("equipoise"))
