"""What a precision costs beside the float32 noise of the same model: the factors of the tolerances.

    python benchmarks/parity.py --output RECORD.json [--cases minilm,lite0] [--work DIRECTORY]

``equipoise check`` allows an engine a difference of the model's own float32 noise floor times a
factor of its precision. This program measures that ratio on real weights and held-out inputs: for
the export itself, half precision, 8 bits (several schemes) and 4-bit blocks of ours, and for files
of other quantisers, some of which are known to be bad. A file passes or fails as ``equipoise
check`` says. The models and data are those of ``quantize.py``, and so are the files of other
quantisers where its working directory has them already.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _cases import Case, place_of
from _factories import lite0_code, lite0_weights, minilm_weights

from equipoise import fs
from equipoise.checking import CheckRequest, run_check
from equipoise.checks.verdict import CheckedSide, CheckRecord
from equipoise.data.store import Rows
from equipoise.parity.tolerance import ALLOWANCES, Allowance
from equipoise.stages import default_cache, versions_of
from equipoise.targets.machine import Machine, detect_machine
from quantize import CASES, ours, quantise, say

VERSIONS = ("equipoise", "numpy", "onnx", "onnxruntime", "torch", "transformers")
SOURCES = {
    "minilm": ("module:_factories:minilm", minilm_weights),
    "lite0": ("module:_factories:lite0", lite0_weights),
}
OURS = (
    ours("equipoise"),
    ours("avx2", "--target avx2"),
    ours("float16", "--scheme float16"),
    ours("blocks4", "--scheme blocks"),
)
OTHERS = ("nncf", "ort-minmax", "ort-minmax-u8u8", "ort-dynamic-u8", "quark")
"""Looked at where ``quantize.py`` has made them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file of one case.

    Attributes:
        case: Name of the case.
        way: What made the file.
        precision: What it computes in.
        floors: Largest difference from PyTorch, in noise floors.
        share: The same over the largest value of the reference.
        allowed: What ``equipoise check`` allows, in noise floors.
        sqnr_db: Signal over noise.
        flips: Share of other arg-maxima; None where entries are no classes.
        passed: As ``equipoise check`` says.
    """

    case: str
    way: str
    precision: str
    floors: float
    share: float
    allowed: float
    sqnr_db: float
    flips: float | None
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Record:
    """All of it.

    Attributes:
        machine: What measured.
        versions: Package -> version.
        allowances: Precision -> what it may cost.
        samples: Case -> number of samples.
        rows: One per file.
    """

    machine: Machine
    versions: dict[str, str]
    allowances: dict[str, Allowance]
    samples: dict[str, int]
    rows: tuple[Row, ...]


def files_of(case: Case) -> dict[str, Path]:
    """Way -> file; ours are made where they are not there."""
    made = place_of(case) / "quantized"
    missing = [way for way in OURS if not (made / way.name / "model.onnx").is_file()]
    for row in quantise(case, missing, repeats=1):
        if row.failure:
            sys.exit(f"{case.name}, {row.way}: {row.failure}")
    names = [*(way.name for way in OURS), *OTHERS]
    return {name: file for name in names if (file := made / name / "model.onnx").is_file()}


def check(case: Case, files: dict[str, Path]) -> CheckRecord:
    """``equipoise check`` of all files against PyTorch, on the held-out inputs."""
    source, weights = SOURCES[case.name]
    rows = list(Rows(case.evaluation))
    with fs.scratch_directory() as folder:
        arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        np.savez(folder / "data.npz", allow_pickle=False, **arrays)
        return run_check(
            CheckRequest(
                engines=tuple(files.values()),
                against=source,
                weights=weights(),
                data=str(folder / "data.npz"),
                blame=False,
            )
        )


def rows_of(case: Case, files: dict[str, Path], found: CheckRecord) -> Iterator[Row]:
    """The export, then every file."""
    ways = {str(file): way for way, file in files.items()}
    for checked in found.sides:
        way = ways.get(checked.side.name, "")
        if way or checked.side.name == "float ONNX, optimised":
            yield _row(case, way or "export", checked, floor=found.floors)


def _row(case: Case, way: str, checked: CheckedSide, *, floor: dict[str, float]) -> Row:
    parity = checked.outputs[0]
    unit = floor[parity.name]
    return Row(
        case=case.name,
        way=way,
        precision=checked.side.precision,
        floors=parity.max_abs / unit,
        share=parity.max_abs / parity.scale,
        allowed=checked.allowed[parity.name] / unit,
        sqnr_db=parity.sqnr_db or 0.0,
        flips=parity.flips if case.decides else None,
        passed=checked.passed,
    )


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--work", type=Path, default=default_cache() / "bench-quantize")
    options = parser.parse_args()
    # The source is built in child processes, which look where this one says.
    own = [str(Path(__file__).parent), str(lite0_code())]
    os.environ["PYTHONPATH"] = os.pathsep.join([*own, os.environ.get("PYTHONPATH", "")])
    sys.path[:0] = own
    found = Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        allowances=ALLOWANCES,
        samples={},
        rows=(),
    )
    for name in options.cases:
        case = CASES[name](fs.make_directory(options.work / name))
        files = files_of(case)
        checked = check(case, files)
        rows = tuple(rows_of(case, files, checked))
        for row in rows:
            say(f"{row.case} {row.way}: {row.floors:.3g} floors, allowed {row.allowed:.3g}")
        samples = {**found.samples, name: checked.samples}
        found = replace(found, samples=samples, rows=(*found.rows, *rows))
        fs.write_json(options.output, found)


if __name__ == "__main__":
    main()
