"""Runtimes by name."""

from __future__ import annotations

from typing import Final, cast

from equipoise.registry import Registry
from equipoise.runtimes.protocol import Builder, BytesOpener, SessionOpener

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
_FROM_BYTES = Registry(
    kind="runtime",
    group="equipoise.byte_sessions",
    builtin={n: f"equipoise.runtimes.{n}.session:open_bytes" for n in ("onnxruntime", "null")},
)
PACKAGES: Final = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "reference": "onnx",
}
"""Runtime -> the package that its session imports."""


def builder(name: str) -> Builder:
    """The builder of the runtime ``name``. Raises UsageError when there is none."""
    return cast("Builder", BUILDERS.get(name))


def session_opener(name: str) -> SessionOpener:
    """The function that opens an engine of the runtime ``name``."""
    return cast("SessionOpener", SESSIONS.get(name))


def bytes_opener(name: str) -> BytesOpener | None:
    """The function that opens an engine of the runtime ``name`` from bytes, if it has one."""
    if name in _FROM_BYTES.builtin or (name not in _FOLDERS and name in _FROM_BYTES.names()):
        return cast("BytesOpener", _FROM_BYTES.get(name))
    return None


def is_known(name: str) -> bool:
    """Whether there is a runtime ``name``, installed or not."""
    return name in _FOLDERS or name in SESSIONS.names()
