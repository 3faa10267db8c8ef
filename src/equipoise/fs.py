"""The only module that writes files.

A file or directory appears whole or not at all: it is written beside its place under a temporary
name, flushed to disk, and renamed. What stood there before stays until the rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from equipoise import record
from equipoise.errors import EquipoiseError, InputError, OutputError

_CHUNK_BYTES: Final = 1 << 20
_F_SETSIG: Final = 10
"""Of Linux's fcntl.h."""
_EVERY_SEAL: Final = 0b1111
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_WRITE of Linux's fcntl.h."""
_NO_SPACE: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system error on ``path`` into an OutputError."""
    try:
        yield
    except OSError as error:
        raise _output_error(path, error) from error


def _output_error(path: Path, error: OSError) -> OutputError:
    if error.errno in _NO_SPACE:
        return OutputError(
            f"no space left to write {path}: {error.strerror}",
            hint="Free some space or choose another output directory; nothing was half-written.",
        )
    return OutputError(
        f"cannot write {path}: {error.strerror or error}",
        hint="Choose a directory that you can write.",
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for name in files:
            _sync(Path(directory, name))
        _sync(Path(directory))


def make_directory(path: Path) -> Path:
    """Make ``path`` and its parents. Raises OutputError when that is impossible."""
    with _output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def check_writable(directory: Path, *, needed_bytes: int = 0) -> None:
    """Make ``directory`` and prove that it can be written, before hours of work.

    Raises:
        OutputError: It cannot be made or written, or has less than ``needed_bytes`` free.
    """
    make_directory(directory)
    with _output_errors(directory), tempfile.TemporaryFile(dir=directory) as probe:
        probe.write(b"equipoise")
        probe.flush()
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise OutputError(
            f"{directory} has {free:,} bytes free; about {needed_bytes:,} are needed",
            hint="Free some space or choose another directory.",
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; rename it to ``path`` when the block ends well.

    For libraries that write files themselves. Raises OutputError as above.
    """
    make_directory(path.parent)
    with _output_errors(path):
        temporary = Path(tempfile.mkdtemp(prefix=".equipoise-", dir=path.parent))
    try:
        with _output_errors(path):
            yield temporary / path.name
            _sync(temporary / path.name)
            os.replace(temporary / path.name, path)
            _sync(path.parent)
    finally:
        remove(temporary)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path``, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a dataclass or plain values as canonical JSON."""
    write_text(path, record.dumps(value))


def copy_file(source: Path, destination: Path) -> None:
    """Copy bytes; never link, because ONNX refuses external data behind links.

    Raises:
        InputError: There is no file ``source``.
        OutputError: ``destination`` cannot be written.
    """
    if not source.is_file():
        raise InputError(f"no such file: {source}")
    with replacing(destination) as temporary:
        shutil.copyfile(source, temporary)


def copy_tree(source: Path, destination: Path) -> None:
    """Copy every file below ``source``, links as what they point to. Raises as `copy_file`."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copy_file(file, destination / file.relative_to(source))


@contextlib.contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """A new file inside a staged directory, to be written in pieces."""
    with _output_errors(path), path.open("wb") as file:
        yield file


@contextlib.contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """Give an empty directory to fill; rename it to ``path`` when the block ends well.

    A directory that stood at ``path`` is put back if the rename fails, and removed if it succeeds.
    """
    make_directory(path.parent)
    with _output_errors(path):
        staging = Path(tempfile.mkdtemp(prefix=".equipoise-", dir=path.parent))
        staging.chmod(0o755)
    try:
        yield staging
        with _output_errors(path):
            _sync_tree(staging)
            _swap_directory(staging, path)
            _sync(path.parent)
    finally:
        remove(staging)


def move_into_place(source: Path, path: Path) -> None:
    """Move a finished file or directory to ``path`` on the same disk, in place of what is there."""
    with _output_errors(path):
        if source.is_dir():
            _swap_directory(source, path)
        else:
            os.replace(source, path)
        _sync(path.parent)


def _swap_directory(staging: Path, path: Path) -> None:
    if not path.exists():
        os.rename(staging, path)
        return
    holder = Path(tempfile.mkdtemp(prefix=".equipoise-old-", dir=path.parent))
    try:
        os.rename(path, holder / path.name)
        os.rename(staging, path)
    except OSError:
        if not path.exists():
            os.rename(holder / path.name, path)
        holder.rmdir()
        raise
    remove(holder)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory for a library that wants to write files nobody keeps."""
    with tempfile.TemporaryDirectory(prefix="equipoise-") as name:
        yield Path(name)


@contextlib.contextmanager
def lease(descriptor: int) -> Iterator[Callable[[], bool] | None]:
    """Keep a file from being written by anyone during the block, where the system can: Linux.

    It cannot where the file belongs to another user, is open for writing, or is on a network.
    Whoever opens it for writing meanwhile waits for the end of the block.

    Yields:
        Whether it is so still; None where it cannot be had.
    """
    try:
        import fcntl

        # The usual signal to who holds a lease ends the process; this one nobody minds.
        fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except (ImportError, AttributeError, OSError):
        yield None
        return
    try:
        yield lambda: fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def path_of(descriptor: int) -> Path | None:
    """A path that opens the same file again, whatever its name is now; None where there is none."""
    path = Path(f"/proc/self/fd/{descriptor}")
    return path if path.exists() else None


def has_memory_files() -> bool:
    """Whether this system has files in memory that can be sealed and opened by a path: Linux."""
    return hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()


@contextlib.contextmanager
def memory_file(chunks: Iterable[bytes]) -> Iterator[Path]:
    """A file in memory that nobody can change any more, for a library that opens paths.

    It is gone at the end of the block; what has opened it keeps it.

    Raises:
        OutputError: There is no memory for it.
    """
    import fcntl

    descriptor = os.memfd_create("equipoise", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    path = Path(f"/proc/self/fd/{descriptor}")
    try:
        with _output_errors(path), os.fdopen(descriptor, "wb", buffering=0, closefd=False) as file:
            for chunk in chunks:
                file.write(chunk)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _EVERY_SEAL)
        yield path
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or tree that may not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def tree_size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def open_to_read(
    path: str | Path, *, folder: int | None = None, directory: bool = False, follow: bool = False
) -> int:
    """A descriptor that can be read and nothing else; the caller closes it.

    Args:
        path: A path, or a name in ``folder``.
        folder: Descriptor of an open directory.
        directory: Whether it has to be a directory.
        follow: Whether a link at its end is followed.

    Raises:
        OSError: It cannot be opened; ``ELOOP`` or ``ENOTDIR`` for a link that is not followed.
    """
    flags = os.O_RDONLY | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    # A pipe that took the place of a file must not block.
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_DIRECTORY", 0) if directory else 0
    return os.open(path, flags, dir_fd=folder)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes out of the block; a lock on a directory leaves no file behind."""
    try:
        import fcntl
    except ImportError:  # Windows has none; there the rename alone has to do
        yield
        return
    with _output_errors(directory):
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_text(path: Path, *, error: type[EquipoiseError]) -> str:
    """UTF-8 text of ``path``; ``error`` when it is missing or not text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as cause:
        raise error(f"no such file: {path}") from cause
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"cannot read {path}: {cause}") from cause
