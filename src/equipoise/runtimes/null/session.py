"""Run nothing: zeros of the right shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise import fs, record
from equipoise.errors import SourceError
from equipoise.runtimes.base import BaseSession
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array, Feeds, TensorSpec


@dataclass(frozen=True, kw_only=True)
class NullEngine:
    """The content of a null engine file."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class NullSession(BaseSession):
    """A session that gives zeros; a dynamic size that no input has is 1."""

    concurrent = True

    def _compute(self, feeds: Feeds) -> dict[str, Array]:
        sizes = {
            dim: size
            for spec in self.inputs
            for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
            if isinstance(dim, str)
        }
        return {spec.name: _zeros(spec, sizes) for spec in self.outputs}


def _zeros(spec: TensorSpec, sizes: dict[str, int]) -> Array:
    shape = [dim if isinstance(dim, int) else sizes.get(dim, 1) for dim in spec.shape]
    return np.zeros(shape, dtype=spec.dtype)


def open_session(engine: Path, *, settings: SessionSettings) -> NullSession:  # noqa: ARG001
    """Open ``engine``; it has no settings. Raises SourceError when it is no null engine."""
    return _opened(fs.read_text(engine, error=SourceError), where=engine)


def open_bytes(
    data: bytes | Path,
    *,
    settings: SessionSettings,  # noqa: ARG001
    where: Path,
) -> NullSession:
    """Open an engine from its content. Raises as :func:`open_session`."""
    content = data if isinstance(data, bytes) else data.read_bytes()
    return _opened(content.decode("utf-8", "replace"), where=where)


def _opened(text: str, *, where: Path) -> NullSession:
    specs = record.loads(NullEngine, text, where=str(where), error=SourceError)
    return NullSession(specs.inputs, specs.outputs)
