"""Post-training quantisers side by side: fidelity, speed, size, time and memory.

    python benchmarks/quantize.py --output RECORD.json [--table TABLE.md] [--conll DIRECTORY]
        [--cases minilm,lite0] [--only WAY,WAY] [--ours "NAME=OPTIONS"] [--repeats 3] [--rounds 60]
    python benchmarks/quantize.py --output RECORD.json --table TABLE.md --render

Every quantiser gets the same float file and the same 128 calibration samples, runs in a process
tree of its own with an empty cache, and is judged on held-out inputs of another origin: see
``_cases.py``. Its file is compared with the float file in ONNX Runtime, and all files of a case are
timed in interleaved rounds of one process. A quantiser that fails is a row that says why. The
peers live in a virtual environment that is made on first use. ``--conll`` names a transformers
directory of MiniLM for named entities; that case is left out without it. ``--render`` writes the
table of a record that is there. Linux only: memory is read from ``/proc``.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import _peers
import _processes
import numpy as np
from _cases import CALIBRATION_SAMPLES, CASES, Case, conll, place_of

from equipoise import fs, record
from equipoise.data.metrics import get_metric
from equipoise.data.store import Rows
from equipoise.errors import DataError, EquipoiseError
from equipoise.measure.interval import Interval, median_interval, paired_drop
from equipoise.measure.latency import time_engines
from equipoise.parity.compare import Comparison, OutputParity
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array
from equipoise.stages import default_cache, versions_of
from equipoise.targets.machine import Machine, detect_machine

THREADS = (1, 2)
TIME_LIMIT_S = 900.0
RUNTIME = "onnxruntime"
VERSIONS = ("equipoise", "numpy", "onnx", "onnxruntime", "torch", "transformers")
Outputs = Sequence[Mapping[str, Array]]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to quantise: one row per case.

    Attributes:
        name: For ``--only`` and the record.
        words: The command line, each word filled in by ``str.format``: ``model``, ``data`` (an
            ``.npz`` of calibration samples), ``output``, ``kind`` (``transformer`` or ``cnn``).
    """

    name: str
    words: tuple[str, ...]


def ours(name: str, options: str = "") -> Way:
    """``equipoise quantize`` with more options; ablations switch algorithms off with them."""
    words = ("-m", "equipoise", "quantize", "{model}", "--data", "{data}", "-o", "{output}")
    return Way(name=name, words=(sys.executable, *words, "--quiet", *shlex.split(options)))


OURS = (ours("equipoise"),)
"""Ways of ours without ``--ours``."""

PEERS = (
    "ort-minmax",
    "ort-minmax-reduced",
    "ort-minmax-u8u8",
    "ort-entropy",
    "ort-percentile",
    "ort-dynamic-s8",
    "ort-dynamic-u8",
    "nncf",
    "quark",
)
"""Names in ``_peer.py``."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What quantising took: medians over runs of what ``_processes.Cost`` says."""

    runs: int
    wall_s: float
    largest_bytes: int
    sum_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All processes together; a peak between two looks shows in the largest process alone."""
        return max(self.largest_bytes, self.sum_bytes)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A file against the float file in the same rounds.

    Attributes:
        inputs: What was timed.
        threads: Threads per operator.
        float_ms: Median of the float file, per inference.
        engine_ms: Median of this file.
        speedup: Float latency / this latency, median over rounds.
    """

    inputs: str
    threads: int
    float_ms: float
    engine_ms: float
    speedup: Interval


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one way made of one case.

    Attributes:
        case: Name of the case.
        way: Name of the way.
        failure: Why there is no file, or none that runs; empty when there is one.
        cost: Of quantising; None when it failed.
        file_bytes: The file with its external data.
        parity: First output against the float file's, held-out inputs, batch 1; agreement of the
            largest entry only where entries are scores of classes.
        metric: Entity F1 of this file, where the case has labels.
        drop: Float F1 less this file's, paired over sentences, with one-sided 95 % bounds.
        speeds: One per timed input and number of threads.
    """

    case: str
    way: str
    failure: str = ""
    cost: Cost | None = None
    file_bytes: int | None = None
    parity: OutputParity | None = None
    metric: float | None = None
    drop: Interval | None = None
    speeds: tuple[Speed, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    """A case: its float file and its numbers of samples; metric as in :class:`Row`."""

    name: str
    title: str
    float_bytes: int
    calibration_samples: int
    evaluation_samples: int
    metric: float | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """All rows, and where they were measured."""

    machine: Machine
    versions: dict[str, str]
    peers: dict[str, str]
    rounds: int
    cases: tuple[CaseRecord, ...]
    rows: tuple[Row, ...]


# Quantising.


def quantise(case: Case, ways: Sequence[Way], *, repeats: int) -> Iterator[Row]:
    """Every way on a case, in turns; a row for each."""
    costs: dict[str, list[_processes.Cost]] = {way.name: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            seen = costs[way.name]
            if not (seen and seen[-1].failure):
                seen.append(_run(case, way))
                say(f"{case.name}, {way.name}: {seen[-1].failure or f'{seen[-1].wall_s:.1f} s'}")
    for way in ways:
        yield _cost_row(case, way, costs[way.name])


def _run(case: Case, way: Way) -> _processes.Cost:
    """One run; the file is left in the case's folder."""
    made = _file(case, way.name)
    fs.remove(made.parent)
    with tempfile.TemporaryDirectory() as folder:
        words = {
            "model": str(case.model),
            "data": str(case.calibration),
            "output": str(fs.make_directory(made.parent) / made.name),
            "kind": case.kind,
        }
        environment = {"EQUIPOISE_CACHE_DIR": str(Path(folder) / "cache"), **_peers.ENVIRONMENT}
        command = [word.format_map(words) for word in way.words]
        return _processes.run(command, Path(folder), environment=environment, limit_s=TIME_LIMIT_S)


def _file(case: Case, way: str) -> Path:
    return place_of(case) / "quantized" / way / "model.onnx"


def _cost_row(case: Case, way: Way, runs: Sequence[_processes.Cost]) -> Row:
    row = Row(case=case.name, way=way.name)
    file = _file(case, way.name)
    failure = next((run.failure for run in runs if run.failure), "")
    if failure or not file.is_file():
        return replace(row, failure=failure or "it wrote no file")
    cost = Cost(
        runs=len(runs),
        wall_s=statistics.median(run.wall_s for run in runs),
        largest_bytes=int(statistics.median(run.largest_bytes for run in runs)),
        sum_bytes=int(statistics.median(run.sum_bytes for run in runs)),
    )
    return replace(row, cost=cost, file_bytes=_bytes(file))


def _bytes(file: Path) -> int:
    """A file and its external data, whatever that is called."""
    return sum(part.stat().st_size for part in file.parent.glob("*") if part.is_file())


# Fidelity.


def outputs_of(case: Case, file: Path) -> Outputs:
    """What a file makes of the held-out inputs, one at a time."""
    settings = SessionSettings(threads=detect_machine().cores)
    with session_opener(RUNTIME)(file, settings=settings) as session:
        return [session.run(feeds) for feeds in Rows(case.evaluation)]


def judge(case: Case, row: Row, wanted: Outputs) -> Row:
    """The row with its fidelity, or with the reason why there is none."""
    if row.failure:
        return row
    try:
        given = outputs_of(case, _file(case, row.way))
        comparison = Comparison()
        for reference, output in zip(wanted, given, strict=True):
            comparison.add(reference, output)
    except EquipoiseError as error:
        return replace(row, failure=f"its file does not run: {error.message}"[:300])
    parity = comparison.result()[0]
    if not case.decides:
        parity = replace(parity, top1_agreement=None)
    judged = replace(row, parity=parity)
    if case.labels is None:
        return judged
    value, drop = _metric(case, wanted, given)
    return replace(judged, metric=value, drop=drop)


def _metric(case: Case, wanted: Outputs, given: Outputs) -> tuple[float, Interval]:
    """Entity F1 and its paired drop."""
    metric = get_metric("entity-f1", labels=case.label_names)
    labels = [row["label"] for row in Rows(case.labels or Path())]
    reference, candidate = (
        np.stack(
            [metric.statistics(o, label, {}) for o, label in zip(outputs, labels, strict=True)]
        )
        for outputs in (wanted, given)
    )
    drop = paired_drop(reference, candidate, metric.value, discrete=metric.discrete)
    return float(metric.value(candidate.sum(0))), drop


# Speed.


def time_rows(case: Case, rows: Sequence[Row], *, rounds: int) -> list[Row]:
    """The rows with their speeds: all files that run and the float file in the same rounds."""
    running = [row for row in rows if not row.failure]
    files = (case.model, *(_file(case, row.way) for row in running))
    engines = [EngineFile(file=file, runtime=RUNTIME) for file in files]
    speeds: dict[str, list[Speed]] = {row.way: [] for row in rows}
    for inputs, directory in case.timed.items():
        samples = list(Rows(directory))
        for threads in [n for n in THREADS if n <= detect_machine().cores]:
            times = time_engines(engines, samples, threads=threads, rounds=rounds)
            for index, row in enumerate(running, start=1):
                speeds[row.way].append(_speed(times, index, inputs=inputs, threads=threads))
    return [replace(row, speeds=tuple(speeds[row.way])) for row in rows]


def _speed(times: Array, index: int, *, inputs: str, threads: int) -> Speed:
    return Speed(
        inputs=inputs,
        threads=threads,
        float_ms=float(np.median(times[:, 0])),
        engine_ms=float(np.median(times[:, index])),
        speedup=median_interval(times[:, 0] / times[:, index]),
    )


# The table.


def markdown(found: Record) -> str:
    """A table per case, with what it was measured on."""
    machine = found.machine
    place = f"{machine.cpu} ({machine.cores} cores; {', '.join(machine.flags)})"
    with_ours, with_peers = map(_listed, (found.versions, found.peers))
    parts = [f"Measured on {place} with {with_ours}; the peers with {with_peers}."]
    for case in found.cases:
        rows = [row for row in found.rows if row.case == case.name]
        parts += [f"### {case.title}", _facts(case), "\n".join(_table(rows))]
    return "\n\n".join(parts) + "\n"


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _facts(case: CaseRecord) -> str:
    metric = "" if case.metric is None else f" Entity F1 {case.metric:.4f}."
    return (
        f"Float: {case.float_bytes / 1e6:.1f} MB.{metric} {case.calibration_samples} calibration"
        f" samples, {case.evaluation_samples} held-out inputs."
    )


Cell = Callable[[Row], str]
Figure = Callable[[Row], float | None]


def _columns(rows: Sequence[Row]) -> dict[str, Cell]:
    """Header -> what a row has there, for the columns in which any row has something."""
    timed = {(s.inputs, s.threads): None for row in rows for s in row.speeds}
    every: dict[str, Cell] = {
        "way": lambda row: row.way,
        "MB": _shown(lambda row: row.file_bytes, scale=1e-6),
        "SQNR, dB": _shown(lambda row: row.parity.sqnr_db if row.parity else None),
        "cosine": _shown(lambda row: row.parity.cosine if row.parity else None, digits=4),
        "top-1 agreement, %": _shown(
            lambda row: row.parity.top1_agreement if row.parity else None, scale=100
        ),
        "F1": _shown(lambda row: row.metric, digits=4),
        "F1 drop (95 % bound), points": _drop,
        **{f"speed, {i}, {n}t": _speed_cell(i, n) for i, n in timed},
        "wall, s": _shown(lambda row: row.cost.wall_s if row.cost else None),
        "peak, MB": _shown(
            lambda row: row.cost.peak_bytes if row.cost else None,
            scale=1e-6,
            digits=0,
        ),
        "failure": lambda row: row.failure.replace("|", "/"),
    }
    return {name: cell for name, cell in every.items() if any(map(cell, rows))}


def _shown(figure: Figure, *, scale: float = 1.0, digits: int = 1) -> Cell:
    def cell(row: Row) -> str:
        value = figure(row)
        return "" if value is None else f"{scale * value:.{digits}f}"

    return cell


def _table(rows: Sequence[Row]) -> Iterator[str]:
    columns = _columns(rows)
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(cell(row) for cell in columns.values())} |"


def _speed_cell(inputs: str, threads: int) -> Cell:
    def cell(row: Row) -> str:
        found = [s for s in row.speeds if (s.inputs, s.threads) == (inputs, threads)]
        return f"{found[0].speedup.value:.2f}" if found else ""

    return cell


def _drop(row: Row) -> str:
    drop = row.drop
    return f"{100 * drop.value:.2f} ({100 * drop.high:.2f})" if drop else ""


# Joining.


def measure(
    case: Case, ways: Sequence[Way], options: argparse.Namespace
) -> tuple[CaseRecord, list[Row]]:
    """A case and all its rows."""
    made = list(quantise(case, ways, repeats=options.repeats))
    wanted = outputs_of(case, case.model)
    rows = [judge(case, row, wanted) for row in made]
    if options.rounds:
        rows = time_rows(case, rows, rounds=options.rounds)
    return describe(case, wanted), rows


def describe(case: Case, wanted: Outputs) -> CaseRecord:
    """What a case is, and what the float file reaches."""
    return CaseRecord(
        name=case.name,
        title=case.title,
        float_bytes=_bytes_of_model(case.model),
        calibration_samples=CALIBRATION_SAMPLES,
        evaluation_samples=len(wanted),
        metric=None if case.labels is None else _metric(case, wanted, wanted)[0],
    )


def _bytes_of_model(file: Path) -> int:
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


def ways_of(options: argparse.Namespace) -> list[Way]:
    """The ways that were asked for, ours first."""
    added = [ours(*text.split("=", 1)) for text in options.ours]
    peers = [Way(name=name, words=_peers.command(name)) for name in PEERS]
    ways = [*(added or OURS), *peers]
    return [way for way in ways if not options.only or way.name in options.only]


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """The cases that were asked for, their files made on first use."""
    work: Path = options.work
    for name, make in CASES.items():
        if not options.cases or name in options.cases:
            yield make(fs.make_directory(work / name))
    if options.conll and (not options.cases or "conll" in options.cases):
        yield conll(fs.make_directory(work / "conll"), options.conll)


def say(text: str) -> None:
    """One line about what is going on."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--conll", type=Path)
    parser.add_argument("--cases", type=_names, default=())
    parser.add_argument("--only", type=_names, default=())
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=OPTIONS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60, help="0 measures no speed")
    parser.add_argument("--work", type=Path, default=default_cache() / "bench-quantize")
    return parser.parse_args()


def main() -> None:
    """Measure and write the record, or read it; write the table."""
    options = arguments()
    if options.render:
        text = fs.read_text(options.output, error=DataError)
        found = record.loads(Record, text, where=str(options.output))
    else:
        found = _measured(options)
    if options.table:
        fs.write_text(options.table, markdown(found))


def _measured(options: argparse.Namespace) -> Record:
    """Measure; what is known is written after every case."""
    ways = ways_of(options)
    found = Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        peers=_peers.versions(),
        rounds=options.rounds,
        cases=(),
        rows=(),
    )
    for case in list(cases_of(options)):
        described, rows = measure(case, ways, options)
        found = replace(found, cases=(*found.cases, described), rows=(*found.rows, *rows))
        fs.write_json(options.output, found)
    return found


if __name__ == "__main__":
    main()
