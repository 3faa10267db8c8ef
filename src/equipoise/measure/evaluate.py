"""Run an engine over the evaluation samples: its metric, and its parity with the reference."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from equipoise import fs, progress
from equipoise.data.metrics import get_metric
from equipoise.data.store import Rows, equal_shapes, stack
from equipoise.parity.compare import Comparison, OutputParity
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array

_FILE: Final = "statistics.npy"
_BATCH: Final = 4


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate.

    Attributes:
        inputs: Directory of evaluation inputs.
        labels: Directory of labels.
        reference: Directory of reference outputs on the same samples.
        metric: Name of the metric.
        label_names: Names of the classes, in index order; may be empty.
        engine: Engine file; None evaluates ``outputs``.
        outputs: Directory of outputs on the same samples; None evaluates the reference outputs
            themselves.
        runtime: Runtime of the engine.
        threads: Threads per operator.
        samples: Evaluate on the first so many samples only.
    """

    inputs: Path
    labels: Path
    reference: Path
    metric: str
    label_names: tuple[str, ...] = ()
    engine: Path | None = None
    outputs: Path | None = None
    runtime: str = "onnxruntime"
    threads: int = 1
    samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateRecord:
    """What the evaluation found; the statistics per sample are in ``statistics.npy``.

    Attributes:
        value: The metric.
        samples: Number of samples.
        report: Per-class table, where the metric has one.
        parity: One entry per output, batch 1.
        batch_parity: The same for a batch of samples of equal shape; empty when there are no two
            such samples or the engine's batch is fixed.
    """

    value: float
    samples: int
    report: str
    parity: tuple[OutputParity, ...]
    batch_parity: tuple[OutputParity, ...]


def read_statistics(directory: Path) -> Array:
    """float64 [samples, k]: the metric's statistics of every sample."""
    statistics: Array = np.load(directory / _FILE, allow_pickle=False)
    return statistics


def evaluate(config: EvaluateConfig, *, output: Path) -> EvaluateRecord:
    """Evaluate an engine, or outputs that are there already, on labelled samples.

    Raises:
        DataError: Labels do not fit the outputs.
        InputError: Samples do not fit the engine.
        ParityError: An output has another shape than the reference's.
    """
    metric = get_metric(config.metric, labels=config.label_names)
    comparison, batched = Comparison(), Comparison()
    statistics, predicted = [], []
    with _runner(config) as run:
        rows = zip(
            Rows(config.inputs),
            Rows(config.labels),
            Rows(config.reference),
            Rows(config.outputs or config.reference),
            strict=True,
        )
        count = min(config.samples or len(Rows(config.inputs)), len(Rows(config.inputs)))
        first = itertools.islice(rows, config.samples)
        for feeds, label, wanted, given in progress.track(first, total=count):
            outputs = run(feeds, given)
            comparison.add(wanted, outputs)
            statistics.append(metric.statistics(outputs, label["label"], wanted))
            predicted.append((outputs, label["label"]))
        _compare_batch(config, run, batched)
    table = np.stack(statistics)
    with fs.replacing(output / _FILE) as path, path.open("wb") as file:
        np.save(file, table)
    return EvaluateRecord(
        value=float(metric.value(table.sum(0))),
        samples=len(table),
        report=metric.report(predicted),
        parity=comparison.result(),
        batch_parity=batched.result(),
    )


_Run = Callable[[dict[str, Array], dict[str, Array]], dict[str, Array]]
"""Takes the inputs of a sample and its given outputs; gives the outputs to judge."""


@contextlib.contextmanager
def _runner(config: EvaluateConfig) -> Iterator[_Run]:
    if config.engine is None:
        yield lambda _feeds, given: given
        return
    settings = SessionSettings(threads=config.threads)
    with session_opener(config.runtime)(config.engine, settings=settings) as session:
        yield lambda feeds, _given: session.run(feeds)


def _compare_batch(config: EvaluateConfig, run: _Run, batched: Comparison) -> None:
    """Compare a batch of samples of equal shape with their references, one below the other."""
    indices = equal_shapes(Rows(config.inputs), most=_BATCH)
    if config.engine is None or len(indices) < 2 or not _batch_is_dynamic(config):
        return
    feeds, wanted = (
        stack(Rows(directory), indices) for directory in (config.inputs, config.reference)
    )
    batched.add(wanted, run(feeds, wanted))


def _batch_is_dynamic(config: EvaluateConfig) -> bool:
    engine = config.engine or Path()
    with session_opener(config.runtime)(engine, settings=SessionSettings()) as session:
        return all(spec.shape and isinstance(spec.shape[0], str) for spec in session.inputs)
