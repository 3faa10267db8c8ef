"""M2: every single bit of a file turned over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.malformed import material
from tests.malformed.counting import Campaign, Case, every_flip


def _case(folder: Path, file: str, subject: str, **more: object) -> Case:
    return Case(name=file, subject=subject, folder=folder, file=file, **{"target": file, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "write", "subject"),
    [
        ("model.onnx", material.write_onnx, "onnx_import"),
        ("w.safetensors", material.write_safetensors, "checkpoint"),
    ],
)
def test_raw_files(
    file: str, write: Callable[[Path], Path], subject: str, campaign: Campaign, tmp_path: Path
) -> None:
    """No file of a user has a hash to be held against: most flips are other numbers, and no crash.

    What is recorded of a source is the SHA-256 of its bytes, which is another one for each.
    """
    write(tmp_path / file)
    flips = every_flip(_case(tmp_path, file, subject, otherwise="recorded"))
    campaign.run(flips, what=f"M2 bit flips, raw {file}", least=8000)


@pytest.mark.parametrize(
    ("runtime", "least"),
    [("onnxruntime", 8000), pytest.param("null", 5000, marks=pytest.mark.slow)],
)
def test_engine_directories(runtime: str, least: int, campaign: Campaign, tmp_path: Path) -> None:
    """Manifest and engine: all refused, and no runtime is asked."""
    engine = material.build_engine(tmp_path, runtime=runtime)
    files = sorted(path.name for path in engine.iterdir())
    flips = [
        flip
        for name in files
        for flip in every_flip(
            _case(tmp_path, f"engine/{name}", "engine", target="engine", codes=(4,))
        )
    ]
    what = f"M2 bit flips, engine directory of {runtime}"
    outcome = campaign.run(flips, what=what, least=least)
    assert outcome.counts["typed"] == outcome.run
