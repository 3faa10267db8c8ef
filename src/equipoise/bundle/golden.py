"""Golden vectors: real inputs, what the engine gave for them, and what the reference gave."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from equipoise.errors import IntegrityError
from equipoise.spec import Array

GOLDEN_FILE: Final = "golden.npz"
_PARTS: Final = ("input", "output", "reference")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One real sample.

    Attributes:
        inputs: Input arrays by name.
        outputs: What the engine gave where it was made.
        reference: What PyTorch, or the float source, gave.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    reference: Mapping[str, Array]


def golden_bytes(vectors: Sequence[Golden]) -> bytes:
    """The vectors as the bytes of an ``.npz`` with keys ``<index>/<part>/<name>``."""
    arrays = {
        f"{index}/{part}/{name}": array
        for index, vector in enumerate(vectors)
        for part, named in zip(
            _PARTS, (vector.inputs, vector.outputs, vector.reference), strict=True
        )
        for name, array in named.items()
    }
    return npz_bytes(arrays)


def npz_bytes(arrays: Mapping[str, Array]) -> bytes:
    """Named arrays as the bytes of an ``.npz`` file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_golden(path: Path) -> tuple[Golden, ...]:
    """Read what :func:`golden_bytes` made.

    Raises:
        IntegrityError: It is no such file.
    """
    samples: dict[int, dict[str, dict[str, Array]]] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                index, part, name = key.split("/", 2)
                sample = samples.setdefault(int(index), {p: {} for p in _PARTS})
                sample[part][name] = _array(archive[key], key)
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types on damaged files
        raise IntegrityError(f"{path} holds no golden vectors: {error}") from error
    return tuple(
        Golden(inputs=s["input"], outputs=s["output"], reference=s["reference"])
        for _, s in sorted(samples.items())
    )


def _array(value: object, key: str) -> Array:
    """``value``, which NumPy gives as bytes where a member of the archive is no array."""
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{key} is no array")
    return value
