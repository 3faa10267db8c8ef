"""The examples, as a newcomer runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.report.write import read_result

ROOT = Path(__file__).resolve().parents[2]
NER_MODEL = Path(
    os.environ.get("EQUIPOISE_NER_MODEL", ROOT.parent / "shared/models/minilm-conll2003")
)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_digits_train_and_tune(tmp_path: Path) -> None:
    """The digits network learns to 98 %, and an int8 engine faster than float keeps that."""
    weights = tmp_path / "model.safetensors"
    done = run("-m", "examples.digits.train", "--output", weights)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("%")[0]) >= 98
    done = run(
        "-m", "equipoise", "tune", "module:examples.digits.model:build", "--weights", weights,
        "--data", "digits", "--max-drop", "0.01", "--threads", "1", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'equipoise.load("' in done.stdout
    result = read_result(tmp_path / "out/results.json")
    chosen = next(c for c in result.candidates if c.recipe.name == result.chosen)
    assert chosen.recipe.name.startswith("int8-static")
    assert chosen.measurement is not None
    assert chosen.measurement.speedup.low > 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not NER_MODEL.is_dir(), reason="needs minilm-conll2003; see examples/ner")
def test_named_entities_on_400_sentences(tmp_path: Path) -> None:
    """Static int8 is accepted, and a faster engine holds entity F1 within one point."""
    done = run(
        "-m", "examples.ner.run", "--model", NER_MODEL, "--samples", 400, "--budget", "4m",
        "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weighted avg") == 2
    result = read_result(tmp_path / "results.json")
    by_name = {c.recipe.name: c for c in result.candidates}
    assert result.evaluation_samples == 400
    assert by_name["int8-static"].verdict == "accepted"
    chosen = by_name[result.chosen]
    assert chosen.measurement is not None
    assert chosen.measurement.speedup.low > 1
    assert chosen.measurement.drop.value <= 0.01
    assert (tmp_path / "bundle/tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_named_entity_training_learns(tmp_path: Path) -> None:
    """A short training run of the example saves a directory that transformers reads."""
    done = run("-m", "examples.ner.train", "--output", tmp_path, "--sentences", 640, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    first, second = (float(line.split()[-1]) for line in done.stdout.splitlines()[:2])
    assert second < first
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "tokenizer.json").is_file()
