"""What loading a bundle costs over opening its model with ONNX Runtime alone.

    python benchmarks/load.py --model MINILM.onnx --output RECORD.json [--rounds 40]

``equipoise.load`` of a directory and of an archive over ``onnxruntime.InferenceSession`` of the
same file, in turn; with every hash checked, and without. The self-test over one run of the session.
The files are in the page cache. One thread per operator. The time of SHA-256 alone is in the
record: no check of the whole file costs less on that machine. Times mean nothing while something
else computes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _pairs import SETTINGS, Ratio, bundle_of, compare, raw_session

import equipoise
from equipoise import fs
from equipoise.deploy import BundleSession
from equipoise.runtimes.onnxruntime.session import open_session
from equipoise.spec import ones
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine

VERSIONS = ("equipoise", "numpy", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Record:
    """All figures, and where they were measured.

    Attributes:
        machine: The machine.
        versions: Of what was measured.
        model_bytes: Size of the model.
        sha256_us: Median time of SHA-256 over the bytes of the model, in memory.
        directory: Checked load of a directory over a session alone.
        archive: The same of an archive.
        directory_unchecked: Without hashes.
        archive_unchecked: Without hashes.
        selftest: Self-test on one golden sample over one run of a session.
    """

    machine: Machine
    versions: dict[str, str]
    model_bytes: int
    sha256_us: float
    directory: Ratio
    archive: Ratio
    directory_unchecked: Ratio
    archive_unchecked: Ratio
    selftest: Ratio


def loads(bundle: Path, model: Path, *, rounds: int, check: bool) -> Ratio:
    """Load and close, over a session alone."""
    return compare(
        lambda: equipoise.load(bundle, check=check).close(),
        lambda: raw_session(model, spin=True),
        rounds=rounds,
    )


def selftests(bundle: BundleSession, model: Path, *, rounds: int) -> Ratio:
    """The self-test, which reads and verifies its vectors, over one run."""
    with open_session(model, settings=SETTINGS) as session:
        feeds = ones(session.inputs)
        return compare(bundle.selftest, lambda: session.run(feeds), rounds=rounds)


def hashing_us(model: Path, *, rounds: int) -> float:
    """Median time of SHA-256, in microseconds."""
    data, times = model.read_bytes(), []
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        hashlib.sha256(data).digest()
        times.append(time.perf_counter_ns() - begin)
    return float(np.median(times)) / 1e3


def measure(model: Path, folder: Path, *, rounds: int) -> Record:
    """All figures."""
    bundles = {form: bundle_of(model, folder / form) for form in ("bundle", "bundle.zip")}
    checked, plain = (
        {f: loads(path, model, rounds=rounds, check=check) for f, path in bundles.items()}
        for check in (True, False)
    )
    with equipoise.load(bundles["bundle"]) as bundle:
        tested = selftests(bundle, model, rounds=rounds)
    return Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        model_bytes=model.stat().st_size,
        sha256_us=hashing_us(model, rounds=rounds),
        directory=checked["bundle"],
        archive=checked["bundle.zip"],
        directory_unchecked=plain["bundle"],
        archive_unchecked=plain["bundle.zip"],
        selftest=tested,
    )


def main() -> int:
    """Measure, write the record, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.model, Path(folder), rounds=options.rounds)
    fs.write_json(options.output, found)
    sys.stdout.write(options.output.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
