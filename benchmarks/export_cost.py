"""What a proved export costs: ``equipoise export`` against a bare ``torch.onnx.export``.

    python benchmarks/export_cost.py --minilm DIRECTORY --output RECORD.json [--repeats 3]

DIRECTORY is a transformers directory of MiniLM for token classification. EfficientNet-Lite0 comes
from two packages that are downloaded and read, never installed. Each run is a process tree of its
own, from its start to its exit, with an empty cache; the two ways take turns. The bare script loads
the same model, exports it with dynamic sizes and saves it: it proves nothing. Linux only: memory is
read from ``/proc``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import _processes
from _factories import LITE0_INPUT, lite0_code, lite0_weights

from equipoise import fs, record
from equipoise.stages import versions_of
from equipoise.targets.machine import Machine, detect_machine

WAYS = ("equipoise", "bare")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, and how each way exports it.

    Attributes:
        name: For the record.
        ours: Arguments of ``equipoise export`` without the output.
        bare: Source of the bare script; its argument is the file to write.
        path: Folders to import from.
    """

    name: str
    ours: tuple[str, ...]
    bare: str
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One export. Its time and memory are those of ``_processes.Cost``.

    Attributes:
        model: Name of the model.
        way: One of ``WAYS``.
        wall_s: Of the whole tree of processes.
        largest_bytes: Of its largest process.
        sum_bytes: Of all of them at one time.
        file_bytes: The file with its external data.
    """

    model: str
    way: str
    wall_s: float
    largest_bytes: int
    sum_bytes: int
    file_bytes: int


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Medians of ours over medians of the bare script."""

    model: str
    wall: float
    largest: float
    sum: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """All runs in their order, and where they ran."""

    machine: Machine
    versions: dict[str, str]
    runs: tuple[Run, ...]
    ratios: tuple[Ratio, ...]


# The models.

BARE_MINILM = """
import sys, torch, transformers
model = transformers.AutoModelForTokenClassification.from_pretrained({source!r}).eval()
ids = torch.randint(1000, 2000, (2, 32))
inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
sizes = dict.fromkeys(inputs, {{0: "batch", 1: "sequence"}})
program = torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=sizes, dynamo=True)
program.save(sys.argv[1])
"""
BARE_LITE0 = """
import sys, torch, _factories
model = _factories.lite0()
model.load_state_dict(torch.load({weights!r}, weights_only=True, map_location="cpu"))
pixels = torch.randn(2, 3, 224, 224)
program = torch.onnx.export(
    model.eval(), (pixels,), dynamic_shapes=({{0: "batch"}},), dynamo=True
)
program.save(sys.argv[1])
"""


def minilm(directory: Path) -> Model:
    """MiniLM with a head for token classification."""
    source = str(directory.resolve())
    return Model(name="MiniLM", ours=(source,), bare=BARE_MINILM.format(source=source))


def lite0() -> Model:
    """EfficientNet-Lite0 with its ImageNet weights, from packages."""
    weights = str(lite0_weights())
    return Model(
        name="EfficientNet-Lite0",
        ours=("module:_factories:lite0", "--weights", weights, "--input", LITE0_INPUT),
        bare=BARE_LITE0.format(weights=weights),
        path=os.pathsep.join([str(Path(__file__).parent.resolve()), str(lite0_code())]),
    )


# Measuring.


def measure(model: Model, way: str) -> Run:
    """One export in a process tree of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        command = _command(model, way, place / "model.onnx")
        environment = _environment(model, cache=place / "cache")
        cost = _processes.run(command, place, environment=environment)
        if cost.failure:
            sys.exit(f"{model.name}, {way}: exit code {cost.code}\n{cost.log}")
        files = sum(part.stat().st_size for part in place.glob("model.onnx*"))
    return Run(
        model=model.name,
        way=way,
        wall_s=cost.wall_s,
        largest_bytes=cost.largest_bytes,
        sum_bytes=cost.sum_bytes,
        file_bytes=files,
    )


def _command(model: Model, way: str, file: Path) -> list[str]:
    if way == "bare":
        return [sys.executable, "-c", model.bare, str(file)]
    options = ["-o", str(file), "--json"]
    return [sys.executable, "-m", "equipoise", "export", *model.ours, *options]


def _environment(model: Model, *, cache: Path) -> dict[str, str]:
    return {
        "EQUIPOISE_CACHE_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": model.path,
    }


# Joining.


def ratio(model: str, runs: Sequence[Run]) -> Ratio:
    """Medians of ours over medians of the bare script."""
    ours, bare = (_medians(model, way, runs) for way in WAYS)
    of = {name: ours[name] / bare[name] for name in ours}
    return Ratio(model=model, wall=of["wall_s"], largest=of["largest_bytes"], sum=of["sum_bytes"])


def _medians(model: str, way: str, runs: Sequence[Run]) -> Mapping[str, float]:
    chosen = [run for run in runs if run.model == model and run.way == way]
    names = ("wall_s", "largest_bytes", "sum_bytes")
    return {name: statistics.median(getattr(run, name) for run in chosen) for name in names}


def main() -> None:
    """Measure both models both ways in turn, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    models = (minilm(options.minilm), lite0())
    runs = []
    for _ in range(options.repeats):
        for model in models:
            for way in WAYS:
                runs.append(measure(model, way))
                print(record.dumps(runs[-1]), flush=True)
    found = Record(
        machine=detect_machine(),
        versions=versions_of(("equipoise", "torch", "transformers", "onnx", "onnxscript")),
        runs=tuple(runs),
        ratios=tuple(ratio(model.name, runs) for model in models),
    )
    fs.write_json(options.output, found)


if __name__ == "__main__":
    main()
