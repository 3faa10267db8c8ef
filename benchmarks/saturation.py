"""What a CPU with AVX2 and no VNNI makes of int8 files: predicted, and run there.

    python benchmarks/quantize.py --cases minilm,lite0 ... --work FOLDER   # makes the files
    python benchmarks/saturation.py --work FOLDER --output RECORD.json [--table TABLE.md]

Takes the files that benchmarks/quantize.py left in its work folder. Each is simulated with exact
and with saturating sums, and run by ONNX Runtime on this CPU if it has no VNNI, else in
``qemu-x86_64 -cpu Haswell``, which computes the same bits slowly. Signal to noise is against the
float file, on the first held-out inputs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise import fs, onnxio
from equipoise.data.store import Rows
from equipoise.parity.compare import Comparison
from equipoise.quantize.saturation import saturation, simulating
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array
from equipoise.stages import default_cache, versions_of
from equipoise.targets.machine import Machine, detect_machine

CASES = ("minilm", "lite0")
WAYS = ("ort-minmax", "equipoise", "avx2", "7bit")
"""What ONNX Runtime's quantiser makes, ours with 8-bit weights for VNNI, ours for AVX2, and ours
with 7-bit weights everywhere."""

ROWS = 10
EMULATOR = ("qemu-x86_64", "-cpu", "Haswell")
RUNNER = """
import sys
import numpy as np
import onnxruntime as ort

model, rows, output = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
given = np.load(rows)
count = int(given["rows"])
names = [value.name for value in session.get_inputs()]
found = [session.run(None, {n: given[f"{i}.{n}"] for n in names})[0] for i in range(count)]
np.savez(output, *found)
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file; signal to noise in dB.

    Attributes:
        case: Model.
        way: How it was quantised.
        exact_db: With exact sums, simulated.
        predicted_db: With sums that saturate in 16 bits, simulated.
        run_db: As ONNX Runtime gives it without VNNI.
        layers: Layers that can saturate.
        saturating: Layers of them in which a sum is cut off.
        worst_share: Largest share of a layer's sums that is cut off.
    """

    case: str
    way: str
    exact_db: float
    predicted_db: float
    run_db: float
    layers: int
    saturating: int
    worst_share: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """All files, and where they were run."""

    machine: Machine
    versions: dict[str, str]
    emulated: bool
    rows: int
    files: tuple[Row, ...]


def row(work: Path, case: str, way: str) -> Row:
    """Simulate and run one file."""
    feeds = list(Rows(work / case / "evaluation"))[:ROWS]
    with session_opener("onnxruntime")(
        work / case / "model.onnx", settings=SessionSettings()
    ) as session:
        wanted = [session.run(one) for one in feeds]
    file = work / case / "quantized" / way / "model.onnx"
    model = onnxio.load_model(file)
    onnxio.name_nodes(model)
    layers = saturation(model, feeds)
    simulated = [_simulated(model, feeds, saturate=saturate) for saturate in (False, True)]
    exact, predicted, run = (
        _decibel(wanted, outputs) for outputs in (*simulated, _run(file, feeds, wanted[0]))
    )
    return Row(
        case=case,
        way=way,
        exact_db=exact,
        predicted_db=predicted,
        run_db=run,
        layers=len(layers),
        saturating=sum(layer.share > 0 for layer in layers),
        worst_share=max((layer.share for layer in layers), default=0.0),
    )


Outputs = list[dict[str, Array]]


def _simulated(model: object, feeds: list[dict[str, Array]], *, saturate: bool) -> Outputs:
    with simulating(model, saturate=saturate) as run:
        return [run(one) for one in feeds]


def emulator() -> tuple[str, ...]:
    """What to put before a command so that it runs without VNNI."""
    flags = detect_machine().flags
    return () if "avx2" in flags and not any("vnni" in flag for flag in flags) else EMULATOR


def _run(file: Path, feeds: list[dict[str, Array]], like: Mapping[str, Array]) -> Outputs:
    with fs.scratch_directory() as folder:
        arrays = {
            f"{i}.{name}": array for i, one in enumerate(feeds) for name, array in one.items()
        }
        with fs.replacing(folder / "rows.npz") as path:
            np.savez(path, allow_pickle=False, rows=np.array(len(feeds)), **arrays)
        fs.write_text(folder / "runner.py", RUNNER)
        command = [*emulator(), sys.executable, folder / "runner.py", file]
        subprocess.run([*command, folder / "rows.npz", folder / "found.npz"], check=True)
        found = np.load(folder / "found.npz")
        return [{next(iter(like)): found[f"arr_{i}"]} for i in range(len(feeds))]


def _decibel(wanted: Outputs, given: Outputs) -> float:
    comparison = Comparison()
    for reference, output in zip(wanted, given, strict=True):
        comparison.add({name: reference[name] for name in output}, output)
    return comparison.result()[0].sqnr_db or np.inf


def table(found: Record) -> str:
    """Markdown."""
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda r: r.case,
        "quantised by": lambda r: r.way,
        "exact sums, dB": lambda r: f"{r.exact_db:.2f}",
        "predicted, dB": lambda r: f"{r.predicted_db:.2f}",
        "run, dB": lambda r: f"{r.run_db:.2f}",
        "layers that cut off": lambda r: f"{r.saturating} of {r.layers}",
        "most sums cut off": lambda r: f"{r.worst_share:.2%}",
    }
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(cell(r) for cell in columns.values())} |" for r in found.files]
    return "\n".join([*lines, ""])


def main() -> None:
    """Simulate, run, write the record and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--work", type=Path, default=default_cache() / "bench-quantize")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        for way in WAYS:
            rows.append(row(options.work, case, way))
            sys.stderr.write(f"{rows[-1]}\n")
    found = Record(
        machine=detect_machine(),
        versions=versions_of(("equipoise", "numpy", "onnx", "onnxruntime")),
        emulated=bool(emulator()),
        rows=ROWS,
        files=tuple(rows),
    )
    fs.write_json(options.output, found)
    if options.table:
        fs.write_text(options.table, table(found))


if __name__ == "__main__":
    main()
