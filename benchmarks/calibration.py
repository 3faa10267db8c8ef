"""Peak memory and time of calibration: ours against ONNX Runtime's calibrators.

    python benchmarks/calibration.py --model FILE.onnx --samples ROWS --output RECORD.json

ROWS is a directory of inputs as the data stage writes them: ``calibration`` or ``evaluation`` below
``<cache>/data/<key>/files``. Each calibrator runs in a process of its own, in turn, on the same
first N rows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from equipoise import fs, record
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine

CALIBRATORS = ("equipoise", "ort-minmax", "ort-percentile")
COUNTS = (32, 128, 512, 2048)
TIME_LIMIT_S = 600


@dataclass(frozen=True, kw_only=True)
class Run:
    """One calibrator on one number of samples; None where it did not finish."""

    calibrator: str
    samples: int
    wall_s: float | None
    peak_bytes: int | None
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Record:
    """All runs, and where they ran."""

    model: str
    machine: Machine
    versions: dict[str, str]
    runs: tuple[Run, ...]


CHILD = """
import sys, time
from pathlib import Path
from equipoise.data.store import Rows, write_rows
from equipoise.measure.memory import peak_resident_bytes
kind, model, rows, count, folder = sys.argv[1:]
source, folder = Rows(Path(rows)), Path(folder)
chosen = [source[i] for i in range(min(int(count), len(source)))]
if kind == "equipoise":
    from equipoise.quantize.calibrate import CalibrateConfig, calibrate
    write_rows(folder / "rows", chosen)
    begin = time.perf_counter()
    calibrate(CalibrateConfig(model=Path(model), samples=folder / "rows"), output=folder)
else:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
    class Reader(CalibrationDataReader):
        def __init__(self): self.rows = iter(chosen)
        def get_next(self): return next(self.rows, None)
    begin = time.perf_counter()
    calibrator = create_calibrator(
        model, None, augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=getattr(
            CalibrationMethod, {"ort-minmax": "MinMax", "ort-percentile": "Percentile"}[kind]
        ),
    )
    calibrator.collect_data(Reader())
    calibrator.compute_data()
print(time.perf_counter() - begin, peak_resident_bytes())
"""


def measure(kind: str, model: Path, rows: Path, count: int) -> Run:
    """Run one calibrator in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, kind, str(model), str(rows), str(count), folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            failure = f"not finished after {TIME_LIMIT_S} s"
            return Run(
                calibrator=kind, samples=count, wall_s=None, peak_bytes=None, failure=failure
            )
    if done.returncode:
        failure = done.stderr.strip().splitlines()[-1]
        return Run(calibrator=kind, samples=count, wall_s=None, peak_bytes=None, failure=failure)
    wall, peak = done.stdout.split()[-2:]
    return Run(calibrator=kind, samples=count, wall_s=float(wall), peak_bytes=int(peak))


def main() -> None:
    """Measure all calibrators on all numbers of samples and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    runs = []
    for count in COUNTS:
        for kind in CALIBRATORS:
            runs.append(measure(kind, options.model, options.samples, count))
            print(record.dumps(runs[-1]), flush=True)
    found = Record(
        model=f"{options.model.name}, {options.model.stat().st_size} bytes",
        machine=detect_machine(),
        versions=versions_of(("equipoise", "numpy", "onnx", "onnxruntime")),
        runs=tuple(runs),
    )
    fs.write_json(options.output, found)


if __name__ == "__main__":
    main()
