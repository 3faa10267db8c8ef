"""The best engine for this CPU, chosen by measurement, beside plain ONNX Runtime.

    python benchmarks/engines.py --output RECORD.json [--table TABLE.md] [--rounds 60]

MiniLM as a sentence encoder and EfficientNet-Lite0 as benchmarks/quantize.py makes them, and a
ResNet-50 of transformers with random weights, whose accuracy says nothing and whose latency says
as much as any other's. For each model the float file, the fused one where there is something to
fuse, and int8 files quantised for each runtime are built for ONNX Runtime and OpenVINO; all engines
run in interleaved rounds of one process against the float file in ONNX Runtime with its defaults.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _cases import lite0, minilm
from fit import export

from equipoise import fs
from equipoise.building import BuildRequest, build_engine
from equipoise.data.store import Rows
from equipoise.engines import find_engine
from equipoise.errors import EquipoiseError
from equipoise.graph.fuse import FuseConfig, fuse
from equipoise.measure.interval import Interval, median_interval
from equipoise.measure.latency import time_engines
from equipoise.parity.compare import Comparison
from equipoise.quantize.schemes import StaticInt8
from equipoise.quantizing import QuantizeRequest, quantize_model
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array
from equipoise.stages import default_cache, versions_of
from equipoise.targets.machine import Machine, detect_machine

VERSIONS = ("equipoise", "numpy", "onnx", "onnxruntime", "openvino", "torch", "transformers")
BASELINE = "float, ONNX Runtime"
TARGETS = {"ONNX Runtime": "cpu", "OpenVINO": "openvino"}
EVALUATED = 50


@dataclass(frozen=True, kw_only=True)
class Model:
    """A float file, what it is timed on, and data to calibrate and judge it with.

    Attributes:
        name: For people.
        file: Float ONNX file.
        feeds: Inputs that are timed.
        calibration: ``.npz``; None for random inputs, which fit random weights.
        evaluation: Held-out inputs; none where outputs mean nothing.
    """

    name: str
    file: Path
    feeds: tuple[dict[str, Array], ...]
    calibration: Path | None
    evaluation: tuple[dict[str, Array], ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine.

    Attributes:
        model: Name of the model.
        engine: What it is.
        threads: Threads per operator.
        latency_ms: Median.
        speedup: Over the baseline, in the same rounds.
        sqnr_db: Of the first output against the baseline's, held-out inputs; None when equal, and
            where outputs mean nothing.
    """

    model: str
    engine: str
    threads: int
    latency_ms: float
    speedup: Interval
    sqnr_db: float | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """All engines, and where they were measured."""

    machine: Machine
    versions: dict[str, str]
    rounds: int
    rows: tuple[Row, ...]
    failures: dict[str, str]


def models(work: Path, cases: Path) -> Iterator[Model]:
    """The three models, made on first use."""
    for make in (minilm, lite0):
        case = make(fs.make_directory(cases / make.__name__))
        yield Model(
            name=case.title,
            file=case.model,
            feeds=tuple(next(iter(map(Rows, case.timed.values())))),
            calibration=case.calibration,
            evaluation=tuple(Rows(case.evaluation))[:EVALUATED],
        )
    file = fs.make_directory(work) / "ResNet-50.onnx"
    if not file.is_file():
        export("ResNet-50", file)
    picture = np.random.default_rng(0).random((1, 3, 224, 224), dtype=np.float32)
    yield Model(
        name="ResNet-50, random weights",
        file=file,
        feeds=({"pixel_values": picture},),
        calibration=None,
        evaluation=(),
    )


def files(model: Model, work: Path) -> Iterator[tuple[str, str, Path]]:
    """What it is, the runtime it is for, and the ONNX file."""
    fused = fs.make_directory(work / "fused")
    forms = {"float": model.file}
    if fuse(FuseConfig(model=model.file), output=fused).fusions:
        forms["fused"] = fused / "model.onnx"
    for form, file in forms.items():
        yield form, "ONNX Runtime", file
    yield "float", "OpenVINO", model.file
    for runtime, target in TARGETS.items():
        made = work / f"{target}.onnx"
        quantize_model(
            QuantizeRequest(
                model=model.file,
                output=made,
                data=None if model.calibration is None else str(model.calibration),
                synthetic=64 if model.calibration is None else None,
                quantization=StaticInt8(min_sqnr_db=20.0 if model.calibration else 0.0),
                target=target,
            )
        )
        yield f"int8 for {target}", runtime, made
    if model.calibration is not None:
        yield "int8 for cpu", "OpenVINO", work / "cpu.onnx"


def engines(model: Model, work: Path, failures: dict[str, str]) -> dict[str, EngineFile]:
    """What it is -> the engine, built."""
    found = {}
    for form, runtime, file in files(model, work):
        name = f"{form}, {runtime}"
        place = work / "engines" / name.replace(", ", "-").replace(" ", "-")
        try:
            request = BuildRequest(model=file, output=place, target=TARGETS[runtime])
            build_engine(request)
        except EquipoiseError as error:
            failures[f"{model.name}: {name}"] = error.message
            continue
        found[name] = find_engine(place)
    return found


def measure(model: Model, work: Path, *, rounds: int, failures: dict[str, str]) -> Iterator[Row]:
    """Every engine of a model with every number of threads."""
    found = engines(model, fs.make_directory(work), failures)
    kept = _kept(model, found)
    for threads in range(1, detect_machine().cores + 1):
        times = time_engines(list(found.values()), model.feeds, threads=threads, rounds=rounds)
        for index, name in enumerate(found):
            yield Row(
                model=model.name,
                engine=name,
                threads=threads,
                latency_ms=float(np.median(times[:, index])),
                speedup=median_interval(times[:, 0] / times[:, index]),
                sqnr_db=kept[name],
            )


def _kept(model: Model, found: dict[str, EngineFile]) -> dict[str, float | None]:
    outputs = {}
    for name, engine in found.items():
        with engine.session(SessionSettings()) as session:
            outputs[name] = [session.run(feeds) for feeds in model.evaluation]
    kept: dict[str, float | None] = {}
    for name, given in outputs.items():
        comparison = Comparison()
        for reference, output in zip(outputs[BASELINE], given, strict=True):
            comparison.add(reference, output)
        kept[name] = comparison.result()[0].sqnr_db if model.evaluation else None
    return kept


def table(found: Record) -> str:
    """Markdown: all engines, the fastest of each number of threads in bold."""
    lines = [
        "| model | engine | speed, 1 thread | speed, 2 threads | SQNR, dB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for model, engine in dict.fromkeys((row.model, row.engine) for row in found.rows):
        rows = [r for r in found.rows if (r.model, r.engine) == (model, engine)]
        cells = [_speed(row, found) for row in rows]
        kept = "" if rows[0].sqnr_db is None else f"{rows[0].sqnr_db:.1f}"
        lines.append(f"| {model} | {engine} | {' | '.join(cells)} | {kept} |")
    return "\n".join([*lines, ""])


def _speed(row: Row, found: Record) -> str:
    rivals = [r for r in found.rows if (r.model, r.threads) == (row.model, row.threads)]
    text = f"{row.speedup.value:.2f} ({row.latency_ms:.2f} ms)"
    return f"**{text}**" if row is min(rivals, key=lambda r: r.latency_ms) else text


def main() -> None:
    """Build, measure, write the record and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--cases", type=Path, default=default_cache() / "bench-quantize")
    parser.add_argument("--work", type=Path, default=default_cache() / "bench-engines")
    options = parser.parse_args()
    rows, failures = [], {}
    for model in models(options.work, options.cases):
        place = options.work / model.file.stem / model.name.split(",")[0]
        rows += list(measure(model, place, rounds=options.rounds, failures=failures))
        sys.stderr.write(f"{model.name}: done\n")
    found = Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        rounds=options.rounds,
        rows=tuple(rows),
        failures=failures,
    )
    fs.write_json(options.output, found)
    sys.stderr.write(table(found))
    if options.table:
        fs.write_text(options.table, table(found))


if __name__ == "__main__":
    main()
