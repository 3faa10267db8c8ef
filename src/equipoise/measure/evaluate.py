"""Run an engine over the evaluation samples: its metric, and its parity with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from equipoise import fs, progress
from equipoise.data.metrics import get_metric
from equipoise.data.store import Rows
from equipoise.parity.compare import Comparison, OutputParity
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array

_FILE: Final = "statistics.npy"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate.

    Attributes:
        inputs: Directory of evaluation inputs.
        labels: Directory of labels.
        reference: Directory of reference outputs on the same samples.
        metric: Name of the metric.
        label_names: Names of the classes, in index order; may be empty.
        engine: Engine file; None evaluates the reference outputs themselves.
        runtime: Runtime of the engine.
        threads: Threads per operator.
    """

    inputs: Path
    labels: Path
    reference: Path
    metric: str
    label_names: tuple[str, ...] = ()
    engine: Path | None = None
    runtime: str = "onnxruntime"
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class EvaluateRecord:
    """What the evaluation found; the statistics per sample are in ``statistics.npy``.

    Attributes:
        value: The metric.
        samples: Number of samples.
        report: Per-class table, where the metric has one.
        parity: One entry per output.
    """

    value: float
    samples: int
    report: str
    parity: tuple[OutputParity, ...]


def read_statistics(directory: Path) -> Array:
    """float64 [samples, k]: the metric's statistics of every sample."""
    statistics: Array = np.load(directory / _FILE, allow_pickle=False)
    return statistics


def evaluate(config: EvaluateConfig, *, output: Path) -> EvaluateRecord:
    """Evaluate an engine, or the reference outputs, on labelled samples.

    Raises:
        DataError: Labels do not fit the outputs.
        InputError: Samples do not fit the engine.
        ParityError: An output has another shape than the reference's.
    """
    metric = get_metric(config.metric, labels=config.label_names)
    labels, reference = Rows(config.labels), Rows(config.reference)
    comparison = Comparison()
    statistics, predicted = [], []
    for label, wanted, outputs in zip(labels, reference, _outputs(config), strict=True):
        comparison.add(wanted, outputs)
        statistics.append(metric.statistics(outputs, label["label"], wanted))
        predicted.append((outputs, label["label"]))
    table = np.stack(statistics)
    with fs.replacing(output / _FILE) as path, path.open("wb") as file:
        np.save(file, table)
    return EvaluateRecord(
        value=float(metric.value(table.sum(0))),
        samples=len(table),
        report=metric.report(predicted),
        parity=comparison.result(),
    )


def _outputs(config: EvaluateConfig) -> Iterator[dict[str, Array]]:
    if config.engine is None:
        yield from Rows(config.reference)
        return
    inputs = Rows(config.inputs)
    settings = SessionSettings(threads=config.threads)
    with session_opener(config.runtime)(config.engine, settings=settings) as session:
        for feeds in progress.track(inputs, total=len(inputs)):
            yield session.run(feeds)
