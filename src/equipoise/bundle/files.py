"""The files of a bundle, by name: in a directory, or in one archive that is read in place.

A file is read once, into memory that its manifest has announced, and what is hashed is what is
used. Nothing that is not a plain file of its own is opened: no link, pipe, socket or device.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from equipoise import fs
from equipoise.bundle.names import MOST_FILES, check_names
from equipoise.errors import IntegrityError, ResourceError, UsageError

CHUNK_BYTES: Final = 1 << 20
_MOST_DEPTH: Final = 8
_HINT: Final = "Copy the bundle again; do not run it."


class BundleFiles(Protocol):
    """Named files that can be read."""

    where: str

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file that is there."""

    @abstractmethod
    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece.

        Raises:
            IntegrityError: It is not the file that :meth:`sizes` has seen.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises as :meth:`chunks`, and ResourceError without memory."""

    @abstractmethod
    def still(self, name: str) -> AbstractContextManager[Path | None]:
        """A path to a file that nobody can change during the block; None where there is none.

        Raises:
            IntegrityError: Somebody did, in spite of that; at the end of the block.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the directory or archive. Closing twice is no error."""


def sha256_of(files: BundleFiles, name: str) -> str:
    """SHA-256 of a file, which is never held as a whole."""
    found = hashlib.sha256()
    for chunk in files.chunks(name):
        found.update(chunk)
    return found.hexdigest()


def pread_exactly(descriptor: int, *, start: int, size: int) -> bytes:
    """``size`` bytes from ``start``; fewer where the file ends.

    One allocation for a large file: pieces that are joined would need twice the memory.
    """
    try:
        data = os.pread(descriptor, size, start)
    except MemoryError as error:
        raise ResourceError(f"no memory for a file of {size:,} bytes") from error
    if len(data) == size or not data:
        return data
    return b"".join(
        (data, pread_exactly(descriptor, start=start + len(data), size=size - len(data)))
    )


def pread_chunks(descriptor: int, *, start: int, size: int) -> Iterator[bytes]:
    """As :func:`pread_exactly`, piece by piece."""
    end = start + size
    while start < end:
        data = os.pread(descriptor, min(CHUNK_BYTES, end - start), start)
        if not data:
            return
        yield data
        start += len(data)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a file was when the directory was listed."""

    size: int
    identity: tuple[int, int, int]


class DirectoryFiles(BundleFiles):
    """The files of a directory, which is held open: what is put in its place changes nothing.

    Args:
        directory: The bundle. It may be reached through a link; nothing in it may be one.

    Raises:
        IntegrityError: It holds something else than plain files in directories, or a name that is
            not allowed.
    """

    def __init__(self, directory: Path) -> None:
        self.where = str(directory)
        self._root = -1
        try:
            self._root = fs.open_to_read(directory, directory=True, follow=True)
            self._seen = dict(self._listed(self._root))
            check_names(self._seen, where=self.where)
        except OSError as error:
            self.close()
            raise IntegrityError(f"cannot read the bundle {directory}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file."""
        return {name: seen.size for name, seen in self._seen.items()}

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece."""
        descriptor = self._open(name)
        try:
            left = size = self._seen[name].size
            for chunk in pread_chunks(descriptor, start=0, size=size):
                left -= len(chunk)
                yield chunk
            self._check_seen(descriptor, name, missing=left)
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        descriptor = self._open(name)
        try:
            size = self._seen[name].size
            data = pread_exactly(descriptor, start=0, size=size)
            self._check_seen(descriptor, name, missing=size - len(data))
        finally:
            os.close(descriptor)
        return data

    @contextlib.contextmanager
    def still(self, name: str) -> Iterator[Path | None]:
        """A path to a file that nobody can change during the block."""
        descriptor = self._open(name)
        try:
            with fs.lease(descriptor) as holds:
                path = fs.path_of(descriptor) if holds is not None else None
                yield path
                if path is not None and holds is not None and not holds():
                    raise IntegrityError(f"{self.where}: {name} changed while it was read")
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go of the directory."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def _listed(self, folder: int, prefix: str = "") -> Iterator[tuple[str, _Seen]]:
        """Every file below an open directory. Raises IntegrityError for anything that is none."""
        names = sorted(os.listdir(folder))
        self._check_many(names, prefix)
        for part in names:
            name = f"{prefix}{part}"
            found = os.stat(part, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                yield name, self._plain(found, name)
                continue
            below = self._subfolder(part, folder=folder, name=name)
            try:
                yield from self._listed(below, f"{name}/")
            finally:
                os.close(below)

    def _check_many(self, names: list[str], prefix: str) -> None:
        if not names and prefix:
            raise IntegrityError(f"{self.where}: the directory {prefix!r} is empty", hint=_HINT)
        if len(names) > MOST_FILES or prefix.count("/") > _MOST_DEPTH:
            raise IntegrityError(
                f"{self.where}: {len(names)} names in the directory {prefix!r}, or it is too deep;"
                f" at most {MOST_FILES} names and {_MOST_DEPTH} levels are allowed"
            )

    def _subfolder(self, part: str, *, folder: int, name: str) -> int:
        try:
            return fs.open_to_read(part, folder=folder, directory=True)
        except OSError as error:
            raise self._refused(name, error) from error

    def _plain(self, found: os.stat_result, name: str) -> _Seen:
        if not stat.S_ISREG(found.st_mode):
            raise IntegrityError(f"{self.where}: {name!r} is {_kind(found.st_mode)}", hint=_HINT)
        if found.st_nlink > 1:
            raise IntegrityError(
                f"{self.where}: {name!r} is a hard link: the same file has another name elsewhere",
                hint="Copy the bundle without links, as `cp -r` does.",
            )
        identity = (found.st_dev, found.st_ino, found.st_mtime_ns)
        return _Seen(size=found.st_size, identity=identity)

    def _open(self, name: str) -> int:
        """A file, each directory on the way opened as one and no link followed."""
        if self._root < 0:
            raise UsageError(f"the bundle {self.where} is closed", hint="Open it again.")
        if name not in self._seen:
            raise IntegrityError(f"{self.where}: {name} is missing", hint=_HINT)
        *folders, last = name.split("/")
        held = self._root
        try:
            for part in folders:
                below = fs.open_to_read(part, folder=held, directory=True)
                held = _replaced(held, below, kept=self._root)
            return self._same(fs.open_to_read(last, folder=held), name)
        except OSError as error:
            raise self._refused(name, error) from error
        finally:
            if held != self._root:
                os.close(held)

    def _same(self, descriptor: int, name: str) -> int:
        try:
            self._check_seen(descriptor, name)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_seen(self, descriptor: int, name: str, *, missing: int = 0) -> None:
        """It is the file that was listed, and all of it was read."""
        if missing or self._plain(os.fstat(descriptor), name) != self._seen[name]:
            raise IntegrityError(f"{self.where}: {name} changed while it was read", hint=_HINT)

    def _refused(self, name: str, error: OSError) -> IntegrityError:
        link = error.errno in {errno.ELOOP, errno.ENOTDIR}
        why = "it became a link" if link else str(error.strerror)
        return IntegrityError(f"{self.where}: cannot read {name}: {why}", hint=_HINT)


def _replaced(old: int, new: int, *, kept: int) -> int:
    if old != kept:
        os.close(old)
    return new


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no plain file")
