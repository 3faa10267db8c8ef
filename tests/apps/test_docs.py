"""Every program of docs/edge.md runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/edge.md").read_text(), re.DOTALL)


def test_there_is_one_for_each_helper() -> None:
    """The test below covers something, and none is longer than ten lines and an import."""
    for name in ("TextClassifier", "TokenClassifier", "ImageClassifier", "Embedder", "load"):
        assert any(f"equipoise.{name}(" in program for program in PROGRAMS)
    assert all(len(program.strip().splitlines()) <= 10 for program in PROGRAMS)


def test_the_programs_run(tmp_path: Path, make, make_picture_bundle, pack) -> None:
    """In one folder with four bundles and a picture; each prints something."""
    place = tmp_path / "place"
    place.mkdir()
    pack(place / "topics", make("class", labels=("a", "b", "c"), task="sequence-classification"))
    pack(place / "names", make("token", labels=("O", "B-PER", "I-PER")))
    pack(place / "vectors", make("hidden", task="text-embedding"))
    pack(place / "photos", make_picture_bundle(task="image-classification"))
    Image.new("RGB", (40, 30), "blue").save(place / "photo.png")
    joined = "\n".join(f"print('program')\n{program}" for program in PROGRAMS)
    done = subprocess.run(
        [sys.executable, "-c", joined], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split("program\n")[1:]
    assert len(printed) == len(PROGRAMS)
    assert all(printed), done.stdout


@pytest.mark.parametrize("limit", ["89,478,485", "a million characters", "a quarter of a window"])
def test_limits_are_those_of_the_code(limit: str) -> None:
    """What the page says in numbers."""
    from equipoise.apps.batches import TextSettings
    from equipoise.apps.tokens import _SHARED
    from equipoise.data.images import MAX_PIXELS

    assert limit in " ".join((ROOT / "docs/edge.md").read_text().split())
    assert f"{MAX_PIXELS:,}" == "89,478,485"
    assert TextSettings().max_characters == 1_000_000
    assert _SHARED == 4
