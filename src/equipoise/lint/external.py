"""Data of tensors outside the model's file: where they may lie, and that they are all there.

The file is looked at before anybody opens it. The ONNX library and ONNX Runtime check most of this
too, each in its own way, and neither all of it: a NUL ends the name of the file for them, nobody
compares the checksum, and one of them follows hard links.
"""

from __future__ import annotations

import hashlib
import math
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

from equipoise import extras
from equipoise.errors import SourceError
from equipoise.lint.tensors import (
    Constant,
    constants_of,
    is_external,
    scopes,
    training_graphs,
)

_KEYS: Final = frozenset({"location", "offset", "length", "checksum", "basepath"})
_NUMBER: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f]")
_STRING: Final = 8  # TensorProto.STRING
_HINT: Final = "Put the model and its data files into one folder, as real files and not as links."


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the data of a tensor lie.

    Attributes:
        file: The file.
        offset: First byte.
        length: Number of bytes.
    """

    file: Path
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Graphs that see each other's names, and their constants.

    Attributes:
        graphs: GraphProtos, or a FunctionProto and the graphs in it.
        held: Each constant, and where its data lie if that is outside the model.
    """

    graphs: tuple[Any, ...]
    held: tuple[tuple[Constant, Place | None], ...]


def locate(path: Path, model: Any) -> list[Scope]:
    """Check the external data of all constants of ``model``; nothing is read but what has a sum.

    Args:
        path: The file that it was read from.
        model: ``onnx.ModelProto`` without its external data.

    Raises:
        SourceError: Names the tensor and the location that is outside the model's folder, a link,
            no regular file, too short, or not what its checksum says.
    """
    sums: dict[Path, str] = {}
    parts = [(tuple(graphs), True) for graphs in scopes(model)]
    parts.append((tuple(training_graphs(model)), False))
    return [_scope(path, graphs, loads=loads, sums=sums) for graphs, loads in parts]


def _scope(path: Path, graphs: tuple[Any, ...], *, loads: bool, sums: dict[Path, str]) -> Scope:
    held = []
    for constant in constants_of(graphs, loads=loads):
        try:
            outside = is_external(constant.tensor)
            held.append((constant, _place(constant, path.parent, sums) if outside else None))
        except (ValueError, OSError) as error:
            where = f"the external data of {constant.what:.300}"
            raise SourceError(f"{path}: {where}: {error}", hint=_HINT) from error
    return Scope(graphs=graphs, held=tuple(held))


def _place(constant: Constant, folder: Path, sums: dict[Path, str]) -> Place:
    entries = _entries(constant)
    location = entries.get("location", "")
    file = _file(location, folder)
    offset = _number(entries, "offset", 0)
    held = file.stat().st_size - offset
    length = _number(entries, "length", held)
    needed = tensor_bytes(constant.tensor)
    if length != needed or held < needed:
        raise ValueError(
            f"it takes {needed} bytes; its entry says {length}, and {location!r:.200} has {held}"
            " left from its offset"
        )
    if entries.get("checksum"):
        _check_sum(file, entries["checksum"], sums)
    return Place(file=file, offset=offset, length=length)


def _entries(constant: Constant) -> dict[str, str]:
    entries = constant.tensor.external_data
    if not constant.loads:
        raise ValueError("it has to lie in the model itself: nothing reads it from another file")
    for key, times in Counter(entry.key for entry in entries).items():
        if times > 1 or key not in _KEYS:
            what = "is there twice" if times > 1 else f"is unknown; known: {', '.join(_KEYS)}"
            raise ValueError(f"its key {key!r:.80} {what}")
    return {entry.key: entry.value for entry in entries}


def _file(location: str, folder: Path) -> Path:
    """The file at ``location``: a plain name below ``folder``, with no link on the way."""
    windows = PureWindowsPath(location)
    if not location or _CONTROLS.search(location):
        raise ValueError(f"its location {location!r:.200} is no name of a file")
    if windows.drive or windows.root:
        raise ValueError(f"its location {location!r:.200} is an absolute path")
    parts = PurePosixPath(location).parts
    if ".." in parts or "\\" in location or parts[0] == "*":
        raise ValueError(f"its location {location!r:.200} points outside the directory")
    for index in range(len(parts)):
        place = folder.joinpath(*parts[: index + 1])
        _check_kind(place, location, last=index == len(parts) - 1)
    return folder.joinpath(*parts)


def _check_kind(place: Path, location: str, *, last: bool) -> None:
    try:
        status = place.lstat()
    except OSError as error:
        raise ValueError(
            f"its location {location!r:.200} is not regular file: {error.strerror}"
        ) from error
    if stat.S_ISLNK(status.st_mode) or (last and status.st_nlink > 1):
        raise ValueError(f"its location {location!r:.200} is a link, or on the way through one")
    if not (stat.S_ISREG(status.st_mode) if last else stat.S_ISDIR(status.st_mode)):
        raise ValueError(f"its location {location!r:.200} is not regular file")


def _number(entries: dict[str, str], key: str, default: int) -> int:
    if key not in entries:
        return default
    if not _NUMBER.fullmatch(entries[key]):
        raise ValueError(f"its {key} {entries[key]!r:.80} is no number of bytes")
    return int(entries[key])


def tensor_bytes(tensor: Any) -> int:
    """Bytes of the values of ``tensor``, from its shape; small types pack.

    Raises:
        ValueError: A size is negative, or there is no such type.
    """
    if any(dim < 0 for dim in tensor.dims):
        raise ValueError(f"it has the negative size {min(tensor.dims)}")
    if tensor.data_type == _STRING:
        return 0
    types: Any = extras.require("onnx_ir").DataType
    try:
        bits = int(types(tensor.data_type).bitwidth)
    except TypeError as error:
        raise ValueError(f"it has the type {tensor.data_type}, which holds no numbers") from error
    elements: int = math.prod(tensor.dims)
    return -(-bits * elements // 8)


def _sha1() -> Any:
    return hashlib.sha1(usedforsecurity=False)


def _check_sum(file: Path, expected: str, sums: dict[Path, str]) -> None:
    """Compare the SHA-1 that ONNX keeps of a data file with that of its bytes."""
    if file not in sums:
        with file.open("rb") as data:
            sums[file] = hashlib.file_digest(data, _sha1).hexdigest()
    if sums[file] != expected.lower():
        raise ValueError(f"{file.name} is not what its checksum {expected!r:.60} says")
