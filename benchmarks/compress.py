"""Pruning, recovery and int8 on top, beside what others would do, on two real tasks.

    python benchmarks/compress.py fashion --teacher FILE --stock FILE --data DIRECTORY
        --output RECORD.json [--work DIRECTORY] [--epochs 3]
    python benchmarks/compress.py ner --teacher DIRECTORY --output RECORD.json

``fashion``: the ResNet-18 of ``_resnet.py`` with the weights that ``_fashion.py`` made, on the idx
files of Fashion-MNIST. Beside ``equipoise prune`` stand torch-pruning used by hand at the same
multiplications (``_by_hand.py``) with the same training, and a stock smaller model: the network at
half the width, trained from the beginning and then beside the teacher like the others.
``ner``: a BERT for CoNLL-2003; beside it every other layer left out by hand, with the same
training. Its vocabulary stays whole: names that no training text has are what the test is about.
Then ``equipoise tune`` makes the int8 engine of what was pruned, from the first recipe of each
kind.

All engines, and PyTorch itself, run in turn in one process, one thread, on real samples; the metric
is on all test samples. Times mean nothing while something else computes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from _by_hand import prune_by_hand
from _cases import CONLL
from _pairs import SETTINGS
from _wheels import fetch

from equipoise import fs
from equipoise.bundle.reading import read_manifest
from equipoise.compress.cutting import Cutting, Pruning
from equipoise.compress.settings import Objective, TrainSettings
from equipoise.compression.compression import Compression
from equipoise.compression.models import Workplace
from equipoise.compression.steps import PruneStep, Side, side_of
from equipoise.data.store import Rows
from equipoise.jobs import make_pipeline
from equipoise.measure.interval import Interval, median_interval
from equipoise.pipeline import Pipeline
from equipoise.pruning import PruneRequest, prune_model
from equipoise.runtimes.onnxruntime.session import open_session
from equipoise.search.budget import Budget
from equipoise.search.goal import Goal
from equipoise.sources.source import Source, parse_source
from equipoise.sources.torch_model import NamedModule, load_module
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine
from equipoise.tuning.config import TuneConfig
from equipoise.tuning.tune import tune

VERSIONS: Final = (
    "equipoise", "torch", "torch-pruning", "transformers", "onnxruntime", "accelerate", "numpy"
)  # fmt: skip
ROUNDS: Final = 60
SAMPLES: Final = 32


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One way to run the model on the test samples.

    Attributes:
        name: Which.
        latency_ms: Median of one inference.
        of_pytorch: Latency over that of the original in eager PyTorch, median of rounds.
        of_float: The same over the original's float engine.
        size_bytes: Of its file or files.
    """

    name: str
    latency_ms: float
    of_pytorch: Interval
    of_float: Interval
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """One task.

    Attributes:
        task: ``fashion`` or ``ner``.
        machine: Where.
        versions: Package -> version.
        metric: Name of the metric.
        evaluation_samples: How many.
        sides: The original, what was pruned, and the others, float engines.
        steps: What pruning tried.
        chosen: The side that was written, which is what is timed as ``pruned``.
        notes: What it noticed.
        int8: What ``tune`` chose for it.
        int8_metric: Its metric.
        int8_drop: Metric of the original minus its, on the same samples.
        timings: All in turn.
    """

    task: str
    machine: Machine
    versions: dict[str, str]
    metric: str
    evaluation_samples: int
    sides: tuple[Side, ...]
    steps: tuple[PruneStep, ...]
    chosen: str
    notes: tuple[str, ...]
    int8: str
    int8_metric: Interval
    int8_drop: float
    timings: tuple[Timing, ...]


# The two tasks, as requests.


def fashion(options: argparse.Namespace) -> PruneRequest:
    """ResNet-18, by channels."""
    recovery = TrainSettings(
        epochs=options.epochs,
        batch_size=128,
        learning_rate=0.02,
        optimizer="sgd",
        weight_decay=5e-4,
        schedule="cosine",
        precision="bfloat16",
        objective=Objective(task=0.5, logits=1.0, temperature=4.0),
    )
    return PruneRequest(
        source="module:_resnet:build",
        weights=options.teacher,
        task="image-classification",
        data=f"idx:{options.data}",
        output=options.work / "pruned",
        threads=1,
        pruning=Pruning(
            speedup=options.speedup,
            max_drop=0.01,
            steps=2,
            step_epochs=1,
            recovery=recovery,
            cutting=Cutting(scope=options.scope),
        ),
        time_limit_s=7200,
    )


def ner(options: argparse.Namespace) -> PruneRequest:
    """MiniLM on CoNLL-2003, by layers and widths."""
    recovery = TrainSettings(
        epochs=options.epochs,
        batch_size=32,
        learning_rate=2e-4,
        objective=Objective(task=0.5, logits=1.0, hidden=0.5),
    )
    return PruneRequest(
        source=str(options.teacher),
        data=str(fetch(CONLL, (".txt",)) / "neuroner/data/conll2003/en"),
        output=options.work / "pruned",
        threads=1,
        pruning=Pruning(
            speedup=options.speedup, max_drop=0.01, steps=1, step_epochs=0.5, recovery=recovery
        ),
        time_limit_s=7200,
    )


# What others would do, with the same training.


def torch_pruning(compression: Compression, request: PruneRequest, pruned: Side) -> Source:
    """By hand, at the multiplications of what was pruned, trained for as many epochs in all."""
    source = compression.pipeline.job.source
    original = compression.engine(source, label="original")
    module = load_module(source)
    rows = Rows(compression.pipeline.evaluation)
    from torch import from_numpy

    example = from_numpy(next(iter(rows[0].values())))
    share = pruned.multiply_accumulates / original.multiply_accumulates
    whole = prune_by_hand(module, example=example, macs=float("inf")).macs_before
    made = prune_by_hand(module, example=example, macs=whole * share)
    return trained(compression, request, made.module, name="by-hand")


def every_other_layer(compression: Compression, request: PruneRequest, pruned: Side) -> Source:  # noqa: ARG001
    """As DistilBERT was begun: every other layer of the teacher."""
    source = compression.pipeline.job.source
    shape = compression.read_layers(source, label="layers").shape
    cut = compression.reduce(source, replace(shape, layers=shape.layers[::2]), label="by hand")
    return trained(compression, request, load_module(cut.source), name="by-hand")


def trained(compression: Compression, request: PruneRequest, module: Any, *, name: str) -> Source:
    """``module`` with the training of all steps and of the last recovery together."""
    from equipoise.sources.saving import save_source

    base = compression.pipeline.job.source
    place = request.output.parent / name
    save_source(module, base=base, directory=place)
    recovery = request.pruning.recovery
    epochs = recovery.epochs + request.pruning.steps * request.pruning.step_epochs
    found = compression.recover(
        parse_source(str(place), task=base.task),
        teacher=base,
        settings=replace(recovery, epochs=epochs),
        workplace=Workplace(checkpoints=request.output.parent / "checkpoints"),
        label=f"{name}: train",
    )
    return found.source


OTHERS: Final[dict[str, Callable[[Compression, PruneRequest, Side], Source]]] = {
    "fashion": torch_pruning,
    "ner": every_other_layer,
}
NAMES: Final = {"fashion": "torch-pruning by hand", "ner": "every other layer by hand"}


def stocks(
    compression: Compression, request: PruneRequest, weights: Path | None
) -> dict[str, Source]:
    """The stock smaller model as it is, and with the training that the pruned one had last."""
    if weights is None:
        return {}
    task = compression.pipeline.job.source.task
    stock = parse_source("module:_resnet:half", weights=weights, task=task)
    found = compression.recover(
        stock,
        teacher=compression.pipeline.job.source,
        settings=request.pruning.recovery,
        workplace=Workplace(checkpoints=request.output.parent / "checkpoints"),
        label="stock: train",
    )
    return {"stock": stock, "stock, trained": found.source}


# Timing.


@dataclass(frozen=True, kw_only=True)
class Runner:
    """One way to run the model, on its own form of the same samples."""

    name: str
    run: Callable[[dict[str, Any]], object]
    samples: list[dict[str, Any]]
    size_bytes: int


def timings(runners: list[Runner]) -> tuple[Timing, ...]:
    """All in turn, round after round; the first is PyTorch, the second the float engine."""
    times = np.array([one_round(runners) for _ in range(ROUNDS + 3)])[3:]
    return tuple(
        Timing(
            name=runner.name,
            latency_ms=float(np.median(times[:, i])),
            of_pytorch=median_interval(times[:, i] / times[:, 0]),
            of_float=median_interval(times[:, i] / times[:, 1]),
            size_bytes=runner.size_bytes,
        )
        for i, runner in enumerate(runners)
    )


def one_round(runners: list[Runner]) -> list[float]:
    """Milliseconds per inference of each."""
    found = []
    for runner in runners:
        begin = time.perf_counter()
        for sample in runner.samples:
            runner.run(sample)
        found.append((time.perf_counter() - begin) * 1e3 / len(runner.samples))
    return found


def runners_of(
    compression: Compression, pruned: Source, *, int8: Path, stack: ExitStack
) -> list[Runner]:
    """PyTorch, the float engines before and after, and the int8 engine."""
    import torch

    torch.set_num_threads(1)
    original = compression.pipeline.job.source
    eager = NamedModule(load_module(original), names=compression.names, source=original.name)
    before, after = (compression.beside(source) for source in (original, pruned))
    engines = {
        "float engine": (before, compression.engine(original, label="original").file),
        "pruned, float": (after, compression.engine(pruned, label="pruned").file),
        "pruned, int8": (after, int8),
    }
    found = [
        Runner(
            name="PyTorch, eager",
            run=eager.run,
            samples=samples_of(before),
            size_bytes=compression.engine(original, label="original").parameters * 4,
        )
    ]
    for name, (pipeline, file) in engines.items():
        session = stack.enter_context(open_session(file, settings=SETTINGS))
        size = file.stat().st_size
        found.append(
            Runner(name=name, run=session.run, samples=samples_of(pipeline), size_bytes=size)
        )
    return found


def samples_of(pipeline: Pipeline) -> list[dict[str, Any]]:
    """The first test samples as this model takes them."""
    rows = Rows(pipeline.evaluation)
    return [rows[i] for i in range(SAMPLES)]


# The whole.


def measure(task: str, request: PruneRequest, *, stock: Path | None) -> Record:
    """Prune, make the others, make int8, and time all."""
    result = prune_model(request)
    compression = Compression(make_pipeline(replace(request, for_training=True)))
    pruned_side = next(side for side in result.sides if side.name == "pruned")
    others = {
        **stocks(compression, request, stock),
        NAMES[task]: OTHERS[task](compression, request, pruned_side),
    }
    original = compression.pipeline.job.source
    sides = [
        *result.sides,
        *(side_of(o, compression, original=original, name=n) for n, o in others.items()),
    ]
    if result.chosen == "original":
        raise SystemExit("nothing was pruned that keeps the metric")
    pruned = parse_source(str(request.output / "model"), task=compression.pipeline.job.source.task)
    tuned = tune(tune_config(request, task=pruned.task))
    chosen = next(c for c in tuned.candidates if c.recipe.name == tuned.chosen)
    assert chosen.measurement is not None
    bundle = request.output.parent / "tuned" / "bundle"
    int8 = bundle / read_manifest(bundle).engines[0].file
    with ExitStack() as stack:
        timed = timings(runners_of(compression, pruned, int8=int8, stack=stack))
    return Record(
        task=task,
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        metric=result.metric,
        evaluation_samples=result.evaluation_samples,
        sides=tuple(sides),
        steps=result.steps,
        chosen=result.chosen,
        notes=result.notes,
        int8=tuned.chosen,
        int8_metric=chosen.measurement.metric,
        int8_drop=sides[0].metric.value - chosen.measurement.metric.value,
        timings=timed,
    )


def tune_config(request: PruneRequest, *, task: str) -> TuneConfig:
    """The model that was pruned, tuned like any other."""
    return TuneConfig(
        source=str(request.output / "model"),
        data=request.data,
        task=task,
        output=request.output.parent / "tuned",
        threads=1,
        goal=Goal(max_drop=0.01),
        budget=Budget(trials=7),
        time_limit_s=7200,
    )


def main() -> None:
    """Measure, write the record, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=sorted(OTHERS))
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--stock", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--speedup", type=float, default=2.5)
    parser.add_argument("--scope", choices=("global", "per-layer"), default="global")
    options = parser.parse_args()
    request = {"fashion": fashion, "ner": ner}[options.task](options)
    record = measure(options.task, request, stock=options.stock)
    fs.write_json(options.output, record)
    for side in record.sides:
        print(
            f"{side.name:28} {side.metric.value:.4f} {side.speedup.value:5.2f}x"
            f" {side.multiply_accumulates:>12,} MACs {side.parameters:>11,} parameters"
        )
    for timing in record.timings:
        print(
            f"{timing.name:28} {timing.latency_ms:.3f} ms  {timing.of_pytorch.value:.3f} of PyTorch"
            f"  {timing.of_float.value:.3f} of float  {timing.size_bytes:,} bytes"
        )


if __name__ == "__main__":
    main()
