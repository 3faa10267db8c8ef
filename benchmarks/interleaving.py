"""What an engine's latency beside another one says of its latency by itself.

    python benchmarks/interleaving.py FLOAT.onnx OTHER.onnx --output RECORD.json

The float engine is timed against itself, where the ratio is 1, and against the other engine, both
in interleaved rounds: with the time that each session runs before it is timed, and without. Beside
that, what each takes when nothing else runs between its inferences. Inputs are a sequence of each
of eight lengths, or eight pictures. One thread. Times mean nothing while something else computes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from equipoise import fs, onnxio
from equipoise.measure.interval import Interval, clustered_interval
from equipoise.measure.latency import SETTLE_S, timed_openings
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array, TensorSpec
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine

VERSIONS: Final = ("equipoise", "numpy", "onnxruntime")
LENGTHS: Final = (6, 10, 14, 18, 24, 32, 40, 64)
ROUNDS: Final = [8] * 24
OPENINGS: Final = 8
RUNS: Final = 12


@dataclass(frozen=True, kw_only=True)
class Interleaved:
    """In interleaved rounds.

    Attributes:
        settle_s: How long a session runs before each block.
        itself: Latency of the float engine over its own.
        other: Latency of the float engine over that of the other.
        seconds: What the second one took to measure.
    """

    settle_s: float
    itself: Interval
    other: Interval
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """Ratios; ``alone`` is that of engines by themselves."""

    machine: Machine
    versions: dict[str, str]
    size_bytes: tuple[int, int]
    alone: Interval
    interleaved: tuple[Interleaved, ...]


def inputs_of(specs: tuple[TensorSpec, ...]) -> list[dict[str, Array]]:
    """One of each length, for dimensions that are not fixed."""
    return [{spec.name: _drawn(spec, length) for spec in specs} for length in LENGTHS]


def _drawn(spec: TensorSpec, length: int) -> Array:
    generator = np.random.default_rng(length)
    dynamic = (1, *[length] * (len(spec.shape) - 1))
    sizes = [d if isinstance(d, int) else dynamic[axis] for axis, d in enumerate(spec.shape)]
    if spec.dtype.startswith("float"):
        return generator.normal(size=sizes).astype(spec.dtype)
    tokens = generator.integers(1, 1000, sizes).astype(spec.dtype)
    return tokens if spec.name == "input_ids" else np.ones_like(tokens)


def interleaved(
    engines: tuple[EngineFile, EngineFile], samples: list[dict[str, Array]], *, settle_s: float
) -> Interval:
    """Latency of the first over the second."""
    found = timed_openings(engines, samples, threads=(1, 1), rounds=ROUNDS, settle_s=settle_s)
    return clustered_interval(np.array([np.median(t[:, 0] / t[:, 1]) for t in found]))


def alone(engines: tuple[EngineFile, EngineFile], samples: list[dict[str, Array]]) -> Interval:
    """The same when each runs alone; openings of both take turns."""
    pairs = [[_alone(engine, samples) for engine in engines] for _ in range(OPENINGS)]
    return clustered_interval(np.array([np.median(first / second) for first, second in pairs]))


def _alone(engine: EngineFile, samples: list[dict[str, Array]]) -> Array:
    """``[samples]``: medians of runs in a row."""
    with engine.session(SessionSettings(threads=1)) as session:
        medians = []
        for feeds in samples:
            end = time.perf_counter() + SETTLE_S
            while time.perf_counter() < end:
                session.run(feeds)
            times = []
            for _ in range(RUNS):
                begin = time.perf_counter()
                session.run(feeds)
                times.append(time.perf_counter() - begin)
            medians.append(np.median(times))
    return np.array(medians)


def measure(first: Path, second: Path) -> Record:
    """All of it."""
    float_engine, other = (EngineFile(file=f, runtime="onnxruntime") for f in (first, second))
    samples = inputs_of(onnxio.file_specs(first)[0])
    rows = []
    for settle_s in (0.0, SETTLE_S):
        itself = interleaved((float_engine, float_engine), samples, settle_s=settle_s)
        began = time.monotonic()
        ratio = interleaved((float_engine, other), samples, settle_s=settle_s)
        seconds = time.monotonic() - began
        rows.append(Interleaved(settle_s=settle_s, itself=itself, other=ratio, seconds=seconds))
    return Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        size_bytes=(first.stat().st_size, second.stat().st_size),
        alone=alone((float_engine, other), samples),
        interleaved=tuple(rows),
    )


def main() -> None:
    """Measure, write the record and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engines", type=Path, nargs=2)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    record = measure(*options.engines)
    fs.write_json(options.output, record)
    print(f"alone {record.alone.value:.3f} [{record.alone.low:.3f}, {record.alone.high:.3f}]")
    for row in record.interleaved:
        print(
            f"settled for {1000 * row.settle_s:g} ms: itself {row.itself.value:.3f}"
            f" [{row.itself.low:.3f}, {row.itself.high:.3f}], other {row.other.value:.3f}"
            f" [{row.other.low:.3f}, {row.other.high:.3f}] in {row.seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
