"""The stage that searches training settings: every trial is a training of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from equipoise import fs
from equipoise.compress.settings import TrainSettings
from equipoise.compress.study import Report, StudyResult, StudySettings, search
from equipoise.compress.train import TrainConfig, train
from equipoise.stages import content_sha256


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What to train, and how to search.

    Attributes:
        training: With the settings of the first trial.
        study: How to search.
    """

    training: TrainConfig
    study: StudySettings


def search_settings(config: SearchConfig, *, output: Path) -> StudyResult:  # noqa: ARG001
    """Find training settings; ``output`` stays empty, the record has it all.

    Raises:
        As ``study.search`` and ``train``.
    """

    def run(settings: TrainSettings, report: Report) -> float:
        trial = replace(config.training, settings=settings)
        with fs.scratch_directory() as folder:
            return train(trial, output=folder, on_evaluation=report).best_metric

    study = replace(config.study, question=content_sha256(config.training.data))
    return search(study, base=config.training.settings, run=run)
