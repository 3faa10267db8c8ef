"""Runtimes by name."""

from __future__ import annotations

from typing import cast

from equipoise.registry import Registry
from equipoise.runtimes.protocol import Builder, SessionOpener

_FOLDERS = ("onnxruntime", "openvino", "reference", "null")

BUILDERS = Registry(
    kind="runtime",
    group="equipoise.builders",
    builtin={name: f"equipoise.runtimes.{name}.builder:BUILDER" for name in _FOLDERS},
)
SESSIONS = Registry(
    kind="runtime",
    group="equipoise.sessions",
    builtin={name: f"equipoise.runtimes.{name}.session:open_session" for name in _FOLDERS},
)


def builder(name: str) -> Builder:
    """The builder of the runtime ``name``. Raises UsageError when there is none."""
    return cast("Builder", BUILDERS.get(name))


def session_opener(name: str) -> SessionOpener:
    """The function that opens an engine of the runtime ``name``."""
    return cast("SessionOpener", SESSIONS.get(name))
