"""Precision per node: fronts of noise against whole latency, by three rules.

    python benchmarks/precision.py --output RECORD.json [--table TABLE.md] [--conll DIRECTORY]
        [--digits FOLDER] [--cases digits,lite0,minilm,conll] [--rounds 24] [--plans 6]

Which nodes of a static int8 model go back to float, for falling budgets of noise:

- ``knapsack``: ours; the fastest choice, by the measured gain of each node and of the borders
  between float and integers.
- ``per-time``: harm over the larger of both times of a node, as equipoise did before.
- ``accuracy``: by harm alone, as quantisers do that rank nodes by accuracy and measure no time.

All rules know the same noise of single nodes and get the same budgets. Every choice is then made
and measured whole: SQNR on held-out inputs, latency with one thread in interleaved rounds with the
float model. Models and inputs are those of ``_cases.py``, and the digits network of the examples,
which is trained on first use. ``--conll`` names a transformers directory of MiniLM for named
entities; that case is left out without it.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from _cases import CASES, Case, conll

from equipoise import fs, onnxio
from equipoise.data.store import Rows, write_rows
from equipoise.jobs import JobConfig, make_pipeline
from equipoise.measure.interval import Interval, median_interval
from equipoise.measure.latency import time_engines
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.gains import weigh
from equipoise.quantize.plans import GainsRecord, front_of
from equipoise.quantize.quantize import QuantizeConfig, prepare_to_weigh
from equipoise.quantize.rewritten import node_times
from equipoise.quantize.schemes import StaticInt8
from equipoise.quantize.static import Prepared, written
from equipoise.quantize.sweeps import Judge
from equipoise.runtimes.engine import EngineFile
from equipoise.spec import Feeds
from equipoise.stages import default_cache, versions_of
from equipoise.targets.machine import Machine, detect_machine
from equipoise.targets.profiles import get_target

VERSIONS = ("equipoise", "numpy", "onnx", "onnxruntime", "scipy", "torch", "transformers")
THREADS = 1
HELD_OUT = 48
TIMED = 8
AT_ONCE = 6
"""Engines that are timed beside the float one in the same rounds."""

LEVELS = 25
FLOOR = 0.02
"""Share of the median price that a node costs at least by the rule before."""

Design = frozenset[str]
"""Nodes in integers."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """A model and its inputs.

    Attributes:
        model: Float ONNX file.
        calibration: Rows of calibration samples.
        held_out: Inputs that noise is measured on.
        timed: Inputs that are timed.
    """

    model: Path
    calibration: Path
    held_out: Sequence[Feeds]
    timed: Sequence[Feeds]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One choice of precisions, made and measured whole.

    Attributes:
        rule: What chose it; ``integers`` for everything in integers.
        float_nodes: Nodes in float that could run in integers.
        sqnr_db: Signal to noise of the worst output on held-out inputs; None when nothing is lost.
        predicted_sqnr_db: By the sum over nodes, on calibration samples.
        ms: Median latency.
        speedup: Float latency over it, of the same rounds.
        predicted_speedup: By the sum over nodes and borders.
    """

    rule: str
    float_nodes: int
    sqnr_db: float | None
    predicted_sqnr_db: float | None
    ms: float
    speedup: Interval
    predicted_speedup: float


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A rule beside the knapsack.

    Attributes:
        rule: Its name.
        slower: Its latency over that of the knapsack at the same noise; geometric mean over levels
            of noise that both reach, each the fastest choice that keeps the level.
        worst: The largest such ratio.
        best: The least.
        levels: Number of levels.
    """

    rule: str
    slower: float
    worst: float
    best: float
    levels: int


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    """One model.

    Attributes:
        name: Case.
        nodes: Nodes that may run in integers.
        no_gain: Those of them whose integers are predicted to gain nothing.
        float_ms: Measured latency of the float model.
        spread_ms: Median over nodes of half the range of a gain over openings.
        rows: All choices.
        rivals: The other rules beside the knapsack.
        errors: Predicted over measured latency less 1, of every choice that was not fitted to, in
            the order of size: least, median, largest magnitude.
    """

    name: str
    nodes: int
    no_gain: int
    float_ms: float
    spread_ms: float
    rows: tuple[Row, ...]
    rivals: tuple[Rival, ...]
    errors: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Record:
    """All cases, and where they were measured."""

    machine: Machine
    versions: dict[str, str]
    threads: int
    rounds: int
    cases: tuple[CaseRecord, ...]


# Models.


def of_case(case: Case, place: Path) -> Material:
    """A case of ``_cases.py``, its calibration samples as rows."""
    calibration = place / "calibration_rows"
    if not calibration.is_dir():
        with np.load(case.calibration) as stored:
            arrays = {name: stored[name] for name in stored.files if name != "label"}
        count = len(next(iter(arrays.values())))
        write_rows(
            calibration, ({n: a[i : i + 1] for n, a in arrays.items()} for i in range(count))
        )
    evaluation = Rows(case.evaluation)
    step = max(1, len(evaluation) // HELD_OUT)
    return Material(
        model=case.model,
        calibration=calibration,
        held_out=tuple(evaluation[i] for i in range(0, len(evaluation), step))[:HELD_OUT],
        timed=tuple(Rows(next(iter(case.timed.values()))))[:TIMED],
    )


def digits(folder: Path) -> Material:
    """The network of the examples, trained where there are no weights yet."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        command = [sys.executable, "-m", "examples.digits.train", "--output", str(weights)]
        subprocess.run(command, check=True)
    source = "module:examples.digits.model:build"
    job = JobConfig(source=source, weights=weights, data="digits", threads=THREADS)
    pipeline = make_pipeline(job)
    evaluation = Rows(pipeline.evaluation)
    return Material(
        model=pipeline.float_model,
        calibration=pipeline.calibration,
        held_out=tuple(evaluation[i] for i in range(HELD_OUT)),
        timed=tuple(evaluation[i] for i in range(TIMED)),
    )


def materials(options: argparse.Namespace) -> Iterator[tuple[str, Material]]:
    """The cases that were asked for."""
    makers: dict[str, Callable[[Path], Case]] = dict(CASES)
    if options.conll:
        makers["conll"] = partial(conll, directory=options.conll)
    for name in options.cases.split(","):
        place = fs.make_directory(options.work / name)
        if name == "digits":
            yield name, digits(options.digits)
        elif name in makers:
            yield name, of_case(makers[name](place), place)


# Rules.


def per_time(prepared: Prepared, harms: Mapping[str, float], feeds: Feeds) -> list[str]:
    """Nodes by harm over the larger of their times, the first to leave integers first."""
    with fs.scratch_directory() as folder:
        files = folder / "float.onnx", folder / "integers.onnx"
        onnxio.save_model(prepared.model, files[0])
        onnxio.save_model(written(prepared), files[1])
        times = node_times(*files, feeds=[feeds], runs=5, threads=THREADS)
    spent = {t.name: max(t.float_ms or 0.0, t.quantized_ms or 0.0) for t in times}
    floor = FLOOR * float(np.median(list(spent.values()) or [1.0])) + 1e-6
    return sorted(harms, key=lambda name: -harms[name] / max(spent.get(name, 0.0), floor))


def prefix(order: Sequence[str], harms: Mapping[str, float], *, budget: float) -> Design:
    """The nodes that stay when as few of ``order`` leave as the budget allows."""
    for count in range(len(order) + 1):
        if math.fsum(harms[name] for name in order[count:]) <= budget:
            return frozenset(order[count:])
    return frozenset()


def choices(
    prepared: Prepared, found: GainsRecord, *, feeds: Feeds, count: int
) -> list[tuple[str, Design]]:
    """What each rule chooses for the budgets of the front."""
    ours = front_of(found, count=count)
    harms = found.harms
    orders = {
        "per-time": per_time(prepared, harms, feeds),
        "accuracy": sorted(harms, key=lambda name: -harms[name]),
    }
    chosen = [("integers", found.able), *(("knapsack", choice.integers) for choice in ours)]
    for rule, order in orders.items():
        designs = [prefix(order, harms, budget=choice.noise) for choice in ours]
        chosen += [(rule, found.latency.settled(design)) for design in designs]
    return list(dict.fromkeys(chosen))


# Measuring.


def measured(
    prepared: Prepared, designs: Sequence[Design], material: Material, *, rounds: int
) -> tuple[dict[Design, tuple[float, Interval]], float]:
    """Latency and speed-up of each design, a few at a time beside the float model."""
    found: dict[Design, tuple[float, Interval]] = {}
    float_ms: list[float] = []
    timed = [dict(feeds) for feeds in material.timed]
    for start in range(0, len(designs), AT_ONCE):
        some = designs[start : start + AT_ONCE]
        with fs.scratch_directory() as folder:
            engines = []
            for index, design in enumerate([frozenset[str](), *some]):
                onnxio.save_model(made(prepared, design), folder / f"{index}.onnx")
                engines.append(EngineFile(file=folder / f"{index}.onnx", runtime="onnxruntime"))
            times = time_engines(engines, timed, threads=THREADS, rounds=rounds)
        float_ms.append(float(np.median(times[:, 0])))
        for index, design in enumerate(some, start=1):
            speedup = median_interval(times[:, 0] / times[:, index])
            found[design] = (float(np.median(times[:, index])), speedup)
    return found, float(np.median(float_ms))


def made(prepared: Prepared, design: Design) -> object:
    """The model with the nodes of ``design`` in integers."""
    return written(prepared, without=prepared.placement.nodes - design)


def held_out_judge(material: Material) -> Judge:
    """The float model's outputs on held-out inputs."""
    engine = EngineFile(file=material.model, runtime="onnxruntime")
    from equipoise.runtimes.protocol import SessionSettings

    with engine.session(SessionSettings(threads=THREADS)) as session:
        references = [session.run(dict(feeds)) for feeds in material.held_out]
    return Judge(feeds=material.held_out, references=references, threads=THREADS)


def run_case(name: str, material: Material, options: argparse.Namespace) -> CaseRecord:
    """Weigh the nodes of a model, choose by every rule, and measure all choices."""
    with fs.scratch_directory() as folder:
        prepared, judge = prepare_to_weigh(config_of(material, folder))
    found = weigh(prepared, judge=judge, budget_s=options.budget)
    chosen = choices(prepared, found, feeds=material.timed[0], count=options.plans)
    designs = [d for d in dict.fromkeys(design for _, design in chosen) if d]
    say(f"{name}: {len(found.able)} nodes, {len(designs)} choices to measure")
    times, float_ms = measured(prepared, designs, material, rounds=options.rounds)
    held_out = held_out_judge(material)
    kept = {d: held_out.rounding(made(prepared, d)).sqnr_db for d in designs}
    rows = tuple(
        Row(
            rule=rule,
            float_nodes=len(found.able - design),
            sqnr_db=kept[design],
            predicted_sqnr_db=decibel(math.fsum(found.harms.get(n, 0.0) for n in design)),
            ms=times[design][0],
            speedup=times[design][1],
            predicted_speedup=found.latency.predict_ms(()) / found.latency.predict_ms(design),
        )
        for rule, design in chosen
        if design
    )
    spreads = [node.spread_ms for node in found.nodes if node.able]
    return CaseRecord(
        name=name,
        nodes=len(found.able),
        no_gain=sum(node.able and node.gain_ms <= 0 for node in found.nodes),
        float_ms=float_ms,
        spread_ms=float(np.median(spreads)),
        rows=rows,
        rivals=tuple(rivals(rows)),
        errors=errors(rows),
    )


def config_of(material: Material, folder: Path) -> QuantizeConfig:
    """Static int8 for this machine, calibrated."""
    scheme = get_target("cpu", machine=detect_machine()).int8
    config = CalibrateConfig(model=material.model, samples=material.calibration, scheme=scheme)
    calibrate(config, output=folder)
    return QuantizeConfig(
        model=material.model,
        quantization=StaticInt8(),
        scheme=scheme,
        samples=material.calibration,
        statistics=folder,
        threads=THREADS,
    )


def decibel(noise: float) -> float | None:
    """Signal to noise of a noise power."""
    return -10 * math.log10(noise) if noise else None


# What they say.


def rivals(rows: Sequence[Row]) -> Iterator[Rival]:
    """Each other rule beside the knapsack, at the same levels of noise.

    Everything in integers belongs to every front: each rule may choose it.
    """
    whole = [row for row in rows if row.rule == "integers"]
    ours = [*whole, *(row for row in rows if row.rule == "knapsack")]
    for rule in ("per-time", "accuracy"):
        theirs = [*whole, *(row for row in rows if row.rule == rule)]
        ratios = ratios_at_levels(ours, theirs)
        if len(ratios):
            yield Rival(
                rule=rule,
                slower=float(np.exp(np.mean(np.log(ratios)))),
                worst=float(ratios.max()),
                best=float(ratios.min()),
                levels=len(ratios),
            )


def ratios_at_levels(ours: Sequence[Row], theirs: Sequence[Row]) -> np.ndarray:
    """Their latency over ours at evenly spaced levels of SQNR that both keep."""
    reach = [[row.sqnr_db for row in front if row.sqnr_db is not None] for front in (ours, theirs)]
    low, high = max(map(min, reach)), min(map(max, reach))
    levels = np.linspace(low, high, LEVELS) if high > low else np.array([low])
    return np.array([fastest(theirs, level) / fastest(ours, level) for level in levels])


def fastest(rows: Sequence[Row], level: float) -> float:
    """Float latency times the fastest choice that keeps ``level`` dB, as a share of it."""
    return min(1 / r.speedup.value for r in rows if r.sqnr_db is None or r.sqnr_db >= level - 1e-9)


def errors(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Of the predicted latency: least, median and largest magnitude, over choices not fitted to.

    Both as shares of the float latency, which the same rounds have measured.
    """
    free = {(row.float_nodes, row.predicted_speedup): row for row in rows if row.float_nodes}
    found = sorted(abs(r.speedup.value / r.predicted_speedup - 1) for r in free.values())
    return (found[0], float(np.median(found)), found[-1]) if found else (0.0, 0.0, 0.0)


def table(found: Record) -> str:
    """Markdown: the rules beside each other, then all choices."""
    lines = [
        "| model | nodes | no gain | per-time, slower | accuracy, slower | error of prediction |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in found.cases:
        slower = {r.rule: f"{r.slower:.3f} ({r.best:.2f} to {r.worst:.2f})" for r in case.rivals}
        cells = [slower.get(rule, "") for rule in ("per-time", "accuracy")]
        error = f"{case.errors[1]:.1%}, at most {case.errors[2]:.1%}"
        lines.append(
            f"| {case.name} | {case.nodes} | {case.no_gain} | {' | '.join(cells)} | {error} |"
        )
    for case in found.cases:
        lines += ["", f"#### {case.name}, float {case.float_ms:.2f} ms", ""]
        lines += [
            "| rule | in float | SQNR, dB | speed | predicted |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r.rule} | {r.float_nodes} | {'' if r.sqnr_db is None else f'{r.sqnr_db:.1f}'}"
            f" | {r.speedup.value:.3f} ({r.speedup.low:.3f} to {r.speedup.high:.3f})"
            f" | {r.predicted_speedup:.3f} |"
            for r in case.rows
        ]
    return "\n".join([*lines, ""])


def say(text: str) -> None:
    """One line about what is going on."""
    sys.stderr.write(f"{text}\n")


def main() -> None:
    """Measure; write the record and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--cases", default="digits,lite0,conll")
    parser.add_argument("--conll", type=Path)
    parser.add_argument("--digits", type=Path, default=Path("out/digits"))
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--plans", type=int, default=6)
    parser.add_argument("--budget", type=float, default=90.0, help="seconds to measure harm")
    parser.add_argument("--work", type=Path, default=default_cache() / "bench-quantize")
    options = parser.parse_args()
    found = Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        threads=THREADS,
        rounds=options.rounds,
        cases=tuple(run_case(name, given, options) for name, given in materials(options)),
    )
    fs.write_json(options.output, found)
    say(table(found))
    if options.table:
        fs.write_text(options.table, table(found))


if __name__ == "__main__":
    main()
