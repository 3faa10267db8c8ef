"""A model and what is known of it, into the directory that a user named."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from equipoise import fs
from equipoise.compression.stages import MODEL
from equipoise.sources.source import Source, path_of

RESULTS: Final = "results.json"
CHECKPOINTS: Final = "checkpoints"
"""Beside them while training runs, where the user names no other place."""


def publish(result: object, model: Source | None, *, output: Path) -> None:
    """Write ``model/`` and ``results.json``; what stood there before stays whole until then.

    Checkpoints in ``output`` have done their work and go.

    Args:
        result: Becomes ``results.json``.
        model: A source that is a directory; None leaves none, not one of an earlier run either.
        output: The directory.

    Raises:
        OutputError: It cannot be written.
    """
    with fs.staged_directory(output / ".next") as staging:
        fs.write_json(staging / RESULTS, result)
        if model is not None:
            fs.copy_tree(path_of(model), staging / MODEL)
    for name in (RESULTS,) if model is None else (MODEL, RESULTS):
        fs.move_into_place(output / ".next" / name, output / name)
    if model is None:
        fs.remove(output / MODEL)
    fs.remove(output / ".next")
    fs.remove(output / CHECKPOINTS)
