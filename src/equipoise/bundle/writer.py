"""Write a bundle: a directory or an archive, whole or not at all, the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from equipoise import fs
from equipoise.bundle.archive import MOST_BYTES, SUFFIX, write_archive
from equipoise.bundle.files import CHUNK_BYTES
from equipoise.bundle.manifest import MANIFEST_FILE, FileEntry, Manifest
from equipoise.bundle.parsing import check_manifest, manifest_bytes
from equipoise.bundle.reading import is_bundle
from equipoise.errors import InputError, OutputError


def is_archive_name(path: Path) -> bool:
    """Whether a bundle of that name is an archive."""
    return path.suffix.lower() == SUFFIX


def check_replaceable(path: Path) -> None:
    """Refuse to write a bundle over something else.

    Raises:
        OutputError: ``path`` exists and is no bundle.
    """
    if path.exists() and not is_bundle(path):
        raise OutputError(
            f"{path} exists and is no bundle; it is not replaced",
            hint="Choose another output, or move it away.",
        )


@dataclass(frozen=True, kw_only=True)
class _Content:
    """One file to be written: where its bytes come from, and what they were when first read."""

    source: Path | bytes
    size: int
    sha256: str
    crc: int

    @property
    def entry(self) -> FileEntry:
        """What the manifest says of it."""
        return FileEntry(size_bytes=self.size, sha256=self.sha256)


def _content(source: Path | bytes) -> _Content:
    size, crc, digest = 0, 0, hashlib.sha256()
    for chunk in _chunks(source):
        size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        digest.update(chunk)
    return _Content(source=source, size=size, sha256=digest.hexdigest(), crc=crc)


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, Path) and not source.is_file():
        raise InputError(f"no such file: {source}")
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def write_bundle(
    path: Path,
    manifest: Manifest,
    *,
    copies: Mapping[str, Path],
    documents: Mapping[str, bytes],
    derived: Mapping[str, Callable[[Manifest], bytes]] | None = None,
) -> Manifest:
    """Write the bundle ``path``, whole or not at all.

    Args:
        path: Where; one stored ZIP archive if it ends in ``.zip``. A bundle that stood there is
            replaced.
        manifest: Everything but the files, which are filled in here.
        copies: Name -> file to copy.
        documents: Name -> content.
        derived: Name -> what makes its content from the manifest with all the files above.

    Returns:
        The manifest as written.

    Raises:
        OutputError: The place cannot be written, or holds something else, or the bundle is too
            large for an archive.
        InputError: There is no such file to copy.
        IntegrityError: The manifest contradicts itself.
    """
    check_replaceable(path)
    sources: dict[str, Path | bytes] = {**copies, **documents}
    contents = {name: _content(source) for name, source in sorted(sources.items())}
    for name, make in (derived or {}).items():
        contents[name] = _content(make(_listing(manifest, contents)))
    contents = dict(sorted(contents.items()))
    complete = _listing(manifest, contents)
    check_manifest(complete, where=str(path))
    own = _content(manifest_bytes(complete))
    write = _write_archive if is_archive_name(path) else _write_directory
    write(path, {MANIFEST_FILE: own, **contents})
    return complete


def _listing(manifest: Manifest, contents: Mapping[str, _Content]) -> Manifest:
    return replace(manifest, files={name: content.entry for name, content in contents.items()})


def _write_directory(path: Path, contents: Mapping[str, _Content]) -> None:
    if path.is_file():
        raise OutputError(f"{path} is a bundle in one file; a directory does not replace it")
    with fs.staged_directory(path) as staging:
        for name, content in contents.items():
            fs.make_directory((staging / name).parent)
            with fs.appending(staging / name) as file:
                for chunk in _checked(content):
                    file.write(chunk)


def _write_archive(path: Path, contents: Mapping[str, _Content]) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a directory; an archive does not replace it")
    # A header of 30 bytes, a record of 46 and twice the name for each, and 22 at the end.
    total = 22 + sum(c.size + 76 + 2 * len(name.encode()) for name, c in contents.items())
    if total > MOST_BYTES:
        raise OutputError(
            f"a bundle of {total:,} bytes does not fit an archive; {MOST_BYTES:,} are possible",
            hint="Write it as a directory.",
        )
    entries = ((name, c.size, c.crc, _checked(c)) for name, c in contents.items())
    with fs.replacing(path) as temporary, temporary.open("wb") as file:
        write_archive(file, entries)


def _checked(content: _Content) -> Iterator[bytes]:
    """The bytes of a file, which have to be what they were when they were hashed."""
    digest = hashlib.sha256()
    for chunk in _chunks(content.source):
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != content.sha256:
        raise InputError(f"{content.source!s} changed while it was packed", hint="Pack it again.")
