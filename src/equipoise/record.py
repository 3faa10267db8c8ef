"""Frozen dataclasses to JSON and back, strictly: one mechanism for configs, records and manifests.

It lives in layer 0 and uses the standard library alone, because the device that runs a bundle has
to read a manifest with nothing else installed. Allowed field types: ``str``, ``int``, ``float``,
``bool``, ``None``, ``Path``, ``Literal``, ``tuple[X, ...]``, ``dict[str, X]``, other dataclasses,
and unions of these. A union of dataclasses is told apart by a field ``kind: Literal[...]``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from equipoise.errors import EquipoiseError, RecipeError

T = TypeVar("T")
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def to_json(value: object) -> Json:
    """The JSON form of a dataclass or of any allowed field value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form here")


def dumps(value: object) -> str:
    """Canonical JSON text: sorted keys, two spaces, no NaN."""
    return json.dumps(to_json(value), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """JSON readers keep the last of two equal keys; a manifest with two answers is refused."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return dict(pairs)


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not a number that JSON allows")


def parse(text: str) -> Json:
    """JSON text to plain values; duplicate keys, NaN and infinity are refused.

    Raises:
        ValueError: The text is not such JSON.
    """
    try:
        parsed: Json = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    return parsed


def loads(cls: type[T], text: str, *, where: str, error: type[EquipoiseError] = RecipeError) -> T:
    """Read a dataclass from JSON text.

    Args:
        cls: The dataclass to build.
        text: JSON text.
        where: Name of the file for messages.
        error: Class to raise.

    Raises:
        EquipoiseError: As ``error``, when the text is no JSON, a key is unknown (the nearest known
            key is named), one is missing, or a value has the wrong type.
    """
    try:
        return from_json(cls, parse(text))
    except (ValueError, KeyError, TypeError) as cause:
        raise error(f"{where}: {cause}") from cause


def from_json(cls: type[T], data: Json) -> T:
    """Build ``cls`` from plain JSON values. Raises ValueError naming the path of what is wrong."""
    value: T = _convert(cls, data, path=cls.__name__)
    return value


def _convert(kind: Any, data: Json, *, path: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, path=path)
    if origin in (Union, types.UnionType):
        return _union(typing.get_args(kind), data, path=path)
    if origin is tuple:
        return _tuple(typing.get_args(kind), data, path=path)
    if origin is dict:
        _require(isinstance(data, dict), dict, data, path)
        item = typing.get_args(kind)[1]
        return {k: _convert(item, v, path=f"{path}.{k}") for k, v in data.items()}  # type: ignore[union-attr]
    if origin is Literal:
        if data not in typing.get_args(kind):
            raise ValueError(f"{path}: {data!r} is not one of {list(typing.get_args(kind))}")
        return data
    return _scalar(kind, data, path=path)


def _scalar(kind: Any, data: Json, *, path: str) -> Any:
    if kind is Path:
        _require(isinstance(data, str), str, data, path)
        return Path(str(data))
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        try:
            number = float(data)
        except OverflowError:  # an integer beyond the largest float
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{path}: {data!r:.60} is not finite")
        return number
    if kind in (type(None), None):
        _require(data is None, type(None), data, path)
        return None
    exact = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    _require(exact, kind, data, path)
    return data


def _require(condition: object, expected: type, data: Json, path: str) -> None:
    if not condition:
        raise ValueError(f"{path}: expected {expected.__name__}, got {data!r:.60}")


def _tuple(args: tuple[Any, ...], data: Json, *, path: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a list, got {data!r:.60}")
    kinds = [args[0]] * len(data) if len(args) == 2 and args[1] is Ellipsis else list(args)
    if len(kinds) != len(data):
        raise ValueError(f"{path}: expected {len(kinds)} items, got {len(data)}")
    return tuple(
        _convert(k, v, path=f"{path}[{i}]")
        for i, (k, v) in enumerate(zip(kinds, data, strict=True))
    )


def _union(args: tuple[Any, ...], data: Json, *, path: str) -> Any:
    if data is None and type(None) in args:
        return None
    options = [a for a in args if a is not type(None)]
    if len(options) == 1:  # there is nothing to tell apart, and a field ``kind`` may be any
        return _convert(options[0], data, path=path)
    if isinstance(data, dict) and "kind" in data:
        tagged = [a for a in options if dataclasses.is_dataclass(a) and _tag(a) == data["kind"]]
        if not tagged:
            raise ValueError(f"{path}.kind: {data['kind']!r} is not one of {_tags(options)}")
        return _convert(tagged[0], data, path=path)
    problems = []
    for option in options:
        try:
            return _convert(option, data, path=path)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(problems[0] if len(problems) == 1 else f"{path}: {data!r:.60} fits no form")


def _tag(cls: Any) -> object:
    return next((f.default for f in dataclasses.fields(cls) if f.name == "kind"), None)


def _tags(options: list[Any]) -> list[object]:
    return [_tag(a) for a in options if dataclasses.is_dataclass(a)]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _dataclass(cls: Any, data: Json, *, path: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected an object, got {data!r:.60}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ValueError(f"{path}: {unknown_key(key, fields)}")
    missing = [n for n, f in fields.items() if n not in data and _required(f)]
    if missing:
        raise ValueError(f"{path}: missing key {missing[0]!r}")
    hints = _hints(cls)
    return cls(**{k: _convert(hints[k], v, path=f"{path}.{k}") for k, v in data.items()})


def unknown_key(key: str, known: Collection[str]) -> str:
    """What to say of a key that is not among the ``known``."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
