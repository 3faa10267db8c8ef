"""Python code of the user that a stage imports: it goes to the nodes with the stage.

A config names such code as ``package.module:function``. Where the module lies in a package that pip
has installed, the nodes have to have the same version of that. Where it lies in a directory, the
Python files of that directory are sent.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import os
import re
import site
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from equipoise import fs, record
from equipoise.cluster.storage import Storage, checked_name
from equipoise.errors import InputError, IntegrityError
from equipoise.stages import locked

_OBJECT: Final = re.compile(r"(?:\w+:)?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")
_NO_CODE: Final = frozenset({"__pycache__", "node_modules", "site-packages", "build", "dist"})
_MOST_FILES: Final = 5000
_MOST_BYTES: Final = 64 << 20
_LONG_AGO: Final = (1980, 1, 1, 0, 0, 0)
"""Of every file in an archive, so that equal files make equal archives."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """What a stage imports besides equipoise.

    Attributes:
        folders: Directories that are imported from, first to last.
        packages: Installed distributions.
    """

    folders: tuple[Path, ...] = ()
    packages: tuple[str, ...] = ()


def code_of(function: str, config: str) -> Code:
    """The code that a stage names: its function, and objects in the JSON text of its config."""
    folders: dict[Path, None] = {}
    packages: set[str] = set()
    for text in (function, *_texts(record.parse(config))):
        named = _OBJECT.fullmatch(text)
        top = named[1].partition(".")[0] if named else "equipoise"
        if named is None or top == "equipoise":
            continue
        folder = _folder_of(named[1])
        if folder is not None:
            folders[folder] = None
        else:
            packages.update(_distributions().get(top, ()))
    return Code(folders=tuple(folders), packages=tuple(sorted(packages)))


def send_code(folders: tuple[Path, ...], *, storage: Storage) -> str:
    """Send the Python files of ``folders`` as one archive; its SHA-256, empty for no folders.

    Raises:
        InputError: There are too many of them.
    """
    if not folders:
        return ""
    files: dict[str, Path] = {}
    for folder in folders:
        for file in _python_files(folder):
            files.setdefault(file.relative_to(folder).as_posix(), file)
    data = _archive(files)
    sha256 = hashlib.sha256(data).hexdigest()
    with fs.scratch_directory() as scratch:
        fs.write_bytes(scratch / "code.zip", data)
        storage.put(scratch / "code.zip", sha256=sha256)
    return sha256


def fetch_code(sha256: str, *, storage: Storage, inputs: Path) -> Path:
    """The directory below ``inputs`` with the files of an archive.

    Raises:
        IntegrityError: It is missing from the storage, or not what its hash says.
    """
    place = inputs / f"code-{sha256}"
    with locked(place.with_suffix(".lock")):
        if not place.is_dir():
            with fs.staged_directory(place) as staging, fs.scratch_directory() as scratch:
                storage.get(sha256, to=scratch / "code.zip")
                _extract(scratch / "code.zip", staging)
    return place


def _texts(value: record.Json) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _folder_of(module: str) -> Path | None:
    """The directory of ``sys.path`` that has ``module``, unless packages are installed there."""
    for entry in [str(Path.cwd()), *sys.path]:
        base = Path(entry, *module.split("."))
        if base.with_suffix(".py").is_file() or (base / "__init__.py").is_file():
            folder = Path(entry).resolve()
            return None if folder in _installed() else folder
    return None


def _installed() -> set[Path]:
    places = [*site.getsitepackages(), site.getusersitepackages()]
    places += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return {Path(place).resolve() for place in places}


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _python_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for directory, names, files in os.walk(folder):
        here = Path(directory)
        names[:] = [name for name in sorted(names) if _may_have_code(here / name)]
        found.extend(here / name for name in sorted(files) if name.endswith(".py"))
        if len(found) > _MOST_FILES:
            raise _too_much(folder, f"more than {_MOST_FILES} Python files")
    size = sum(file.stat().st_size for file in found)
    if size > _MOST_BYTES:
        raise _too_much(folder, f"{size:,} bytes of Python files")
    return found


def _may_have_code(folder: Path) -> bool:
    hidden = folder.name.startswith(".") or folder.name in _NO_CODE
    return not hidden and not (folder / "pyvenv.cfg").exists()


def _too_much(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder} has {what}; they would all go to the nodes with the module that lies there",
        hint="Put the code of the model into a directory of its own and run from there.",
    )


def _archive(files: Mapping[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, date_time=_LONG_AGO), files[name].read_bytes())
    return buffer.getvalue()


def _extract(file: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                fs.write_bytes(folder / checked_name(name), archive.read(name))
    except zipfile.BadZipFile as error:
        raise IntegrityError(f"the archive of code {file.name} cannot be read: {error}") from error
