"""Runtimes by name."""

from __future__ import annotations

from typing import cast

from equipoise.registry import Registry
from equipoise.runtimes.protocol import Builder, SessionOpener

_FOLDERS = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "reference": "reference",
    "null": "null",
}
"""Name of a runtime -> its folder."""

BUILDERS = Registry(
    kind="runtime",
    group="equipoise.builders",
    builtin={n: f"equipoise.runtimes.{f}.builder:BUILDER" for n, f in _FOLDERS.items()},
)
SESSIONS = Registry(
    kind="runtime",
    group="equipoise.sessions",
    builtin={n: f"equipoise.runtimes.{f}.session:open_session" for n, f in _FOLDERS.items()},
)


def builder(name: str) -> Builder:
    """The builder of the runtime ``name``. Raises UsageError when there is none."""
    return cast("Builder", BUILDERS.get(name))


def session_opener(name: str) -> SessionOpener:
    """The function that opens an engine of the runtime ``name``."""
    return cast("SessionOpener", SESSIONS.get(name))
