"""Options that come as a dataclass, so that commands which share many say them once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer reads it: a parameter that is a dataclass becomes its fields.

    A field is an option like any parameter: its annotation is the ``typer.Option``, its default
    the default.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    groups = {name: hints[name] for name in parameters if dataclasses.is_dataclass(hints[name])}

    @functools.wraps(command)
    def expanded(*positional: Any, **given: Any) -> None:
        made = {name: _made(group, given) for name, group in groups.items()}
        command(*positional, **given, **made)

    plain = [p.replace(annotation=hints[n]) for n, p in parameters.items() if n not in groups]
    more = [parameter for group in groups.values() for parameter in _parameters(group)]
    ordered = sorted([*plain, *more], key=lambda p: p.default is not inspect.Parameter.empty)
    expanded.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    expanded.__annotations__ = {p.name: p.annotation for p in ordered}
    return expanded


def _made(group: Any, given: dict[str, Any]) -> Any:
    return group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=_default(field),
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    missing = field.default is dataclasses.MISSING
    return inspect.Parameter.empty if missing else field.default
