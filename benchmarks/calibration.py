"""Peak memory and time of calibration: ours, ONNX Runtime's calibrators, and one inference.

    python benchmarks/calibration.py --model FILE.onnx --samples ROWS --output RECORD.json

--model and --samples may be given several times, in pairs.

ROWS is a directory of inputs as the data stage writes them: ``calibration`` or ``evaluation`` below
``<cache>/data/<key>/files``. Each run is a process of its own, in turn, on the first N rows; where
there are fewer, they come again from the first. Peak memory is that of the whole process, with the
interpreter and the runtime; ``inference`` loads the model and runs the largest row.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from equipoise import fs, record
from equipoise.data.store import Rows, write_rows
from equipoise.spec import Array
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine

OURS = ("minmax", "percentile", "entropy", "mse")
PLAN = (
    ("inference", 1),
    *((f"equipoise-{method}", count) for count in (128, 512, 2048) for method in OURS),
    *((f"ort-{method}", 128) for method in ("MinMax", "Percentile", "Entropy")),
)
"""Runs on each model: what, and on how many samples."""

TIME_LIMIT_S = 900


@dataclass(frozen=True, kw_only=True)
class Run:
    """One calibrator on one number of samples; None where it did not finish.

    Attributes:
        calibrator: ``inference``, ``equipoise-`` or ``ort-`` and the method.
        samples: Number of samples.
        wall_s: Seconds, imports and interpreter apart.
        peak_bytes: Peak resident memory of the process.
        of_inference: ``peak_bytes`` over that of ``inference`` on the same model.
        failure: Why it did not finish.
    """

    calibrator: str
    samples: int
    wall_s: float | None = None
    peak_bytes: int | None = None
    of_inference: float | None = None
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """All runs on one model.

    Attributes:
        model: Name and size.
        rows: Number of different samples.
        runs: In the order they were made.
    """

    model: str
    rows: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """All cases, and where they ran."""

    machine: Machine
    versions: dict[str, str]
    cases: tuple[Case, ...]


CHILD = """
import sys, time
from pathlib import Path
from equipoise.data.store import Rows
from equipoise.measure.memory import peak_resident_bytes
kind, model, rows, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
maker, _, method = kind.partition("-")

def infer():
    from equipoise.runtimes.onnxruntime.session import open_session
    from equipoise.runtimes.protocol import SessionSettings
    with open_session(model, settings=SessionSettings()) as session:
        session.run(Rows(rows)[0])

def calibrate_ours():
    from equipoise.quantize.calibrate import CalibrateConfig, calibrate
    from equipoise.quantize.statistics import read_statistics
    from equipoise.quantize.ranges import Entropy, MinMax, Mse, Percentile, choose_ranges
    methods = {m.kind: m for m in (MinMax(), Percentile(), Entropy(), Mse())}
    calibrate(CalibrateConfig(model=model, samples=rows), output=folder)
    choose_ranges(read_statistics(folder).tensors, methods[method])

def calibrate_theirs():
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
    class Reader(CalibrationDataReader):
        def __init__(self): self.rows = iter(Rows(rows))
        def get_next(self): return next(self.rows, None)
    calibrator = create_calibrator(
        model, None, augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=getattr(CalibrationMethod, method),
    )
    # The same threads as ours.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    calibrator.infer_session = onnxruntime.InferenceSession(
        calibrator.augmented_model_path, options, providers=["CPUExecutionProvider"]
    )
    calibrator.collect_data(Reader())
    calibrator.compute_data()

begin = time.perf_counter()
{"inference": infer, "equipoise": calibrate_ours, "ort": calibrate_theirs}[maker]()
print(time.perf_counter() - begin, peak_resident_bytes())
"""


def measure(kind: str, model: Path, *, rows: Path, count: int) -> Run:
    """Make one run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, kind, str(model), str(rows), folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            failure = f"not finished after {TIME_LIMIT_S} s"
            return Run(calibrator=kind, samples=count, failure=failure)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        failure = lines[-1] if lines else f"ended with status {done.returncode}"
        return Run(calibrator=kind, samples=count, failure=failure)
    wall, peak = done.stdout.split()[-2:]
    return Run(calibrator=kind, samples=count, wall_s=float(wall), peak_bytes=int(peak))


def taken(rows: Rows, count: int) -> Iterator[dict[str, Array]]:
    """The first ``count`` rows, from the first again where there are fewer."""
    return (rows[index % len(rows)] for index in range(count))


def largest(rows: Rows) -> dict[str, Array]:
    """The row with the most values."""
    return max(rows, key=lambda row: sum(array.size for array in row.values()))


def measure_model(model: Path, samples: Path, *, most: int) -> Case:
    """Make all runs on one model that take at most ``most`` samples."""
    rows, runs = Rows(samples), []
    with tempfile.TemporaryDirectory() as folder:
        for count, plan in itertools.groupby(PLAN, key=lambda step: step[1]):
            if count > most:
                continue
            chosen = Path(folder, str(count))
            write_rows(chosen, [largest(rows)] if count == 1 else taken(rows, count))
            for kind, _ in plan:
                runs.append(compared(measure(kind, model, rows=chosen, count=count), runs))
                print(model.name, record.dumps(runs[-1]), flush=True)
    return Case(
        model=f"{model.name}, {model.stat().st_size} bytes", rows=len(rows), runs=tuple(runs)
    )


def compared(run: Run, before: list[Run]) -> Run:
    """``run`` with its memory over that of the inference before it."""
    inference = before[0].peak_bytes if before else run.peak_bytes
    if not inference or not run.peak_bytes:
        return run
    return Run(
        calibrator=run.calibrator,
        samples=run.samples,
        wall_s=run.wall_s,
        peak_bytes=run.peak_bytes,
        of_inference=run.peak_bytes / inference,
    )


def main() -> None:
    """Measure all calibrators on all models and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, action="append", required=True)
    parser.add_argument("--samples", type=Path, action="append", required=True)
    parser.add_argument("--most", type=int, default=2048, help="skip runs on more samples")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if len(options.model) != len(options.samples):
        parser.error("give --samples once for each --model")
    pairs = zip(options.model, options.samples, strict=True)
    found = Record(
        machine=detect_machine(),
        versions=versions_of(("equipoise", "numpy", "onnx", "onnxruntime")),
        cases=tuple(measure_model(model, rows, most=options.most) for model, rows in pairs),
    )
    fs.write_json(options.output, found)


if __name__ == "__main__":
    main()
