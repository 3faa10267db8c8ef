"""Which data, as a user says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equipoise.data.preprocessing import ImagePreprocessing


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Calibration and evaluation data of a run.

    Attributes:
        data: Evaluation data: ``digits``, or a file or directory, ``form:path`` to be explicit.
        files: The file or directory inside ``data``, so that its content counts in cache keys.
        calibration: Calibration data in the same words; None sets a part of ``data`` aside.
        calibration_files: The file or directory inside ``calibration``.
        task: What the model is for, such as ``token-classification``; may be empty.
        tokenizer: ``tokenizer.json`` for text.
        labels: Class names in index order; may be empty.
        samples: Evaluate on the first so many samples only.
        calibration_samples: Number of calibration samples.
        max_length: Most tokens per text.
        accepted: Inputs that the model takes; empty when that is not known. Token types that it
            does not take are left out.
        labelled: Whether labels are needed; calibration alone needs none.
        preprocessing: What pictures go through.
        input_name: Input that pictures go to.
        seed: Of the split.
        for_training: Prepare training and validation samples too; None where the data has a
            training part of its own alone, so that no sample is taken from what judges.
        train: Training data in the same words; None takes the training part that ``data`` has, or
            cuts ``data`` into parts.
        train_files: The file or directory inside ``train``.
        validation: Data to decide by while training; None takes a part of the training data.
        validation_files: The file or directory inside ``validation``.
        training_samples: Train on so many samples only.
        validation_samples: Most validation samples.
    """

    data: str
    files: Path | None = None
    calibration: str | None = None
    calibration_files: Path | None = None
    task: str = ""
    tokenizer: Path | None = None
    labels: tuple[str, ...] = ()
    samples: int | None = None
    calibration_samples: int = 128
    max_length: int = 512
    accepted: tuple[str, ...] = ()
    labelled: bool = True
    preprocessing: ImagePreprocessing | None = None
    input_name: str = ""
    seed: int = 0
    for_training: bool | None = False
    train: str | None = None
    train_files: Path | None = None
    validation: str | None = None
    validation_files: Path | None = None
    training_samples: int | None = None
    validation_samples: int = 2000
