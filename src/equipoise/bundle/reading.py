"""Open a bundle, and read from it what was checked: the bytes that were hashed are given out."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from equipoise import fs
from equipoise.bundle.archive import ArchiveFiles
from equipoise.bundle.files import BundleFiles, DirectoryFiles, sha256_of
from equipoise.bundle.manifest import MANIFEST_FILE, SIGNATURE_FILE, Manifest
from equipoise.bundle.parsing import MOST_MANIFEST_BYTES, parse_manifest
from equipoise.bundle.signature import MOST_BYTES
from equipoise.errors import IntegrityError

_LARGE_BYTES: Final = 1 << 20
_HINT: Final = "Copy the bundle again; do not run it."
_WHAT: Final = "Give a bundle: the directory or .zip that equipoise tune or equipoise pack wrote."


def is_bundle(path: Path) -> bool:
    """Whether ``path`` looks like a bundle; nothing of it is checked."""
    return (path / MANIFEST_FILE).is_file() or (path.is_file() and _is_archive(path))


def _is_archive(path: Path) -> bool:
    """Whether the first entry of a ZIP archive is a manifest."""
    name = MANIFEST_FILE.encode()
    with path.open("rb") as file:
        head = file.read(30 + len(name))
    return head.startswith(b"PK\x03\x04") and head.endswith(name)


class Bundle:
    """An open bundle. A context manager; threads may share it.

    Args:
        files: Its files; closed with it.

    Attributes:
        where: Its path.
        manifest: What it says it is.

    Raises:
        IntegrityError: The manifest is none, or the files are not those that it lists, with the
            sizes that it lists. Hashes are checked where bytes are read.
        IncompatibleError: It is of another format.
    """

    def __init__(self, files: BundleFiles) -> None:
        self.where = files.where
        self._files = files
        sizes = files.sizes()
        self._manifest_bytes = self._bounded(MANIFEST_FILE, sizes, most=MOST_MANIFEST_BYTES)
        self.manifest: Manifest = parse_manifest(
            self._manifest_bytes, where=f"{self.where}/{MANIFEST_FILE}"
        )
        self._check_files(sizes)
        signed = SIGNATURE_FILE in sizes
        self._signature = self._bounded(SIGNATURE_FILE, sizes, most=MOST_BYTES) if signed else None

    def _bounded(self, name: str, sizes: dict[str, int], *, most: int) -> bytes:
        if name not in sizes:
            raise IntegrityError(f"{self.where} is no bundle: it has no {name}", hint=_WHAT)
        if sizes[name] > most:
            raise IntegrityError(
                f"{self.where}: {name} has {sizes[name]:,} bytes; at most {most:,} are allowed"
            )
        return self._files.read(name)

    def _check_files(self, sizes: dict[str, int]) -> None:
        listed = self.manifest.files
        for name in sorted(sizes.keys() - listed.keys() - {MANIFEST_FILE, SIGNATURE_FILE}):
            raise IntegrityError(f"{self.where}: {name} is not listed in the manifest", hint=_HINT)
        for name, entry in sorted(listed.items()):
            if name not in sizes:
                raise IntegrityError(f"{self.where}: {name} is missing", hint=_HINT)
            if sizes[name] != entry.size_bytes:
                raise IntegrityError(
                    f"{self.where}: {name} has {sizes[name]:,} bytes; the manifest says"
                    f" {entry.size_bytes:,}",
                    hint=_HINT,
                )

    @property
    def signature(self) -> bytes | None:
        """The signature, which nobody has checked yet; None when there is none."""
        return self._signature

    def hashes(self) -> dict[str, str]:
        """Name -> SHA-256 of every file but the signature: what a signature is to vouch for.

        Those of the manifest's bytes, and what the manifest says of the others.
        """
        listed = {name: entry.sha256 for name, entry in self.manifest.files.items()}
        return {MANIFEST_FILE: hashlib.sha256(self._manifest_bytes).hexdigest(), **listed}

    def read(self, name: str, *, check: bool = True) -> bytes:
        """The bytes of a file, which are what its hash says.

        Args:
            name: One of the manifest's files, or the manifest itself.
            check: Compare with the hash.

        Raises:
            IntegrityError: There is no such file, or it is not what its hash says.
        """
        if name == MANIFEST_FILE:
            return self._manifest_bytes
        if name not in self.manifest.files:
            raise IntegrityError(
                f"{self.where} has no file {name!r}; it has"
                f" {', '.join(sorted(self.manifest.files))}"
            )
        data = self._files.read(name)
        if check:
            self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    @contextlib.contextmanager
    def content(self, name: str, *, check: bool = True) -> Iterator[bytes | Path]:
        """The content of a large file for a library: verified, and out of anyone's reach.

        A path, because libraries read a file with fewer copies than bytes; it is good during the
        block. It is that of the file itself where nobody can write it meanwhile, and of a sealed
        copy in memory elsewhere. The bytes themselves where a system has neither.

        Args:
            name: One of the manifest's files.
            check: Compare with the hash, which is computed while the bytes are copied.

        Raises:
            IntegrityError: It is not what its hash says; nothing has been given out then.
        """
        if self.manifest.files[name].size_bytes < _LARGE_BYTES:
            yield self.read(name, check=check)
            return
        with self._files.still(name) as path:
            if path is not None:
                if check:
                    self._compare(name, sha256_of(self._files, name))
                yield path
                return
        with self._copied(name, check=check) as copy:
            yield copy

    @contextlib.contextmanager
    def _copied(self, name: str, *, check: bool) -> Iterator[bytes | Path]:
        if not fs.has_memory_files():
            yield self.read(name, check=check)
            return
        digest = hashlib.sha256()
        chunks = self._files.chunks(name)
        with fs.memory_file(_hashed(chunks, digest) if check else chunks) as path:
            if check:
                self._compare(name, digest.hexdigest())
            yield path

    def verify(self, *, but: Collection[str] = ()) -> None:
        """Check the hash of every file.

        Args:
            but: Files whose bytes are checked where they are read.

        Raises:
            IntegrityError: Names the first that is not what its hash says.
        """
        for name in sorted(set(self.manifest.files) - set(but)):
            self._compare(name, sha256_of(self._files, name))

    def _compare(self, name: str, found: str) -> None:
        if found != self.manifest.files[name].sha256:
            raise IntegrityError(f"{self.where}: {name} is not what its hash says", hint=_HINT)

    def close(self) -> None:
        """Let go of the files. Closing twice is no error."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _hashed(chunks: Iterator[bytes], digest: Any) -> Iterator[bytes]:
    """The same pieces, hashed in a thread while whoever takes them does something with them."""
    with ThreadPoolExecutor(1) as pool:
        hashing: Future[None] | None = None
        for chunk in chunks:
            if hashing is not None:
                hashing.result()
            hashing = pool.submit(digest.update, chunk)
            yield chunk
        if hashing is not None:
            hashing.result()


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle at ``path``, a directory or an archive. Raises as :class:`Bundle`."""
    place = Path(path)
    files: BundleFiles
    if place.is_file():
        files = ArchiveFiles(place)
    elif (place / MANIFEST_FILE).is_file():
        files = DirectoryFiles(place)
    elif place.exists():
        raise IntegrityError(f"{place} is no bundle: it has no {MANIFEST_FILE}", hint=_WHAT)
    else:
        raise IntegrityError(f"no such bundle: {place}", hint=_WHAT)
    try:
        return Bundle(files)
    except BaseException:
        files.close()
        raise


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the bundle at ``path``; its files are there, their hashes are not checked.

    Raises:
        As :func:`open_bundle`.
    """
    with open_bundle(path) as bundle:
        return bundle.manifest
