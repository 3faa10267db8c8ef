"""How often `equipoise check --locked` is wrong about latency.

    make demo
    python benchmarks/lock.py --output RECORD.json [--real 20] [--processes 12]

Real: the engine of the digits demo is locked and checked, in processes as the command has them,
as it is and with a busy wait of 5 % of its own time in every inference. Resampled: float and int8
engines of real models are opened in many processes; locks and checks are then drawn from these
openings, a process at a time and with replacement, once as they are and once with all ratios
shifted. So the noise is measured and the pairings are drawn; that a machine changes between a lock
and a check is in the real runs alone. Intervals are Clopper and Pearson's, at 95 %.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _delayed
import numpy as np
from _cases import lite0, minilm

from equipoise import fs
from equipoise.data.store import Rows
from equipoise.engines import find_engine
from equipoise.jobs import JobConfig, make_pipeline
from equipoise.locking import check_locked, make_lock
from equipoise.measure.interval import Interval
from equipoise.measure.regression import (
    Measure,
    Openings,
    OpeningsConfig,
    estimate,
    in_children,
    settle,
    watch,
)
from equipoise.pipeline import Pipeline
from equipoise.quantize.schemes import StaticInt8
from equipoise.quantizing import QuantizeRequest, quantize_model
from equipoise.runtimes.engine import EngineFile
from equipoise.stages import default_cache, versions_of
from equipoise.targets.machine import Machine, detect_machine

VERSIONS = ("equipoise", "numpy", "onnx", "onnxruntime")
SLOWDOWNS = (0.0, 0.02, 0.03, 0.05, 0.10)
PAIRS = 4
"""Pairs of openings in a process, as ``equipoise check`` has them."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many checks said that the engine is slower.

    Attributes:
        slowdown: How much slower it really was.
        checks: Number of checks.
        slower: How many said so.
        share: With its 95 % interval.
        openings: Mean number of openings of a check.
    """

    slowdown: float
    checks: int
    slower: int
    share: Interval
    openings: float


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """Locks and checks drawn from openings that were measured.

    Attributes:
        model: Which.
        float_ms: Median of the float engine.
        ratio: Latency of the int8 engine / latency of the float engine.
        noise: Standard deviation of a pair of openings, winsorized, of the log ratio.
        spread: Of the log ratios of single openings: the smallest and the largest less the median.
        openings: How many were measured.
        processes: In how many processes.
        shares: By slow-down.
        unluckiest_lock: Largest share of false alarms of one lock, over 50 locks of 200 checks.
        log_ratios: All openings, process by process.
    """

    model: str
    float_ms: float
    ratio: float
    noise: float
    spread: tuple[float, float]
    openings: int
    processes: int
    shares: tuple[Share, ...]
    unluckiest_lock: float
    log_ratios: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RealCheck:
    """One check that was really run.

    Attributes:
        delay: Share of its own time that the engine waited.
        lock: Which lock.
        slower: Whether the gate failed.
        measured: What the gate said.
        seconds: How long the check took.
    """

    delay: float
    lock: int
    slower: bool
    measured: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """Both, and where they were measured."""

    machine: Machine
    versions: dict[str, str]
    threads: int
    real: tuple[Share, ...]
    checks: tuple[RealCheck, ...]
    resampled: tuple[Resampled, ...]


def share_of(slower: int, checks: int, *, slowdown: float, openings: float) -> Share:
    """A share with the interval of Clopper and Pearson, Biometrika 26, 1934."""
    from scipy import stats

    found: Any = stats.binomtest(slower, checks).proportion_ci(0.95, method="exact")
    return Share(
        slowdown=slowdown,
        checks=checks,
        slower=slower,
        share=Interval(value=slower / checks, low=float(found.low), high=float(found.high)),
        openings=openings,
    )


# Real checks.


def demo(folder: Path) -> Pipeline:
    """The digits demo, on the runtime that can be told to wait."""
    config = JobConfig(
        source="module:examples.digits.model:build",
        weights=folder / "model.safetensors",
        data="digits",
        threads=1,
    )
    made = make_pipeline(config)
    made.job = replace(made.job, target=replace(made.job.target, runtime=_delayed.NAME))
    return made


def real_checks(folder: Path, *, count: int, delay: float) -> Iterator[RealCheck]:
    """``count`` checks without delay and as many with it, in turn; a new lock for every five."""
    pipeline = demo(folder)
    engine = replace(find_engine(folder / "bundle"), runtime=_delayed.NAME)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "lock.json"
        for number in range(count):
            if number % 5 == 0:
                os.environ[_delayed.DELAY] = "0"
                fs.write_json(file, make_lock(engine, pipeline))
            for share in (0.0, delay):
                found = real_check(file, engine, pipeline, delay=share)
                say(f"lock {number // 5}, delay {share:.0%}: {found.measured}")
                yield replace(found, lock=number // 5)


def real_check(file: Path, engine: EngineFile, pipeline: Pipeline, *, delay: float) -> RealCheck:
    """One check."""
    os.environ[_delayed.DELAY] = str(delay)
    begin = time.monotonic()
    gate = check_locked(file, engine, pipeline)[-1]
    if gate.name != "latency" or gate.measured.startswith("not compared"):
        sys.exit(f"the check did not compare latencies: {gate.measured}")
    return RealCheck(
        delay=delay,
        lock=0,
        slower=not gate.passed,
        measured=gate.measured,
        seconds=time.monotonic() - begin,
    )


def real_share(checks: Sequence[RealCheck], *, delay: float) -> Share:
    """The share of failed gates at ``delay``."""
    own = [check for check in checks if check.delay == delay]
    openings = [int(check.measured.rpartition(", ")[2].split()[0]) for check in own]
    slower = sum(check.slower for check in own)
    return share_of(slower, len(own), slowdown=delay, openings=float(np.mean(openings)))


# Resampled checks.


def cases(work: Path, folder: Path) -> Iterator[tuple[str, OpeningsConfig]]:
    """A name, and a float and an int8 engine with inputs."""
    pipeline = demo(folder)
    yield (
        "digits",
        OpeningsConfig(
            engine=find_engine(folder / "bundle"),
            baseline=EngineFile(file=pipeline.float_model),
            samples=pipeline.evaluation,
        ),
    )
    for make in (minilm, lite0):
        case = make(fs.make_directory(work / make.__name__))
        int8 = work / make.__name__ / "locked.onnx"
        if not int8.is_file():
            request = QuantizeRequest(
                model=case.model,
                output=int8,
                data=str(case.calibration),
                quantization=StaticInt8(min_sqnr_db=20.0),
            )
            quantize_model(request)
        yield (
            case.title,
            OpeningsConfig(
                engine=EngineFile(file=int8),
                baseline=EngineFile(file=case.model),
                samples=next(iter(case.timed.values())),
            ),
        )


def resampled(name: str, config: OpeningsConfig, *, processes: int, checks: int) -> Resampled:
    """Measure the openings of a case, and draw from them."""
    if not len(Rows(config.samples)):
        sys.exit(f"{name} has no inputs")
    found = in_children(config)(PAIRS * processes)
    ratios = np.array(found.log_ratios).reshape(processes, 2 * PAIRS)
    rng = np.random.default_rng(0)
    shares = tuple(drawn_share(ratios, rng, slowdown=s, checks=checks) for s in SLOWDOWNS)
    overall = estimate(found.log_ratios)
    kept = overall.degrees + 1
    say(f"{name}: {', '.join(f'{s.slowdown:.0%} {s.share.value:.2%}' for s in shares)}")
    return Resampled(
        model=name,
        float_ms=float(np.median(found.baseline_ms)),
        ratio=math.exp(overall.mean),
        noise=math.sqrt(overall.variance * kept),
        spread=tuple((np.array([ratios.min(), ratios.max()]) - np.median(ratios)).tolist()),
        openings=ratios.size,
        processes=processes,
        shares=shares,
        unluckiest_lock=unluckiest(ratios, rng),
        log_ratios=found.log_ratios,
    )


def drawing(ratios: np.ndarray, rng: np.random.Generator, *, shift: float = 0.0) -> Measure:
    """A measurement that draws processes."""

    def measure(pairs: int) -> Openings:
        rows = rng.integers(0, len(ratios), -(-pairs // PAIRS))
        return Openings(log_ratios=tuple((ratios[rows].ravel() + shift)[: 2 * pairs].tolist()))

    return measure


def drawn_share(
    ratios: np.ndarray, rng: np.random.Generator, *, slowdown: float, checks: int
) -> Share:
    """``checks`` locks, each with a check of an engine that is slower by ``slowdown``."""
    slower, openings = 0, []
    for _ in range(checks):
        locked = settle(drawing(ratios, rng)).log_ratios
        verdict, _ = watch(locked, drawing(ratios, rng, shift=math.log1p(slowdown)))
        slower += verdict.state == "slower"
        openings.append(verdict.openings)
    return share_of(slower, checks, slowdown=slowdown, openings=float(np.mean(openings)))


def unluckiest(ratios: np.ndarray, rng: np.random.Generator) -> float:
    """A lock is made once and checked often: the worst of 50."""
    shares = []
    for _ in range(50):
        locked = settle(drawing(ratios, rng)).log_ratios
        states = [watch(locked, drawing(ratios, rng))[0].state for _ in range(200)]
        shares.append(states.count("slower") / len(states))
    return max(shares)


def say(text: str) -> None:
    """One line about what is going on."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--digits", type=Path, default=Path("out/digits"))
    parser.add_argument("--work", type=Path, default=default_cache() / "bench-quantize")
    parser.add_argument("--real", type=int, default=20, help="checks without delay, and with")
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--processes", type=int, default=12, help="of eight openings each")
    parser.add_argument("--checks", type=int, default=2000, help="drawn for each slow-down")
    parser.add_argument("--cases", type=int, default=3, help="models to draw from: 1 is digits")
    return parser.parse_args()


def main() -> int:
    """Measure and write the record."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        _delayed.install(Path(folder))
        checks = tuple(real_checks(options.digits, count=options.real, delay=options.delay))
        found = Record(
            machine=detect_machine(),
            versions=versions_of(VERSIONS),
            threads=1,
            real=tuple(real_share(checks, delay=d) for d in (0.0, options.delay) if checks),
            checks=checks,
            resampled=(),
        )
        fs.write_json(options.output, found)
        chosen = zip(range(options.cases), cases(options.work, options.digits), strict=False)
        for _, (name, config) in chosen:
            one = resampled(name, config, processes=options.processes, checks=options.checks)
            found = replace(found, resampled=(*found.resampled, one))
            fs.write_json(options.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
