"""The structure of an ONNX file without its weights, in memory that does not grow with them.

A protobuf message is a row of fields, each with its length before it, so large weights can be
stepped over. The file is mapped, and pages that nobody looks at are never read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from equipoise import extras
from equipoise.errors import SourceError

_LARGE_BYTES: Final = 4096
"""Smaller constants are kept: shape inference reads shapes and axes from them."""

_INITIALIZERS: Final[Mapping[int, Any]] = {7: {5: {}}}
"""Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer."""

_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5


def load_structure(path: Path) -> Any:
    """Read an ``onnx.ModelProto`` whose large initializers have a type and a shape but no values.

    Raises:
        SourceError: There is no such file, or it is no ONNX model.
    """
    onnx = extras.require("onnx")
    if not path.is_file():
        raise SourceError(f"no such ONNX file: {path}")
    try:
        with path.open("rb") as file, _mapped(file) as data:
            model = onnx.ModelProto.FromString(_light(data, 0, len(data), inner=_INITIALIZERS))
    except Exception as error:  # protobuf's own class, or a length beyond the end
        raise _not_onnx(path, error) from error
    if not model.graph.output:
        raise _not_onnx(path, "its graph has no output")
    return model


def _mapped(file: Any) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _not_onnx(path: Path, why: object) -> SourceError:
    return SourceError(
        f"{path} is not a valid ONNX model: {why}", hint="Give a file that onnx.checker accepts."
    )


def _light(data: mmap.mmap, start: int, end: int, *, inner: Mapping[int, Any]) -> bytes:
    """The message at ``start:end``; ``inner`` leads to messages that lose their large fields."""
    parts = []
    for number, begin, body, after in _fields(data, start, end=end):
        if number in inner:
            message = _light(data, body, after, inner=inner[number])
            parts += [_varint(number << 3 | _LENGTH), _varint(len(message)), message]
        elif inner or after - body < _LARGE_BYTES:
            parts.append(data[begin:after])
    return b"".join(parts)


def _fields(data: mmap.mmap, start: int, *, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, begin, begin of the content, and end of each field."""
    while start < end:
        tag, body = _read_varint(data, start)
        if tag & 7 == _LENGTH:
            length, body = _read_varint(data, body)
        else:
            length = _fixed_length(data, tag & 7, body)
        if body + length > end:
            raise ValueError(f"a field of {length} bytes at byte {start} ends beyond its message")
        yield tag >> 3, start, body, body + length
        start = body + length


def _fixed_length(data: mmap.mmap, kind: int, body: int) -> int:
    if kind == _VARINT:
        return _read_varint(data, body)[1] - body
    lengths = {_FIXED_64: 8, _FIXED_32: 4}
    if kind not in lengths:
        raise ValueError(f"no protobuf field has the wire type {kind}")
    return lengths[kind]


def _read_varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    """An integer of seven bits to a byte, lowest first, and where it ends."""
    value = 0
    for place in range(10):
        byte = data[start + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, start + place + 1
    raise ValueError(f"a number at byte {start} does not end")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
