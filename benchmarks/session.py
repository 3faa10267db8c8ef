"""What a session costs over ONNX Runtime itself, and whether it holds out.

    python benchmarks/session.py --model MINILM.onnx --output RECORD.json [--calls 20000]
        [--loads 40] [--requests 270000] [--opens 2000]

Four figures. A run over ``onnxruntime.InferenceSession.run`` on a model of three layers, in turn,
call by call. ``equipoise.load`` of a bundle with its hash check over a session of ONNX Runtime
alone, in turn, on the model that is named. Requests of eight threads on one session: wrong answers,
and growth of memory. Opening and closing: growth of memory. One thread per operator. Linux only:
memory is read from ``/proc``. Times mean nothing while something else computes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import equipoise
from equipoise import fs
from equipoise.bundle.golden import GOLDEN_FILE, Golden, golden_bytes
from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.writer import write_bundle
from equipoise.measure.interval import Interval, median_interval
from equipoise.runtimes.onnxruntime.session import open_session, session_options
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array, ones
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine

VERSIONS = ("equipoise", "numpy", "onnxruntime")
THREADS = 8
SIZES = (32, 64, 64, 10)
SETTINGS = SessionSettings()
WARM_SHARE = 0.1
"""Share of requests and opens before memory counts: pools fill up at first."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ours over ONNX Runtime's, in turn.

    Attributes:
        rounds: Pairs of measurements.
        ours_us: Median of ours, in microseconds.
        theirs_us: Median of ONNX Runtime's.
        ratio: Median of ours over median of theirs.
        of_pairs: Median of the ratios of each pair, with its confidence interval.
    """

    rounds: int
    ours_us: float
    theirs_us: float
    ratio: float
    of_pairs: Interval


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests of threads on one session.

    Attributes:
        threads: Threads that ask.
        requests: Requests of all together.
        mismatches: Answers that are not what the same input gave alone, bit by bit.
        grown_bytes: Resident memory at the end over that after the first tenth.
    """

    threads: int
    requests: int
    mismatches: int
    grown_bytes: int


@dataclass(frozen=True, kw_only=True)
class Opens:
    """Sessions that were opened, run once and closed; memory as in :class:`Requests`."""

    opens: int
    grown_bytes: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """All figures, and where they were measured; ``load`` is of the model that was named."""

    machine: Machine
    versions: dict[str, str]
    model_bytes: int
    run: Ratio
    run_into_buffers: Ratio
    load: Ratio
    load_unchecked: Ratio
    requests: Requests
    opens: Opens


def three_layers(path: Path) -> Path:
    """Write three Gemm with Relu between them: float[batch, 32] to float[batch, 10]."""
    import onnx

    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20]>
        three (float[batch, 32] x) => (float[batch, 10] y) {
            a = Gemm(x, w0, b0)
            b = Relu(a)
            c = Gemm(b, w1, b1)
            d = Relu(c)
            y = Gemm(d, w2, b2)
        }
        """
    )
    random = np.random.default_rng(0)
    for index, shape in enumerate(itertools.pairwise(SIZES)):
        for name, size in ((f"w{index}", shape), (f"b{index}", shape[1:])):
            array = random.normal(size=size).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def raw_session(model: Path, *, spin: bool = False) -> Any:
    """A session of ONNX Runtime with the options of ours."""
    import onnxruntime

    options = session_options(SessionSettings(spin=spin))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def compare(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int) -> Ratio:
    """Time both in turn, the first of each pair changing."""
    times: dict[Callable[[], object], list[int]] = {ours: [], theirs: []}
    for number in range(-max(1, rounds // 20), rounds):
        for call in (ours, theirs) if number % 2 else (theirs, ours):
            start = time.perf_counter_ns()
            call()
            taken = time.perf_counter_ns() - start
            if number >= 0:
                times[call].append(taken)
    mine, other = (np.array(times[call]) / 1e3 for call in (ours, theirs))
    return Ratio(
        rounds=rounds,
        ours_us=float(np.median(mine)),
        theirs_us=float(np.median(other)),
        ratio=float(np.median(mine) / np.median(other)),
        of_pairs=median_interval(mine / other),
    )


def runs(model: Path, *, calls: int) -> tuple[Ratio, Ratio]:
    """A run, and a run into buffers of the caller beside a run and a copy."""
    raw, feeds = raw_session(model), {"x": np.ones((1, SIZES[0]), np.float32)}
    buffers = {"y": np.empty((1, SIZES[-1]), np.float32)}
    with open_session(model, settings=SETTINGS) as session:
        plain = compare(lambda: session.run(feeds), lambda: raw.run(["y"], feeds), rounds=calls)
        into = compare(
            lambda: session.run(feeds, out=buffers),
            lambda: np.copyto(buffers["y"], raw.run(["y"], feeds)[0]),
            rounds=calls,
        )
    return plain, into


def bundle_of(model: Path, directory: Path) -> Path:
    """A bundle of ``model`` with one golden vector of ones."""
    with open_session(model, settings=SETTINGS) as session:
        feeds = ones(session.inputs)
        outputs, specs = session.run(feeds), (session.inputs, session.outputs)
    manifest = Manifest(
        name=model.name,
        target="cpu",
        engine=Engine(
            file="engine.onnx", runtime="onnxruntime", threads=1, size_bytes=model.stat().st_size
        ),
        inputs=specs[0],
        outputs=specs[1],
        files={},
        golden_tolerance=dict.fromkeys(outputs, 1e-3),
        versions={},
    )
    golden = golden_bytes([Golden(inputs=feeds, outputs=outputs, reference=outputs)])
    copies, documents = {"engine.onnx": model}, {GOLDEN_FILE: golden}
    write_bundle(directory, manifest, copies=copies, documents=documents)
    return directory


def loads(model: Path, folder: Path, *, rounds: int) -> tuple[Ratio, Ratio]:
    """``equipoise.load`` with its hash check and without, over a session alone."""
    bundle = bundle_of(model, folder / "bundle")
    engine = bundle / "engine.onnx"

    def raw() -> None:
        raw_session(engine, spin=True)

    checked = compare(lambda: equipoise.load(bundle).close(), raw, rounds=rounds)
    plain = compare(lambda: equipoise.load(bundle, check=False).close(), raw, rounds=rounds)
    return checked, plain


def resident_bytes() -> int:
    """Resident memory of this process."""
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def requests(model: Path, *, count: int) -> Requests:
    """Eight threads ask one session; every answer is compared."""
    random = np.random.default_rng(1)
    inputs = [random.normal(size=(1, SIZES[0])).astype(np.float32) for _ in range(64)]
    share = count // THREADS
    warm = int(share * WARM_SHARE)
    with open_session(model, settings=SETTINGS) as session, ThreadPoolExecutor(THREADS) as pool:
        expected = [session.run({"x": x})["y"] for x in inputs]

        def ask(span: tuple[int, int]) -> int:
            return wrong(session.run, inputs, expected, numbers=range(*span))

        wrongs = sum(pool.map(ask, [(n, n + warm) for n in range(THREADS)]))
        before = resident_bytes()
        wrongs += sum(pool.map(ask, [(n, n + share - warm) for n in range(THREADS)]))
        grown = resident_bytes() - before
    return Requests(threads=THREADS, requests=share * THREADS, mismatches=wrongs, grown_bytes=grown)


def wrong(
    run: Callable[[dict[str, Array]], dict[str, Array]],
    inputs: Sequence[Array],
    expected: Sequence[Array],
    *,
    numbers: range,
) -> int:
    """How many answers differ from what was expected."""
    found = 0
    for number in numbers:
        index = number % len(inputs)
        found += not np.array_equal(run({"x": inputs[index]})["y"], expected[index])
    return found


def opens(model: Path, *, count: int) -> Opens:
    """Open, run, close."""
    feeds = {"x": np.ones((1, SIZES[0]), np.float32)}

    def once() -> None:
        with open_session(model, settings=SETTINGS) as session:
            session.run(feeds)

    for _ in range(int(count * WARM_SHARE)):
        once()
    before = resident_bytes()
    for _ in range(count):
        once()
    return Opens(opens=count, grown_bytes=resident_bytes() - before)


def measure(options: argparse.Namespace, folder: Path) -> Record:
    """All four figures."""
    small = three_layers(folder / "three.onnx")
    # First, while nothing that was freed before hides what grows.
    asked, opened = requests(small, count=options.requests), opens(small, count=options.opens)
    plain, into = runs(small, calls=options.calls)
    checked, unchecked = loads(options.model, folder, rounds=options.loads)
    return Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        model_bytes=options.model.stat().st_size,
        run=plain,
        run_into_buffers=into,
        load=checked,
        load_unchecked=unchecked,
        requests=asked,
        opens=opened,
    )


def main() -> int:
    """Measure, write the record, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--loads", type=int, default=40)
    parser.add_argument("--requests", type=int, default=270_000)
    parser.add_argument("--opens", type=int, default=2_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    fs.write_json(options.output, found)
    sys.stdout.write(options.output.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
