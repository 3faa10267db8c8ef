"""The files that a config names: sent by content, and found again on a node under other paths."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise import extras, fs, record
from equipoise.cluster.messages import Parcel, Tree
from equipoise.cluster.storage import Storage
from equipoise.content import file_sha256, tree_sha256
from equipoise.errors import IntegrityError, SourceError
from equipoise.lint import external
from equipoise.stages import locked


@dataclass(frozen=True, kw_only=True)
class _Named:
    """A path in a config: where it stands there, and what stands before it."""

    at: tuple[str, ...]
    path: Path
    prefix: str = ""


def pack(config: object, *, storage: Storage) -> tuple[Parcel, ...]:
    """Send every file and directory that ``config`` names to ``storage``.

    A file is sent with what belongs to it: the other outputs of the stage that made it, or the
    external data of an ONNX model. A path with nothing there stays as it is: whoever opens it says
    so.

    Raises:
        OutputError: The storage cannot be written.
        SourceError: The external data of an ONNX model are not as they should be.
    """
    named = [found for found in _paths(config, at=()) if found.path.exists()]
    return tuple(_sent(found, storage=storage) for found in named)


def unpack(text: str, parcels: tuple[Parcel, ...], *, storage: Storage, inputs: Path) -> str:
    """The JSON text of a config whose paths are those of this machine.

    Args:
        text: JSON text of the config, with the driver's paths.
        parcels: What `pack` gave.
        storage: Where their contents are.
        inputs: Directory of this machine that keeps them, by content.

    Raises:
        IntegrityError: A file is missing from the storage or is not what its hash says.
    """
    config = record.parse(text)
    for parcel in parcels:
        root = fetched(parcel.files, storage=storage, inputs=inputs)
        path = root / parcel.path if parcel.path else root
        _put(config, parcel.at, parcel.prefix + str(path))
    return json.dumps(config)


def fetched(files: Tree, *, storage: Storage, inputs: Path) -> Path:
    """The directory below ``inputs`` that holds the tree ``files``; fetched unless it is whole.

    Raises:
        IntegrityError: As `unpack`.
    """
    place = inputs / hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    with locked(place.with_suffix(".lock")):
        if not place.is_dir() or tree_sha256(place) != files:
            with fs.staged_directory(place) as staging:
                storage.get_tree(files, to=staging)
    return place


def _paths(value: object, *, at: tuple[str, ...]) -> Iterator[_Named]:
    if isinstance(value, Path):
        yield _Named(at=at, path=value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        yield from _spelled(fields, at=at)
        yield from _paths_below(fields, at=at)
    elif isinstance(value, Mapping):
        yield from _paths_below({str(k): v for k, v in value.items()}, at=at)
    elif isinstance(value, tuple | list):
        yield from _paths_below({str(i): v for i, v in enumerate(value)}, at=at)


def _paths_below(values: Mapping[str, object], *, at: tuple[str, ...]) -> Iterator[_Named]:
    for name, value in values.items():
        yield from _paths(value, at=(*at, name))


def _spelled(fields: Mapping[str, object], *, at: tuple[str, ...]) -> Iterator[_Named]:
    """Text fields that spell the path in another field, as in ``DataConfig``.

    ``data`` has it in ``files`` and any other field NAME in NAME_files; it may be ``form:path``.
    """
    for name, text in fields.items():
        path = fields.get("files" if name == "data" else f"{name}_files")
        if not isinstance(text, str) or not isinstance(path, Path):
            continue
        form, colon, rest = text.partition(":")
        for prefix, spelled in (("", text), (form + colon, rest)):
            if spelled and Path(spelled).resolve() == path.resolve():
                yield _Named(at=(*at, name), path=path, prefix=prefix)
                break


def _sent(named: _Named, *, storage: Storage) -> Parcel:
    root, files = _tree_of(named.path)
    storage.put_tree(root, files=files)
    path = "" if named.path == root else named.path.relative_to(root).as_posix()
    return Parcel(at=named.at, prefix=named.prefix, files=files, path=path)


def _tree_of(path: Path) -> tuple[Path, Tree]:
    if path.is_dir():
        return path, tree_sha256(path)
    outputs = _outputs_around(path)
    if outputs is not None:
        return outputs, tree_sha256(outputs)
    together = [path]
    if path.suffix == ".onnx":
        status = path.stat()
        together += _external_data(path, status.st_size, status.st_mtime_ns)
    return path.parent, {
        file.relative_to(path.parent).as_posix(): file_sha256(file) for file in sorted(together)
    }


def _outputs_around(path: Path) -> Path | None:
    """The outputs of the stage that made ``path``; None when it is no stage's."""
    around = (parent for parent in path.parents if parent.name == "files")
    return next((p for p in around if (p.parent / "record.json").is_file()), None)


@functools.lru_cache(maxsize=256)
def _external_data(path: Path, _size: int, _mtime_ns: int) -> tuple[Path, ...]:
    onnx: Any = extras.require("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # noqa: BLE001  protobuf raises what it likes; the stage says what it is
        return ()
    scopes = external.locate(path, model)
    places = {place.file for scope in scopes for _, place in scope.held if place is not None}
    folder = path.parent
    if not all(file.is_relative_to(folder) for file in places):
        raise SourceError(f"{path}: its external data lie outside its folder")
    return tuple(sorted(places))


def _put(config: record.Json, at: tuple[str, ...], path: str) -> None:
    """Set the value that the keys and indices ``at`` lead to."""
    *way, last = at
    for key in way:
        config = config[int(key)] if isinstance(config, list) else _entry(config, key)
    if isinstance(config, list):
        config[int(last)] = path
    elif isinstance(config, dict):
        config[last] = path


def _entry(config: record.Json, key: str) -> record.Json:
    if not isinstance(config, dict) or key not in config:
        raise IntegrityError(f"a parcel is for {key!r}, which the config does not have")
    return config[key]
