"""Hashes of what goes into a result: files, trees, configs, code and versions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from equipoise import fs, record

_NOT_IN_KEYS: Final = {"cli", "report"}
NOT_IN_KEY: Final = {"in_key": False}
"""Metadata of a field of a config that changes no result: ``field(metadata=NOT_IN_KEY)``."""


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
    return file_sha256(path)


def tree_sha256(root: Path) -> dict[str, str]:
    """Relative file name -> SHA-256 of every file below ``root``."""
    files = (Path(directory, name) for directory, _, names in os.walk(root) for name in names)
    return {str(file.relative_to(root)): file_sha256(file) for file in sorted(files)}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read once per process for each version of it."""
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
