"""How near a latency estimated from measured layers comes to that of the whole model.

    python benchmarks/latency_table.py --output RECORD.json [--table TABLE.md] [--work FOLDER]
        [--precisions float32,int8] [--threads 1] [--models 10]

Two networks with random weights, which latency does not depend on: the 18-layer residual network of
``_resnet.py`` on 1x28x28, and a BERT in the sizes of MiniLM-L6 on 32 and 128 tokens. For each a
table of its layers is measured, and then whole models at random widths, each exported by
``torch.onnx.export``, beside the full one in interleaved rounds. What counts is the error of the
estimated latency: how far it is from the measured one. Measurements of whole models are brought to
the moment of the table by the full model, which is timed with both.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise import fs, record
from equipoise.compress.channels.cutting import cut_
from equipoise.compress.channels.graph import read_graph
from equipoise.compress.channels.structure import structure_of
from equipoise.compress.latency.estimate import Estimator, Measured, Validation, validate
from equipoise.compress.latency.shapes import Precision, shapes_of, working_sets_of
from equipoise.compress.latency.table import LayerTable, TableConfig, measure_layers
from equipoise.compress.structure import Structure
from equipoise.compress.transformer.proof import proven_axes
from equipoise.compress.transformer.structure import transformer_structure
from equipoise.data.store import write_rows
from equipoise.measure.latency import interleave
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.schemes import StaticInt8
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array
from equipoise.stages import default_cache, versions_of
from equipoise.targets.machine import Machine, detect_machine
from equipoise.targets.profile import Int8Scheme
from equipoise.targets.profiles import cpu_scheme

VERSIONS = ("equipoise", "numpy", "onnx", "onnxruntime", "torch", "transformers")
MULTIPLE = 16
LEAST_SHARE = 0.25
CALIBRATION = 4
BLOCK_S = 0.03
BERT_SIZES = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
HEAD_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and what may be narrower in it.

    Attributes:
        name: In the record.
        structure: Its groups and layers.
        feeds: One input.
        build: Makes the PyTorch module at other widths and numbers of layers.
        blocks: Numbers of layers that are tried; None where it has none.
    """

    name: str
    structure: Structure
    feeds: dict[str, Array]
    build: Callable[[Mapping[str, int], int | None], Any]
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network in one precision.

    Attributes:
        case: Network and input.
        precision: Of the weights.
        shapes: Layers in the table.
        rounds: Rounds of the table.
        table_s: Seconds that the table took.
        whole_ms: Latency of the full model.
        rest_ms: The part of it that is not in its layers; negative where they took longer alone.
        validation: Estimates beside measurements.
        spread: Largest over least measured latency among the models.
    """

    case: str
    precision: Precision
    shapes: int
    rounds: int
    table_s: float
    whole_ms: float
    rest_ms: float
    validation: Validation
    spread: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """All networks, and where they were measured."""

    machine: Machine
    versions: dict[str, str]
    threads: int
    rows: tuple[Row, ...]


def cases() -> Iterator[Case]:
    """The networks."""
    yield _resnet()
    for tokens in (32, 128):
        yield _bert(tokens)


def _resnet() -> Case:
    import _resnet
    import torch

    feeds = {"image": np.random.default_rng(0).random((1, 1, 28, 28), dtype=np.float32)}
    tensors = [torch.from_numpy(feeds["image"])]

    def graph(module: Any) -> Any:
        return read_graph(module, names=("image",), tensors=tensors, source="_resnet")

    def build(widths: Mapping[str, int], _blocks: int | None) -> Any:
        module = _resnet.build().eval()
        found = graph(module)
        full = {coupling.name: coupling.width for coupling in found.couplings}
        kept = {name: np.arange(width) < widths.get(name, width) for name, width in full.items()}
        cut_(module, found.couplings, kept)
        return module

    module = _resnet.build().eval()
    found = graph(module)
    scores = {coupling.name: np.ones(coupling.width) for coupling in found.couplings}
    structure = structure_of(module, found, scores=scores, multiple=MULTIPLE)
    return Case(name="ResNet-18 1x28x28", structure=structure, feeds=feeds, build=build)


def _bert(tokens: int) -> Case:
    import torch

    def build(widths: Mapping[str, int], blocks: int | None) -> Any:
        import transformers

        hidden = widths.get("hidden", BERT_SIZES["hidden_size"])
        config = transformers.BertConfig(
            hidden_size=hidden,
            num_attention_heads=hidden // HEAD_SIZE,
            intermediate_size=widths.get("intermediate", BERT_SIZES["intermediate_size"]),
            num_hidden_layers=blocks or BERT_SIZES["num_hidden_layers"],
            num_labels=9,
        )
        return transformers.BertForTokenClassification(config).eval()

    module = build({}, None)
    axes = proven_axes(module)
    scores = {
        (width, layer): torch.ones(BERT_SIZES[size])
        for width, size in (("hidden", "hidden_size"), ("intermediate", "intermediate_size"))
        for layer in ([-1] if width == "hidden" else range(BERT_SIZES["num_hidden_layers"]))
    }
    structure = transformer_structure(module, axes, scores=scores, sequence=tokens)
    ids = np.random.default_rng(0).integers(5, 20000, size=(1, tokens))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return Case(
        name=f"MiniLM-L6, {tokens} tokens",
        structure=structure,
        feeds=feeds,
        build=build,
        blocks=tuple(range(2, BERT_SIZES["num_hidden_layers"] + 1)),
    )


def assignments(case: Case, count: int) -> Iterator[tuple[dict[str, int], int | None]]:
    """Widths and numbers of layers, drawn alike each time."""
    draw = random.Random(0)
    for _ in range(count):
        widths = {}
        for group in case.structure.groups:
            step = max(group.multiple, MULTIPLE if group.width >= 4 * MULTIPLE else 1)
            least = max(1, round(LEAST_SHARE * group.width / step))
            widths[group.name] = step * draw.randint(least, group.width // step)
        yield widths, draw.choice(case.blocks) if case.blocks else None


def export(case: Case, path: Path, widths: Mapping[str, int], blocks: int | None) -> None:
    """Write the ONNX file of a network, dynamic in the batch and the sequence."""
    import torch

    torch.manual_seed(0)
    module = case.build(widths, blocks)
    inputs = {name: torch.from_numpy(array) for name, array in case.feeds.items()}
    names = {name: {0: "batch"} | ({1: "sequence"} if case.blocks else {}) for name in inputs}
    axes = {n: dict.fromkeys(dims, torch.export.Dim.AUTO) for n, dims in names.items()}
    twice = {n: torch.cat([t, t]) for n, t in inputs.items()}  # a batch of 1 would be fixed
    torch.onnx.export(
        module, (), path, kwargs=twice, dynamic_shapes=axes, dynamo=True, verbose=False,
        external_data=False,
    )  # fmt: skip


def to_int8(model: Path, samples: Path, scheme: Int8Scheme) -> Path:
    """The same model in integers, with ranges alone: what else is done does not change the time."""
    folder = model.with_suffix("")
    if (folder / "done.json").is_file():
        return (
            folder / "int8" / record.loads(_Done, (folder / "done.json").read_text(), where="").file
        )
    ranges = fs.make_directory(folder / "ranges")
    calibrate(CalibrateConfig(model=model, samples=samples, scheme=scheme), output=ranges)
    config = QuantizeConfig(
        model=model,
        quantization=StaticInt8(rounding=None, bias_correction=False),
        scheme=scheme,
        samples=samples,
        statistics=ranges,
    )
    made = quantize(config, output=fs.make_directory(folder / "int8"))
    fs.write_json(folder / "done.json", _Done(file=made.file))
    return folder / "int8" / made.file


@dataclass(frozen=True, kw_only=True)
class _Done:
    file: str


def files_of(
    case: Case, work: Path, options: argparse.Namespace, precision: Precision
) -> tuple[list[Path], list[tuple[dict[str, int], int | None]]]:
    """The full model and those at other widths, exported on first use."""
    wanted = [({}, None), *assignments(case, options.models)]
    files = []
    for index, (widths, blocks) in enumerate(wanted):
        path = fs.make_directory(work / case.name.replace(" ", "_")) / f"{index}.onnx"
        if not path.is_file():
            say(f"exporting {case.name}, {index}")
            export(case, path, widths, blocks)
        files.append(path)
    if precision == "int8":
        samples = work / case.name.replace(" ", "_") / "samples"
        write_rows(samples, itertools.repeat(case.feeds, CALIBRATION))
        files = [to_int8(path, samples, cpu_scheme(detect_machine())) for path in files]
    return files, wanted


def table_of(
    case: Case, full: Path, work: Path, options: argparse.Namespace, precision: Precision
) -> LayerTable:
    """Measure the layers of a network, and it among them."""
    samples = work / "whole"
    write_rows(samples, [case.feeds])
    config = TableConfig(
        shapes=shapes_of(case.structure, multiple=MULTIPLE if not case.blocks else 1),
        runtime="onnxruntime",
        machine=record.dumps(detect_machine()),
        scheme=cpu_scheme(detect_machine()),
        precision=precision,
        threads=options.threads,
        working_sets=working_sets_of(case.structure, precision=precision),
        whole=full,
        samples=samples,
    )
    return measure_layers(config, output=fs.make_directory(work / "table"))


def row(case: Case, work: Path, options: argparse.Namespace, precision: Precision) -> Row:
    """Measure one network in one precision."""
    files, wanted = files_of(case, work, options, precision)
    say(f"measuring {case.name}, {precision}")
    table = table_of(case, files[0], work, options, precision)
    ratios = _ratios(files, case.feeds, options)
    estimator = Estimator(table, case.structure)
    models = _measured(wanted[1:], [estimator.full_ms * ratio for ratio in ratios[1:]])
    return Row(
        case=case.name,
        precision=precision,
        shapes=len(table.layers),
        rounds=table.rounds,
        table_s=table.took_s,
        whole_ms=estimator.full_ms,
        rest_ms=estimator.rest_ms,
        validation=validate(estimator, models),
        spread=float(ratios[1:].max() / ratios[1:].min()),
    )


def _ratios(files: Sequence[Path], feeds: dict[str, Array], options: argparse.Namespace) -> Array:
    """Latency of each model over that of the first, each run for a while before the next one.

    A model that runs alone finds in the caches what its last run left there; blocks are so long
    that what the other models did to them does not count.
    """
    settings = SessionSettings(threads=options.threads)
    with ExitStack() as stack:
        engines = [EngineFile(file=file) for file in files]
        sessions = [stack.enter_context(engine.session(settings)) for engine in engines]
        times = interleave(sessions, [feeds], rounds=options.rounds, block_s=BLOCK_S)
    return np.asarray(np.median(times / times[:, :1], axis=0))


def _measured(
    wanted: Sequence[tuple[dict[str, int], int | None]], latencies: Sequence[float]
) -> list[Measured]:
    pairs = zip(wanted, latencies, strict=True)
    return [
        Measured(widths=widths, blocks=blocks, latency_ms=float(ms))
        for (widths, blocks), ms in pairs
    ]


def markdown(found: Record) -> str:
    """The rows as a table for people."""
    lines = [
        (
            "| network | precision | layers | table, s | whole, ms | outside of layers, ms |"
            " median error | worst error | slowest over fastest |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each.case} | {each.precision} | {each.shapes} | {each.table_s:.1f}"
        f" | {each.whole_ms:.3f} | {each.rest_ms:.3f} | {each.validation.median_error:.1%}"
        f" | {each.validation.worst_error:.1%} | {each.spread:.1f} |"
        for each in found.rows
    ]
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--work", type=Path, default=default_cache() / "latency_table")
    parser.add_argument("--precisions", default="float32,int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--cases", default="", help="Only networks whose name begins so.")
    options = parser.parse_args()
    chosen = [case for case in cases() if case.name.startswith(options.cases)]
    found = Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        threads=options.threads,
        rows=tuple(
            row(case, options.work, options, precision)
            for case in chosen
            for precision in options.precisions.split(",")
        ),
    )
    fs.write_json(options.output, found)
    if options.table:
        fs.write_text(options.table, markdown(found))
    sys.stdout.write(markdown(found))


if __name__ == "__main__":
    main()
