"""Directories that a manifest vouches for: its format, and the hash of every file."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from equipoise import fs, record
from equipoise.errors import IncompatibleError, IntegrityError


def check_format(text: str, path: Path, *, newest: int) -> None:
    """Refuse the manifest of a later version before its keys are looked at.

    Raises:
        IntegrityError: It is no JSON.
        IncompatibleError: It is of a format later than ``newest``.
    """
    try:
        found = record.parse(text)
    except ValueError as error:
        raise IntegrityError(f"{path} is no JSON: {error}") from error
    version = found.get("format") if isinstance(found, dict) else None
    if isinstance(version, int) and version > newest:
        raise IncompatibleError(
            f"{path} has format {version}; this equipoise reads up to {newest}",
            hint="Update equipoise on this device.",
        )


def files_below(directory: Path) -> frozenset[str]:
    """Relative names of all files. Raises IntegrityError for a link."""
    found: set[str] = set()
    for folder, folders, names in os.walk(directory):
        for path in (Path(folder, name) for name in (*folders, *names)):
            if path.is_symlink():
                raise IntegrityError(f"{directory}: {path.relative_to(directory)} is a link")
        found |= {str(Path(folder, name).relative_to(directory)) for name in names}
    return frozenset(found)


def check_files(
    directory: Path, hashes: Mapping[str, str], *, present: Collection[str], hint: str
) -> None:
    """Check that ``present`` are the files of ``hashes``, byte for byte.

    Args:
        directory: Where they lie.
        hashes: File name -> SHA-256.
        present: Names of the files that are there and count.
        hint: What to do about a file that has changed.

    Raises:
        IntegrityError: Names the file that is missing, extra, or different.
    """
    for name in sorted(set(present) - set(hashes)):
        raise IntegrityError(f"{directory}: {name} is not listed in the manifest")
    for name, expected in sorted(hashes.items()):
        if name not in present:
            raise IntegrityError(f"{directory}: {name} is missing")
        if fs.sha256_file(directory / name) != expected:
            raise IntegrityError(f"{directory}: {name} is not what its hash says", hint=hint)
