"""Stages and their cache.

A stage takes files and a small frozen config and gives back files and a small typed record. Its
result is kept under the SHA-256 of everything that went into it: the config, the content of every
file that the config names, the code of equipoise and the versions of the packages it uses. So a
run that was killed goes on where it was, and nothing runs twice.

    <cache>/<stage>/<key>/record.json    the record, and the SHA-256 of every output file
    <cache>/<stage>/<key>/files/         the outputs
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from equipoise import extras, fs, record
from equipoise.errors import IntegrityError, LockError
from equipoise.isolation import run_isolated

R = TypeVar("R")
_LOCK_WAIT_S: Final = 3600.0
_NOT_IN_KEYS: Final = {"cli", "report"}
NOT_IN_KEY: Final = {"in_key": False}
"""Metadata of a field of a config that changes no result: ``field(metadata=NOT_IN_KEY)``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Generic[R]):
    """One step of the pipeline.

    Attributes:
        name: Folder in the cache, and the word in progress bars.
        function: ``module:function`` with the signature ``(config, *, output: Path) -> R``.
        record: The type that the function returns.
        packages: Distributions whose versions change the result.
    """

    name: str
    function: str
    record: type[R]
    packages: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult(Generic[R]):
    """What a stage left.

    Attributes:
        record: Its record.
        files: The directory with its outputs. Read only: it belongs to the cache.
        cached: Whether it had run before.
    """

    record: R
    files: Path
    cached: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    record: str
    record_sha256: str
    sha256: dict[str, str]


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


class StageRunner:
    """Runs stages in child processes and keeps their results.

    Args:
        cache: Directory of the cache. Processes of one distributed run (``RANK`` of the
            environment) each have a part of their own: in a common one the first would hold the
            lock of a stage in which it waits for the others.
        observer: Hears of progress.
        time_limit_s: Limit for one stage.
        fresh: Run every stage again and replace what is kept.
    """

    def __init__(
        self,
        cache: Path,
        *,
        observer: Observer | None = None,
        time_limit_s: float = 3600.0,
        fresh: bool = False,
    ) -> None:
        self._cache = _own_part(cache)
        self._observer = observer or Observer()
        self._time_limit_s = time_limit_s
        self._fresh = fresh

    def run(
        self, stage: Stage[R], config: object, *, label: str = "", fresh: bool = False
    ) -> StageResult[R]:
        """Run ``stage`` unless its result is there already; run it in any case where ``fresh``.

        Raises:
            EquipoiseError: Whatever the stage raises; nothing is kept then.
            LockError: Another process has worked on the same stage for over an hour.
        """
        label = label or stage.name
        place = self._cache / stage.name / stage_key(stage, config)
        self._observer.started(label)
        with _locked(place.with_suffix(".lock")):
            try:
                kept = None if self._fresh or fresh else self._find(stage, place)
                result = kept or self._make(stage, config, place=place)
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
        return StageResult(record=kept, files=place / "files", cached=True)

    def _make(self, stage: Stage[R], config: object, *, place: Path) -> StageResult[R]:
        with fs.staged_directory(place) as staging:
            files = fs.make_directory(staging / "files")
            text = run_isolated(
                stage.function,
                config,
                output=files,
                on_progress=self._observer.advanced,
                time_limit_s=self._time_limit_s,
            )
            entry = _Entry(record=text, record_sha256=_text_sha256(text), sha256=tree_sha256(files))
            fs.write_json(staging / "record.json", entry)
        made = record.loads(stage.record, text, where=stage.name, error=IntegrityError)
        return StageResult(record=made, files=place / "files", cached=False)


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
def _locked(path: Path) -> Iterator[None]:
    """One process at a time on one key; the kernel frees the lock when the holder dies."""
    filelock = extras.require("filelock")
    fs.make_directory(path.parent)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=_LOCK_WAIT_S)
    except filelock.Timeout as error:
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


def by_content(value: object) -> record.Json:
    """The JSON form of a config in which every path stands for the content that it names.

    Fields that are ``NOT_IN_KEY`` are left out.
    """
    if isinstance(value, Path):
        return content_sha256(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f for f in dataclasses.fields(value) if f.metadata.get("in_key", True))
        return {f.name: by_content(getattr(value, f.name)) for f in fields}
    if isinstance(value, tuple | list):
        return [by_content(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): by_content(v) for k, v in value.items()}
    return record.to_json(value)


def content_sha256(path: Path) -> str:
    """SHA-256 of a file or of a tree of files; a missing path has a hash of its own."""
    if path.is_dir():
        return hashlib.sha256(json.dumps(tree_sha256(path), sort_keys=True).encode()).hexdigest()
    if not path.exists():
        return f"missing:{path}"
    return _file_sha256(path)


def tree_sha256(root: Path) -> dict[str, str]:
    """Relative file name -> SHA-256 of every file below ``root``."""
    files = (Path(directory, name) for directory, _, names in os.walk(root) for name in names)
    return {str(file.relative_to(root)): _file_sha256(file) for file in sorted(files)}


def _file_sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of_version(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=4096)
def _sha256_of_version(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    """Hash once per process: stages share large files."""
    return fs.sha256_file(path)


@functools.cache
def code_sha256() -> str:
    """SHA-256 of the code of equipoise that can change a result."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] not in _NOT_IN_KEYS:
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """Distribution -> installed version, or ``missing``."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


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
