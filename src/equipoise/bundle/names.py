"""Which names a file of a bundle may have: the same one file on every system.

A name that one system reads as another file, refuses, or does not show is refused everywhere.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import Final

from equipoise.errors import IntegrityError

MOST_FILES: Final = 4096
"""Files in a bundle."""
_MOST_NAME_BYTES: Final = 512
_MOST_ENGINE_NAME: Final = 64
ENGINE_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
"""Names of engines are those of directories on any file system."""

_MOST_PART_BYTES: Final = 128
_MOST_PARTS: Final = 8
_FORBIDDEN: Final = frozenset('<>:"\\|?*')
_RESERVED: Final = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])(\..*)?", re.IGNORECASE
)
"""Device names of Windows, which it finds in every directory and under every extension."""


def check_names(names: Iterable[str], *, where: str) -> None:
    """Check every name, and that no two of them are one file somewhere.

    Args:
        names: Relative names with forward slashes.
        where: The bundle, for messages.

    Raises:
        IntegrityError: Names the first that is not allowed, and why.
    """
    listed = sorted(names)
    if len(listed) > MOST_FILES:
        raise IntegrityError(f"{where}: {len(listed)} files; at most {MOST_FILES} are allowed")
    for name in listed:
        problem = name_problem(name)
        if problem:
            raise IntegrityError(f"{where}: the file name {name!a:.200} is refused: {problem}")
    _check_collisions(listed, where=where)


def name_problem(name: str) -> str:
    """What is wrong with the name of a file; empty when nothing is."""
    if any(unicodedata.category(character).startswith("C") for character in name):
        return "it has a control, format, private or unassigned character"
    if len(name.encode()) > _MOST_NAME_BYTES:
        return f"it is longer than {_MOST_NAME_BYTES} bytes"
    if unicodedata.normalize("NFC", name) != name:
        return "it is not in Unicode's normal form C"
    if set(name) & _FORBIDDEN:
        return f"it has one of {' '.join(sorted(_FORBIDDEN))}"
    parts = name.split("/")
    if len(parts) > _MOST_PARTS:
        return f"it is deeper than {_MOST_PARTS} directories"
    return next(filter(None, map(_part_problem, parts)), "")


def _part_problem(part: str) -> str:
    if not part:
        return "it is absolute, or has an empty part"
    if part.startswith((".", " ")) or part.endswith((".", " ")):
        return "a part of it begins with a dot or space, or ends with one"
    if len(part.encode()) > _MOST_PART_BYTES:
        return f"a part of it is longer than {_MOST_PART_BYTES} bytes"
    if _RESERVED.fullmatch(part):
        return "Windows reserves it for a device"
    return ""


def _check_collisions(names: list[str], *, where: str) -> None:
    """Refuse what a system that ignores case, or normal forms, takes for one file."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in names:
        for folder in _folders(name):
            _claim(folders, folder, where=where)
        _claim(files, name, where=where)
    for key in sorted(files.keys() & folders.keys()):
        raise IntegrityError(f"{where}: {files[key]!r} is a file and {folders[key]!r} a directory")


def _folders(name: str) -> Iterable[str]:
    parts = name.split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts)))


def _claim(known: dict[str, str], name: str, *, where: str) -> None:
    held = known.setdefault(_folded(name), name)
    if held != name:
        raise IntegrityError(f"{where}: {held!r} and {name!r} are one file on some systems")


def _folded(name: str) -> str:
    """One text for all names that some file system takes for the same."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFD", name).casefold())


def engine_name(words: str) -> str:
    """A name for an engine that is called ``words``: that in small letters, where it is allowed.

    Else a hash makes up for what is left out.
    """
    small = words.lower()
    if ENGINE_NAME.fullmatch(small):
        return small
    plain = re.sub(r"[^a-z0-9._-]+", "-", small).strip("._-")
    digest = hashlib.sha256(words.encode()).hexdigest()[:8]
    kept = plain[: _MOST_ENGINE_NAME - len(digest) - 1].rstrip("._-")
    return f"{kept}-{digest}" if kept else digest
