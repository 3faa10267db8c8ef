"""Files by the SHA-256 of their content, in a place that all nodes reach: a path or an fsspec URL.

A file is there whole or not at all, is sent once, and is checked by whoever fetches it. Nothing is
ever removed: delete the place when no run uses it any more.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

from equipoise import extras, fs
from equipoise.errors import (
    EquipoiseError,
    IncompatibleError,
    IntegrityError,
    OutputError,
    UsageError,
)

T = TypeVar("T")
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_PASSWORD: Final = re.compile(r"(://[^/@:]*):[^/@]*@")
_NAME: Final = re.compile(r"[0-9a-f]{64}")
_ATTEMPTS: Final = 3
_PAUSE_S: Final = 0.5


class _Place(Protocol):
    """Where files lie under one name each."""

    def size_bytes(self, name: str) -> int | None:
        """Bytes of the file ``name``; None when there is none."""

    def put(self, file: Path, name: str) -> None:
        """Keep a copy of ``file``, whole or not at all."""

    def get(self, name: str, to: Path) -> None:
        """Write the content of ``name`` to ``to``. Raises FileNotFoundError."""


class Storage:
    """See the module.

    Args:
        url: A path, or a URL that fsspec knows: ``s3://bucket/folder``, ``ftp://host/folder``.

    Raises:
        UsageError: The form of the URL is unknown.
        IncompatibleError: A package that this kind of storage needs is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = absolute_url(url)
        self._shown = _without_password(self.url)
        with self._errors():
            self._place: _Place = _place(self.url)
        self._known: set[str] = set()

    def put(self, file: Path, *, sha256: str) -> None:
        """Keep the content of ``file``, whose hash is ``sha256``, unless it is there.

        Raises:
            OutputError: The storage cannot be written.
        """
        if sha256 in self._known:
            return
        with self._errors():
            if self._place.size_bytes(sha256) != file.stat().st_size:
                self._place.put(file, sha256)
        self._known.add(sha256)

    def put_tree(self, root: Path, *, files: dict[str, str]) -> None:
        """Keep every file of a tree: relative name -> SHA-256. Raises as `put`."""
        for name, sha256 in files.items():
            self.put(root / name, sha256=sha256)

    def get(self, sha256: str, *, to: Path) -> None:
        """Write the file whose hash is ``sha256`` to ``to``.

        Raises:
            IntegrityError: It is not in the storage, or not what its hash says.
            OutputError: The storage cannot be read, or ``to`` cannot be written.
        """
        if not _NAME.fullmatch(sha256):
            raise IntegrityError(f"{sha256!r:.80} is no SHA-256")
        with fs.replacing(to) as temporary:
            # A transfer may go wrong, or meet another one: what is damaged is so every time.
            for _ in range(_ATTEMPTS):
                with self._errors(missing=sha256):
                    self._place.get(sha256, temporary)
                found = fs.sha256_file(temporary)
                if found == sha256:
                    return
            raise IntegrityError(
                f"the storage {self._shown} is damaged: {sha256} has the SHA-256 {found}",
                hint="Remove that file from the storage and run the same command again.",
            )

    def get_tree(self, files: dict[str, str], *, to: Path) -> None:
        """Write a tree, relative name -> SHA-256, below ``to``. Raises as `get`."""
        for name, sha256 in files.items():
            self.get(sha256, to=to / checked_name(name))

    @contextlib.contextmanager
    def _errors(self, *, missing: str = "") -> Iterator[None]:
        """The one place where what fsspec and its back ends raise becomes ours."""
        try:
            yield
        except EquipoiseError:
            raise
        except FileNotFoundError as error:
            raise IntegrityError(
                f"the storage {self._shown} has no file {missing or error}",
                hint="Every node has to reach the same storage. A path has to be one that all"
                " machines share; use a URL such as s3://bucket/folder where there is none.",
            ) from error
        except Exception as error:
            raise OutputError(
                f"the storage {self._shown} cannot be used: {type(error).__name__}: {error}",
                hint="Look whether it can be reached, read and written from here.",
            ) from error


def _place(url: str) -> _Place:
    return _Remote(url) if _URL.match(url) else _Folder(Path(url))


class _Folder:
    """A directory of this machine's file system."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def size_bytes(self, name: str) -> int | None:
        path = self._root / name
        return path.stat().st_size if path.is_file() else None

    def put(self, file: Path, name: str) -> None:
        fs.copy_file(file, self._root / name)

    def get(self, name: str, to: Path) -> None:
        if not (self._root / name).is_file():
            raise FileNotFoundError(name)
        fs.copy_file(self._root / name, to)


class _Remote:
    """A place that fsspec reaches. Each thread has a connection of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._of_thread = threading.local()
        self._connected()

    def size_bytes(self, name: str) -> int | None:
        def ask(filesystem: Any, root: str) -> int | None:
            filesystem.invalidate_cache()
            try:
                return int(filesystem.info(f"{root}/{name}")["size"])
            except FileNotFoundError:
                return None

        return self._tried(ask)

    def put(self, file: Path, name: str) -> None:
        def send(filesystem: Any, root: str) -> None:
            # An upload that breaks off leaves a part under a name that nobody asks for.
            part = f"{root}/{name}.{uuid.uuid4().hex}.part"
            with contextlib.suppress(Exception):  # it is there, or the kind knows no folders
                filesystem.makedirs(root, exist_ok=True)
            filesystem.put_file(str(file), part)
            filesystem.mv(part, f"{root}/{name}")

        self._tried(send)

    def get(self, name: str, to: Path) -> None:
        try:
            self._tried(lambda filesystem, root: filesystem.get_file(f"{root}/{name}", str(to)))
        except Exception as error:
            if self.size_bytes(name) is None:  # not every kind says so by itself
                raise FileNotFoundError(name) from error
            raise

    def _tried(self, work: Callable[[Any, str], T]) -> T:
        """Do ``work``, on a new connection when the old one has broken."""
        for attempt in range(_ATTEMPTS):
            try:
                return work(*self._connected())
            except (FileNotFoundError, EquipoiseError):
                raise
            except Exception:
                self._of_thread.connection = None
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(_PAUSE_S)
        raise AssertionError("the loop returns or raises")

    def _connected(self) -> tuple[Any, str]:
        connection: tuple[Any, str] | None = getattr(self._of_thread, "connection", None)
        if connection is None:
            connection = self._of_thread.connection = _connect(self._url)
        return connection


def _connect(url: str) -> tuple[Any, str]:
    fsspec: Any = extras.require("fsspec.core")
    try:
        filesystem, root = fsspec.url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        raise IncompatibleError(
            f"a storage of this form needs a package that is not installed: {error}"
        ) from error
    except ValueError as error:
        raise UsageError(
            f"--storage {_without_password(url)}: {error}",
            hint="Give a path, or a URL that fsspec knows: s3://bucket/folder.",
        ) from error
    return filesystem, root.rstrip("/")


def _without_password(url: str) -> str:
    return _PASSWORD.sub(r"\1:...@", url)


def absolute_url(url: str) -> str:
    """``url`` so that it means the same elsewhere: a path absolute, ``file://`` as a path.

    Raises:
        UsageError: It is empty.
    """
    if not url:
        raise UsageError("--storage is empty; give a path or URL that every node reaches")
    if _URL.match(url) and not url.startswith(("file://", "local://")):
        return url
    path = urlsplit(url).path if "://" in url else url
    return str(Path(path).absolute())


def checked_name(name: str) -> str:
    """A relative file name with nothing in it that leads elsewhere. Raises IntegrityError."""
    parts = name.split("/")
    if not name or name.startswith("/") or "\\" in name or {"", ".", ".."} & set(parts):
        raise IntegrityError(f"{name!r:.200} is no name of a file in a tree")
    return name
