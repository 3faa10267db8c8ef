"""What a session costs over ONNX Runtime itself, and whether it holds out.

    python benchmarks/session.py --output RECORD.json [--calls 20000] [--requests 270000]
        [--opens 2000]

Four figures, on a model of three layers. A run over ``onnxruntime.InferenceSession.run``, in turn,
call by call; and a run of a bundle over that. Requests of eight threads on one session: wrong
answers, and growth of memory. Opening and closing: growth of memory. One thread per operator. Linux
only: memory is read from ``/proc``. Times mean nothing while something else computes. What loading
costs is in ``load.py``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _pairs import SETTINGS, Ratio, bundle_of, compare, raw_session

import equipoise
from equipoise import fs
from equipoise.runtimes.onnxruntime.session import open_session
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine

VERSIONS = ("equipoise", "numpy", "onnxruntime")
THREADS = 8
SIZES = (32, 64, 64, 10)
WARM_SHARE = 0.1
"""Share of requests and opens before memory counts: pools fill up at first."""


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
    """All figures, and where they were measured; ``bundle`` is over a session of ours."""

    machine: Machine
    versions: dict[str, str]
    run: Ratio
    run_into_buffers: Ratio
    bundle: Ratio
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


def bundled(model: Path, folder: Path, *, calls: int) -> Ratio:
    """A run of a bundle, counted and hot swappable, over that of a session alone."""
    feeds = {"x": np.ones((1, SIZES[0]), np.float32)}
    settings = SessionSettings(spin=True)
    with (
        equipoise.load(bundle_of(model, folder / "bundle")) as ours,
        open_session(model, settings=settings) as bare,
    ):
        return compare(lambda: ours.run(feeds), lambda: bare.run(feeds), rounds=calls)


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
    counted = bundled(small, folder, calls=options.calls)
    return Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        run=plain,
        run_into_buffers=into,
        bundle=counted,
        requests=asked,
        opens=opened,
    )


def main() -> int:
    """Measure, write the record, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=20_000)
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
