"""Recipe files: what ``equipoise tune`` was asked, in its own words, and the recipe it found.

format = 1

[tune]                      # the options of the command
source = "model/"
data = "validation.jsonl"
max-drop = 0.01

[recipe]                    # made as it stands; without this table the space is searched
name = "int8-static"
...
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, record
from equipoise.errors import IncompatibleError, RecipeError
from equipoise.recipe import Recipe

_FORMAT: Final = 1
_TABLES: Final = ("format", "tune", "recipe")
_NONE: Final = "none"
"""TOML has no null."""

Word = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """The content of a recipe file.

    Attributes:
        words: Option of ``tune``, without its dashes -> value.
        recipe: What to make; None to search.
    """

    words: Mapping[str, Word] = field(default_factory=dict)
    recipe: Recipe | None = None


def write_recipe_file(content: RecipeFile, path: Path) -> None:
    """Write ``content``.

    Raises:
        OutputError: ``path`` cannot be written.
        MissingExtraError: tomli-w is not installed.
    """
    tables: dict[str, Any] = {"format": _FORMAT, "tune": dict(content.words)}
    if content.recipe is not None:
        tables["recipe"] = _without_null(record.to_json(content.recipe))
    text = extras.require("tomli_w").dumps(tables)
    fs.write_text(path, f"# Run it with: equipoise tune --recipe {path.name} --output DIR\n{text}")


def read_recipe_file(path: Path, *, options: Collection[str]) -> RecipeFile:
    """Read a recipe file; what it does not know it refuses.

    Args:
        path: The file.
        options: The options that ``tune`` has, without their dashes.

    Raises:
        RecipeError: There is no such file, it is no TOML, or a key or a value in it is not known.
        IncompatibleError: It is of a later format.
    """
    try:
        tables = tomllib.loads(fs.read_text(path, error=RecipeError))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is no TOML: {error}") from error
    _check_keys(tables, _TABLES, where=str(path))
    _check_format(tables.get("format"), path)
    words = tables.get("tune", {})
    if not isinstance(words, dict):
        raise RecipeError(f"{path}: 'tune' is a table of options")
    _check_keys(words, options, where=f"{path}, table 'tune'")
    for key, value in words.items():
        if not isinstance(value, Word):
            raise RecipeError(f"{path}, table 'tune': {key} is {value!r}, no text, number or truth")
    return RecipeFile(words=words, recipe=_recipe(tables.get("recipe"), path))


def _check_format(found: object, path: Path) -> None:
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise RecipeError(f"{path}: format is {found!r}; it has to be {_FORMAT}")
    if found > _FORMAT:
        raise IncompatibleError(
            f"{path} is of format {found}; this version reads up to {_FORMAT}",
            hint="Use the version of equipoise that wrote it.",
        )


def _check_keys(table: Mapping[str, Any], known: Collection[str], *, where: str) -> None:
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}: {record.unknown_key(key, known)}")


def _recipe(table: object, path: Path) -> Recipe | None:
    if table is None:
        return None
    try:
        return record.from_json(Recipe, _with_null(table))
    except ValueError as error:
        raise RecipeError(f"{path}, table 'recipe': {error}") from error


def _without_null(value: record.Json) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return _NONE if value is None else value


def _with_null(value: Any) -> record.Json:
    if isinstance(value, dict):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_null(item) for item in value]
    found: record.Json = None if value == _NONE else value
    return found
