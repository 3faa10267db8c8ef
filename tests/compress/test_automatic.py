"""How far to prune where nobody says it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from equipoise.compress.settings import TrainSettings
from equipoise.compression.automatic import SPEEDUPS, Automatic, automatic_prunings


def proposed(
    files: Path = Path("nowhere"),
    *,
    budget_s: float = 1800.0,
    samples: int = 14041,
    latency_ms: float = 3.0,
    kind: str = "transformers",
    epochs: float = 3.0,
    threads: int = 2,
) -> Automatic:
    pipeline: Any = SimpleNamespace(
        job=SimpleNamespace(
            source=SimpleNamespace(kind=kind),
            threads=threads,
            machine=SimpleNamespace(cores=2),
        ),
        data=SimpleNamespace(files=files, record=SimpleNamespace(training_samples=samples)),
    )
    return automatic_prunings(
        pipeline,
        budget_s=budget_s,
        latency_ms=latency_ms,
        max_drop=0.02,
        recovery=TrainSettings(epochs=epochs),
    )


@pytest.mark.parametrize(
    ("budget_s", "epochs"), [(1500.0, 2.0), (1000.0, 1.0), (300.0, 0.25), (1e6, 3.0)]
)
def test_the_budget_says_how_long_to_train(budget_s: float, epochs: float) -> None:
    """A sample takes about four inferences; three tenths of the time are for one model."""
    found = proposed(budget_s=budget_s)
    assert tuple(p.speedup for p in found.prunings) == SPEEDUPS
    assert {(p.recovery.epochs, p.max_drop) for p in found.prunings} == {(epochs, 0.02)}
    epochs_of_one = epochs + found.prunings[0].step_epochs
    assert epochs_of_one * 14041 * 4 * 0.003 <= 0.3 * budget_s
    assert f"trained for {epochs:g} epochs" in found.reason


def test_training_takes_all_cores_whatever_the_engine_has() -> None:
    one, two = (proposed(budget_s=1000.0, threads=threads).prunings[0] for threads in (1, 2))
    assert (one.recovery.epochs, two.recovery.epochs) == (2.0, 1.0)


def test_without_labels_the_teacher_alone_is_followed(tmp_path: Path) -> None:
    (unlabelled, *_), usual = proposed(tmp_path).prunings, TrainSettings().objective.task
    assert unlabelled.recovery.objective.task == 0
    (tmp_path / "training_labels").mkdir()
    (labelled, *_) = proposed(tmp_path).prunings
    assert labelled.recovery.objective.task == usual


def test_no_more_epochs_than_a_person_says() -> None:
    assert proposed(epochs=0.5).prunings[0].recovery.epochs == 0.5


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"budget_s": 60.0}, "too long for a budget of 60 s"),
        ({"samples": 0}, "no training part"),
        ({"kind": "onnx"}, "'onnx' cannot be pruned"),
    ],
)
def test_what_speaks_against_it_is_told(changed: dict[str, Any], words: str) -> None:
    found = proposed(**changed)
    assert not found.prunings
    assert words in found.reason
