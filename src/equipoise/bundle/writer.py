"""Write a bundle: all of its files, and the manifest that vouches for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from equipoise import fs
from equipoise.bundle.manifest import MANIFEST_FILE, Manifest
from equipoise.errors import OutputError


def check_replaceable(directory: Path) -> None:
    """Refuse to write a bundle over something else.

    Raises:
        OutputError: ``directory`` exists and is no bundle.
    """
    if directory.exists() and not (directory / MANIFEST_FILE).is_file():
        raise OutputError(
            f"{directory} exists and is no bundle; it is not replaced",
            hint="Choose another output directory, or move it away.",
        )


def write_bundle(
    directory: Path,
    manifest: Manifest,
    *,
    copies: Mapping[str, Path],
    documents: Mapping[str, bytes],
) -> Manifest:
    """Write the bundle ``directory``, whole or not at all.

    Args:
        directory: Where; a bundle that stood there is replaced.
        manifest: Everything but the hashes, which are filled in here.
        copies: File name -> file to copy.
        documents: File name -> content.

    Returns:
        The manifest as written.

    Raises:
        OutputError: The place cannot be written, or holds something else.
    """
    check_replaceable(directory)
    with fs.staged_directory(directory) as staging:
        for name, source in copies.items():
            fs.copy_file(source, staging / name)
        for name, content in documents.items():
            fs.write_bytes(staging / name, content)
        hashes = {name: fs.sha256_file(staging / name) for name in sorted([*copies, *documents])}
        complete = replace(manifest, files=hashes)
        fs.write_json(staging / MANIFEST_FILE, complete)
    return complete
