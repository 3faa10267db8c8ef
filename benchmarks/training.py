"""What a step of the training loop costs over bare PyTorch, and what a second process brings.

    python benchmarks/training.py --output RECORD.json [--rounds 20] [--steps 10] [--runs 3]

Step time: the loop (Accelerate, batches from disk, global loss, history) over a loop of PyTorch
alone that runs the same batches, which it has as tensors already, with the same loss, clipping,
fused AdamW and schedule. Blocks of steps in turn, the first of each pair changing; one thread.
Two processes: samples per second of training on two processes of one thread over one process of
one thread at the same batch, runs in turn. On a BERT of the size of MiniLM-L6 with random weights,
on the 18-layer residual network of ``_resnet.py``, and on a CNN of 5,000 parameters, which shows
what a step costs beside its computation. The time of evaluations, of checkpoints and of starting is
in neither. Times mean nothing while something else computes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from equipoise import fs
from equipoise.compress.batches import Samples, batches_of
from equipoise.compress.checkpoints import Checkpoints
from equipoise.compress.distributed import accelerator, assemble, placed
from equipoise.compress.evaluation import Validator
from equipoise.compress.loop import Loop
from equipoise.compress.objective.objectives import build_objectives
from equipoise.compress.objective.task_losses import Kind
from equipoise.compress.optimization import rate
from equipoise.compress.settings import TrainSettings
from equipoise.compress.train import TrainConfig, train
from equipoise.data.metrics import get_metric
from equipoise.data.store import write_rows
from equipoise.measure.interval import Interval, median_interval
from equipoise.sources.source import parse_source
from equipoise.sources.torch_model import load_module
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine

VERSIONS = ("equipoise", "torch", "accelerate", "transformers", "numpy")
CLASSES = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its samples, and how it is trained.

    Attributes:
        name: ``bert``, ``resnet`` or ``cnn``.
        inputs: Names of the inputs.
        batch: Samples per step.
        kind: Of the loss.
        size: Tokens of a sentence, or the side of a picture.
        factory: What builds it; empty for a transformers directory.
    """

    name: str
    inputs: tuple[str, ...]
    batch: int
    kind: Kind
    size: int
    factory: str = ""


CASES = (
    Case(
        name="bert",
        inputs=("input_ids", "attention_mask"),
        batch=32,
        kind="token-classification",
        size=64,
    ),
    Case(
        name="resnet",
        inputs=("image",),
        batch=64,
        kind="classification",
        size=28,
        factory="_resnet:build",
    ),
    Case(
        name="cnn",
        inputs=("pixel_values",),
        batch=64,
        kind="classification",
        size=28,
        factory="training:cnn",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Time of a step beside bare PyTorch.

    Attributes:
        case: Model.
        batch: Samples per step.
        parameters: Of the model.
        steps: Steps of each that were timed.
        ours_ms: Median of ours.
        bare_ms: Median of the other.
        ratio: Ours over the other, median over pairs of blocks, with its confidence interval.
        loss_difference: Largest difference of the losses of the two in the first block; they are
            the same work when it is rounding.
    """

    case: str
    batch: int
    parameters: int
    steps: int
    ours_ms: float
    bare_ms: float
    ratio: Interval
    loss_difference: float


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Throughput of two processes, one thread each.

    Attributes:
        case: Model.
        batch: Samples per step, over all processes.
        runs: Runs of each.
        one: Samples per second of one process, median of the runs.
        two: Of two processes.
        ratio: Two over one.
    """

    case: str
    batch: int
    runs: int
    one: float
    two: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """All figures, and where they were measured."""

    machine: Machine
    versions: dict[str, str]
    steps: tuple[Step, ...]
    scaling: tuple[Scaling, ...]


def cnn() -> Any:
    """Two convolutions with batch normalisation, for 28 by 28 pictures."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, CLASSES),
    )


def bert(directory: Path) -> None:
    """A transformers directory of the size of MiniLM-L6, with random weights."""
    import torch
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=CLASSES,
    )
    BertForTokenClassification(config).save_pretrained(directory)


def prepare(case: Case, folder: Path, *, samples: int) -> Path:
    """Random samples of a case, and its model in ``folder/model``."""
    import safetensors.torch

    random = np.random.default_rng(0)
    place = folder / case.name
    shape = (1, 1, case.size, case.size) if case.factory else (1, case.size)
    for part, count in (("training", samples), ("validation", 2)):
        if case.factory:
            rows = [{case.inputs[0]: random.random(shape, np.float32)} for _ in range(count)]
            labels = list(random.integers(0, CLASSES, count))
        else:
            tokens = [random.integers(1, 30_000, shape) for _ in range(count)]
            rows = [{"input_ids": t, "attention_mask": np.ones_like(t)} for t in tokens]
            labels = [random.integers(0, CLASSES, case.size) for _ in range(count)]
        write_rows(place / part, rows)
        write_rows(place / f"{part}_labels", ({"label": np.asarray(x)} for x in labels))
    if case.factory:
        module, _, name = case.factory.partition(":")
        built = getattr(importlib.import_module(module), name)()
        safetensors.torch.save_file(built.state_dict(), place / "model.safetensors")
    else:
        bert(place / "model")
    return place


def config_of(case: Case, place: Path, *, steps: int, processes: int = 1) -> TrainConfig:
    """A training of so many steps, evaluated at both ends."""
    if case.factory:
        weights, form = place / "model.safetensors", f"module:{case.factory}"
        source = parse_source(form, weights=weights, task="image-classification")
    else:
        source = parse_source(str(place / "model"))
    return TrainConfig(
        student=source,
        teacher=None,
        data=place,
        names=case.inputs,
        metric="accuracy",
        label_names=(),
        settings=TrainSettings(epochs=steps, batch_size=case.batch, evaluate_every=0.0),
        processes=processes,
        threads=1,
        checkpoints=place / "checkpoints",
    )


def samples_of(case: Case, place: Path, part: str = "training") -> Samples:
    """The samples of a part."""
    return Samples(place / part, names=case.inputs, labels=place / f"{part}_labels")


Block = Callable[[], tuple[list[float], list[float]]]
"""Runs a block of steps; gives seconds and losses of each."""


@contextlib.contextmanager
def ours(case: Case, config: TrainConfig, *, steps: int) -> Iterator[Block]:
    """Blocks of our loop, each with new checkpoints and an optimiser that goes on."""
    samples = samples_of(case, config.data)
    epochs = steps * case.batch / len(samples)
    settings = dataclasses.replace(config.settings, epochs=epochs)
    with accelerator(settings) as accelerate, tempfile.TemporaryDirectory() as folder:
        objectives = build_objectives(
            load_module(config.student),
            teacher=None,
            kind=case.kind,
            settings=settings.objective,
            names=case.inputs,
            batch=placed(samples.batch(np.arange(2)), device=accelerate.device),
        )
        assembled = assemble(
            objectives, names=case.inputs, settings=settings, accelerator=accelerate
        )
        numbers = iter(range(1_000_000))

        def block() -> tuple[list[float], list[float]]:
            validator = Validator(
                samples_of(case, config.data, "validation"),
                metric=get_metric("accuracy", labels=()),
                batch_size=2,
                rank=0,
                world=1,
                device=accelerate.device,
                reference=None,
            )
            place = Path(folder) / str(next(numbers))
            found = Loop(
                assembled,
                settings=settings,
                samples=samples,
                validator=validator,
                checkpoints=Checkpoints(place),
            ).run()
            fs.remove(place)
            return list(found.step_seconds), list(found.losses)

        yield block


def bare(case: Case, config: TrainConfig, *, steps: int) -> Block:
    """Blocks of PyTorch alone, on tensors in memory."""
    import torch

    settings, samples = config.settings, samples_of(case, config.data)
    model = load_module(config.student)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    order = batches_of(samples.lengths, batch_size=case.batch, seed=0, epoch=0)[:steps]
    cpu = torch.device("cpu")
    batches = [placed(samples.batch(indices), device=cpu) for indices in order]

    def block() -> tuple[list[float], list[float]]:
        seconds, losses = [], []
        for step, batch in enumerate(batches):
            begin = perf_counter()
            found = model(*(batch[name] for name in case.inputs))
            logits = found if case.factory else found.logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, batch["label"].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps=steps, settings=settings)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(perf_counter() - begin)
        return seconds, losses

    return block


def step_time(case: Case, place: Path, *, rounds: int, steps: int) -> Step:
    """Blocks of both in turn."""
    config = config_of(case, place, steps=1)
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    ratios, first = [], {}
    with ours(case, config, steps=steps) as mine:
        calls = {"ours": mine, "bare": bare(case, config, steps=steps)}
        for number in range(-1, rounds):  # one to warm up
            medians = {}
            for name in calls if number % 2 else reversed(calls):
                seconds, losses = calls[name]()
                first.setdefault(name, losses)
                medians[name] = float(np.median(seconds))
                times[name] += seconds if number >= 0 else []
            ratios += [medians["ours"] / medians["bare"]] if number >= 0 else []
    return Step(
        case=case.name,
        batch=case.batch,
        parameters=sum(p.numel() for p in load_module(config.student).parameters()),
        steps=len(times["ours"]),
        ours_ms=float(np.median(times["ours"])) * 1e3,
        bare_ms=float(np.median(times["bare"])) * 1e3,
        ratio=median_interval(np.array(ratios)),
        loss_difference=float(np.abs(np.subtract(first["ours"], first["bare"])).max()),
    )


def scaling(case: Case, place: Path, *, runs: int, steps: int) -> Scaling:
    """Whole trainings by one process and by two, in turn."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    samples = len(samples_of(case, place))
    for _ in range(runs):
        for processes, measured in rates.items():
            config = config_of(case, place, steps=1, processes=processes)
            epochs = steps * case.batch / samples
            settings = dataclasses.replace(config.settings, epochs=epochs)
            with tempfile.TemporaryDirectory() as folder:
                found = train(
                    dataclasses.replace(
                        config, settings=settings, checkpoints=Path(folder) / "checkpoints"
                    ),
                    output=Path(folder),
                )
            measured.append(case.batch / found.step_seconds)
    one, two = (float(np.median(rates[processes])) for processes in (1, 2))
    return Scaling(case=case.name, batch=case.batch, runs=runs, one=one, two=two, ratio=two / one)


def measure(options: argparse.Namespace, folder: Path) -> Record:
    """All figures."""
    import torch

    torch.set_num_threads(1)
    steps, scaled = [], []
    for case in CASES:
        place = prepare(case, folder, samples=options.steps * case.batch)
        steps.append(step_time(case, place, rounds=options.rounds, steps=options.steps))
        scaled.append(scaling(case, place, runs=options.runs, steps=2 * options.steps))
    return Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        steps=tuple(steps),
        scaling=tuple(scaled),
    )


def main() -> int:
    """Measure, write the record, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    output = options.output.resolve()
    os.chdir(Path(__file__).parent)  # children find the models of this file from there
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    fs.write_json(output, found)
    sys.stdout.write(output.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
