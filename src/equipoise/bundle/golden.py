"""Golden vectors: real inputs, what the reference gave for them, and what each engine gave."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from equipoise.errors import IntegrityError
from equipoise.spec import Array

GOLDEN_FILE: Final = "golden.npz"
_INPUT: Final = "input"
_REFERENCE: Final = "reference"
_ENGINE: Final = "engine"
_MOST_SAMPLES: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One real sample.

    Attributes:
        inputs: Input arrays by name.
        reference: What PyTorch, or the float source, gave.
        outputs: Engine -> what it gave where the bundle was packed; one that could not be run
            there has none.
    """

    inputs: Mapping[str, Array]
    reference: Mapping[str, Array]
    outputs: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)

    def expected(self, engine: str) -> Mapping[str, Array]:
        """What ``engine`` is compared with: its own outputs, else the reference."""
        return self.outputs.get(engine, self.reference)


def golden_bytes(vectors: Sequence[Golden]) -> bytes:
    """The vectors as the bytes of an ``.npz``.

    Its keys are ``<index>/input/<name>``, ``<index>/reference/<name>`` and
    ``<index>/engine/<engine>/<name>``.
    """
    return npz_bytes(
        {f"{i}/{key}": array for i, vector in enumerate(vectors) for key, array in _keyed(vector)}
    )


def _keyed(vector: Golden) -> Iterator[tuple[str, Array]]:
    yield from ((f"{_INPUT}/{name}", array) for name, array in vector.inputs.items())
    yield from ((f"{_REFERENCE}/{name}", array) for name, array in vector.reference.items())
    for engine, outputs in vector.outputs.items():
        yield from ((f"{_ENGINE}/{engine}/{name}", array) for name, array in outputs.items())


def npz_bytes(arrays: Mapping[str, Array]) -> bytes:
    """Named arrays as the bytes of an ``.npz`` file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def parse_golden(data: bytes, *, where: str) -> tuple[Golden, ...]:
    """Read what :func:`golden_bytes` made.

    Args:
        data: The bytes of the file.
        where: Its name, for messages.

    Raises:
        IntegrityError: It is no such file.
    """
    samples: dict[int, dict[str, dict[str, Array]]] = {}
    try:
        _check_stored(data)
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            for key in archive.files:
                index, part, name = _split(key)
                parts = samples.setdefault(index, {_INPUT: {}, _REFERENCE: {}})
                parts.setdefault(part, {})[name] = _array(archive[key], key)
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types on damaged files
        raise IntegrityError(f"{where} holds no golden vectors: {error}") from error
    return tuple(_golden(parts) for _, parts in sorted(samples.items()))


def _golden(parts: dict[str, dict[str, Array]]) -> Golden:
    return Golden(
        inputs=parts.pop(_INPUT),
        reference=parts.pop(_REFERENCE),
        outputs={part.removeprefix(f"{_ENGINE}/"): named for part, named in parts.items()},
    )


def _split(key: str) -> tuple[int, str, str]:
    """Index, part and name of ``3/input/x`` or ``3/engine/int8/y``."""
    index, part, name = key.split("/", 2)
    if not index.isdigit() or str(int(index)) != index or int(index) >= _MOST_SAMPLES:
        raise ValueError(f"{key!r:.80} has no index")
    if part == _ENGINE:
        engine, name = name.split("/", 1)
        return int(index), f"{_ENGINE}/{engine}", name
    if part not in {_INPUT, _REFERENCE}:
        raise ValueError(f"{key!r:.80} is neither an input, nor a reference, nor of an engine")
    return int(index), part, name


def read_golden(path: Path) -> tuple[Golden, ...]:
    """As :func:`parse_golden`, of a file. Raises IntegrityError when it is no such."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"cannot read {path}: {error.strerror}") from error
    return parse_golden(data, where=str(path))


def _check_stored(data: bytes) -> None:
    """A compressed member could be any size in memory; none is ever written."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > len(data) for m in members):
        raise ValueError("a member of it is compressed")
    if len({m.filename for m in members}) != len(members):
        raise ValueError("two members of it have one name")


def _array(value: object, key: str) -> Array:
    """``value``, which NumPy gives as bytes where a member of the archive is no array."""
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{key} is no array")
    return value
