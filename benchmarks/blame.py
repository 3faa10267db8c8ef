"""Is the guilty node named? Faults planted by hand into real models, and none planted at all.

    python benchmarks/blame.py --output RECORD.json [--table TABLE.md] [--cases minilm,lite0]
        [--seeds 5] [--work FOLDER]

MiniLM and EfficientNet-Lite0 as benchmarks/quantize.py makes them, on held-out inputs. Six faults,
each at several random places: a changed weight, a swapped transpose, a wrong epsilon, a saturating
int8 layer, a wrong pad (in MiniLM, of the padding mask), a bad fusion. The weight is changed in the
float16 and in the int8 file as well. A hit is the planted node named first. Beside it a plain
comparison of the files' values by name, in which the first that is off by more than a threshold is
named: at every threshold, since a user does not know which. Files without a fault, of several
makers, say how often somebody is named who did nothing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import _faults
import _processes
import numpy as np
from _cases import CASES, Case
from _factories import lite0_weights

from equipoise import fs, onnxio
from equipoise.data.store import Rows
from equipoise.errors import EquipoiseError
from equipoise.graph.fuse import FuseConfig, fuse
from equipoise.parity.blame import Blame, BlameSettings, find_blame
from equipoise.parity.cut import CutGraph
from equipoise.parity.cut_model import GIVEN, OUT, Cut, cut_model
from equipoise.parity.pieces import ReferenceRun, fed, opened
from equipoise.spec import Array, Feeds
from equipoise.stages import default_cache, versions_of
from equipoise.targets.machine import Machine, detect_machine

SAMPLES = 2
HUGE = 1e9
MOST_PLACES = 50
THRESHOLDS = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
VERSIONS = ("equipoise", "numpy", "onnx", "onnxruntime", "onnxscript", "torch")


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One fault at one place.

    Attributes:
        case: Model.
        form: File into which it was planted.
        fault: Which.
        seed: Of the place.
        node: The guilty node.
        places: How many places were drawn until an output showed the fault on these inputs.
        felt: Largest difference of an output from the same file without the fault, over the largest
            value.
        named: Node that was named first; empty for none.
        module: Module that was named.
        relative: Error of the named piece.
        allowed: What its arithmetic explains.
        departures: Pieces that depart.
        by_name: What the plain comparison names, in the order of ``THRESHOLDS``; empty for none.
    """

    case: str
    form: str
    fault: str
    seed: int
    node: str
    places: int
    felt: float
    named: str
    module: str
    relative: float
    allowed: float
    departures: int
    by_name: tuple[str, ...]

    @property
    def hit(self) -> bool:
        """Whether the guilty node was named first."""
        return self.named == self.node


@dataclass(frozen=True, kw_only=True)
class Honest:
    """A file without a planted fault.

    Attributes:
        case: Model.
        form: How the file was made.
        named: Node that was named; empty for none.
        words: What was said of it.
        departures: Pieces that depart.
        pieces: Pieces that were compared.
        by_name: As in :class:`Planted`.
    """

    case: str
    form: str
    named: str
    words: str
    departures: int
    pieces: int
    by_name: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything, and where it was run."""

    machine: Machine
    versions: dict[str, str]
    samples: int
    seeds: int
    thresholds: tuple[float, ...]
    planted: tuple[Planted, ...]
    honest: tuple[Honest, ...]


# Files.


def _quantised(case: Case, scheme: str, folder: Path) -> Path:
    """The model quantised by our command line; kept between runs."""
    file = folder / f"{scheme}.onnx"
    if not file.is_file():
        data = ["--data", str(case.calibration), "--scheme", scheme, "--quiet"]
        words = [sys.executable, "-m", "equipoise", "quantize", str(case.model), *data]
        cost = _processes.run([*words, "-o", str(file)], folder, environment={})
        if cost.failure:
            sys.exit(f"{case.name} cannot be quantised by {scheme}: {cost.log}")
    return file


def _by_onnxruntime(case: Case, level: str, folder: Path) -> Path:
    """The model as ONNX Runtime's own optimiser writes it."""
    import onnxruntime as ort

    file = folder / f"onnxruntime-{level}.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}"
    )
    options.optimized_model_filepath = str(file)
    options.log_severity_level = 3
    ort.InferenceSession(str(case.model), options, providers=["CPUExecutionProvider"])
    return file


def _by_onnxscript(case: Case, folder: Path) -> Path | None:
    """The model after our fusion stage; None where that finds nothing."""
    place = fs.make_directory(folder / "onnxscript")
    made = fuse(FuseConfig(model=case.model), output=place)
    return place / "model.onnx" if made.fusions else None


def files_of(case: Case, folder: Path) -> dict[str, Path]:
    """Form -> file without a fault."""
    fused = _by_onnxscript(case, folder)
    files = {
        "float": case.model,
        "float16": _quantised(case, "float16", folder),
        "int8": _quantised(case, "static", folder),
        "onnxruntime basic": _by_onnxruntime(case, "basic", folder),
        "onnxruntime extended": _by_onnxruntime(case, "extended", folder),
    }
    return files if fused is None else {**files, "onnxscript": fused}


def _statistics() -> dict[str, dict[str, Array]]:
    """Batch normalisations of EfficientNet-Lite0 before they were folded."""
    import torch

    found: dict[str, dict[str, Array]] = {}
    for name, tensor in torch.load(lite0_weights(), weights_only=True).items():
        module, _, leaf = name.rpartition(".")
        if "_bn" in module:
            found.setdefault(module, {})[leaf] = tensor.numpy()
    return found


def faults_of(case: Case, files: Mapping[str, Path]) -> dict[tuple[str, str], _faults.Planter]:
    """(fault, form of file) -> what plants it."""
    convolutional = case.kind == "cnn"
    fused = "onnxscript" if "onnxscript" in files else "onnxruntime extended"
    return {
        ("changed weight", "float"): _faults.changed_weight,
        ("swapped transpose", "float"): _faults.swapped_transpose,
        ("wrong epsilon", "float"): _faults.folded_epsilon(_statistics())
        if convolutional
        else _faults.wrong_epsilon,
        ("saturating layer", "int8"): _faults.saturating,
        ("wrong pad", "float"): _faults.wrong_padding if convolutional else _faults.wrong_mask,
        ("bad fusion", fused): _faults.bad_fusion,
        ("changed weight", "float16"): _faults.changed_weight,
        ("changed weight", "int8"): _faults.changed_weight,
    }


# Finding.


def inputs_of(case: Case) -> list[dict[str, Array]]:
    """The first held-out inputs; of texts, the first with padding."""
    rows = Rows(case.evaluation)
    padded = (row for row in rows if not row.get("attention_mask", np.zeros(1)).all())
    return list(itertools.islice(padded, SAMPLES))


def found(case: Case, file: Path, feeds: Sequence[Feeds]) -> Blame:
    """What is blamed."""
    settings = BlameSettings(samples=SAMPLES)
    return find_blame(case.model, file, feeds=feeds, settings=settings)


def by_name(case: Case, file: Path, feeds: Feeds) -> tuple[str, ...]:
    """For each threshold the first node whose value, all errors before it included, is off by more.

    The difference is the largest one over the largest value of the reference.
    """
    original, candidate = onnxio.load_model(case.model), onnxio.load_model(file)
    onnxio.name_nodes(candidate)
    graph = CutGraph(candidate, original)
    errors = _cumulated(graph, ReferenceRun(case.model), feeds)
    order = [piece.value for piece in graph.pieces() if errors]
    firsts = (next((n for n in order if errors[n] > limit), None) for limit in THRESHOLDS)
    return tuple("" if first is None else _maker(graph, first) for first in firsts)


def _maker(graph: CutGraph, value: str) -> str:
    """The node that makes a value; of what comes back from a grid, the one that puts it there."""
    node = graph.node(graph.makers[value])
    before = graph.quantizer(node) if node.op_type == "DequantizeLinear" else None
    return str((node if before is None else before).name)


def _cumulated(graph: CutGraph, run: ReferenceRun, feeds: Feeds) -> dict[str, float]:
    """Value -> its error in the whole candidate; a candidate that does not run has none."""
    shapes = run.shapes(graph, feeds)
    ranks = {name: len(shape) for name, shape in shapes.items()}
    values = [piece.value for piece in graph.pieces()]
    model = cut_model(graph, values, ranks=ranks, cut=Cut(through=graph.shared))
    inputs = [value.name.removesuffix(GIVEN) for value in model.graph.input]
    try:
        with (
            run.giving([*inputs, *(graph.shared[name] for name in values)]) as giving,
            opened(model, settings=run.settings) as session,
        ):
            known = giving(feeds)
            given = fed(session, known)
    except EquipoiseError:
        return {}
    return {name: _off(known[graph.shared[name]], given[f"{name}{OUT}"]) for name in values}


def _off(wanted: Array, given: Array) -> float:
    """Largest difference over the largest finite value; equal infinities are no difference."""
    if wanted.shape != given.shape:
        return float("inf")
    left, right = wanted.astype(np.float64), given.astype(np.float64)
    scale = float(np.abs(left[np.isfinite(left)]).max(initial=0.0))
    with np.errstate(invalid="ignore"):
        difference = np.where(left == right, 0.0, np.abs(right - left))
    largest = float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))
    return largest / scale if scale else largest


def _felt(sound: Path, faulty: Path, feeds: Sequence[Feeds]) -> float:
    """Largest difference of an output over its largest value; huge when it does not run."""
    settings = BlameSettings().session
    try:
        with (
            opened(onnxio.load_model(sound), settings=settings) as left,
            opened(onnxio.load_model(faulty), settings=settings) as right,
        ):
            pairs = [(left.run(dict(one)), right.run(dict(one))) for one in feeds]
    except EquipoiseError:
        return HUGE
    return min(HUGE, max(_off(a[name], b[name]) for a, b in pairs for name in a))


@dataclass(frozen=True, kw_only=True)
class Sown:
    """As in :class:`Planted`."""

    node: str
    places: int
    felt: float


def _sow(
    plant: _faults.Planter, sound: Path, faulty: Path, *, seed: int, feeds: Sequence[Feeds]
) -> Sown:
    """Plant a fault where an output shows it: a channel that is always zero shows none."""
    rng = np.random.default_rng(seed)
    for places in range(1, MOST_PLACES + 1):
        model = onnxio.load_model(sound)
        onnxio.name_nodes(model)
        node = plant(model, rng)
        onnxio.save_model(model, faulty)
        felt = _felt(sound, faulty, feeds)
        if felt:
            return Sown(node=node, places=places, felt=felt)
    sys.exit(f"no output of {sound} shows the fault at any of {MOST_PLACES} places")


def planted(case: Case, folder: Path, *, seeds: int) -> Iterator[Planted]:
    """Every fault at every place."""
    feeds, files = inputs_of(case), files_of(case, folder)
    for (fault, form), plant in faults_of(case, files).items():
        for seed in range(seeds):
            sown = _sow(plant, files[form], folder / "planted.onnx", seed=seed, feeds=feeds)
            blame = found(case, folder / "planted.onnx", feeds)
            first = blame.first
            yield Planted(
                case=case.name,
                form=form,
                fault=fault,
                seed=seed,
                node=sown.node,
                places=sown.places,
                felt=sown.felt,
                named=first.node if first else "",
                module=first.module if first else "",
                relative=min(first.relative, HUGE) if first else 0.0,
                allowed=first.allowed if first else 0.0,
                departures=blame.departures,
                by_name=by_name(case, folder / "planted.onnx", feeds[0]),
            )


def honest(case: Case, folder: Path) -> Iterator[Honest]:
    """Every file without a fault, ours and those that other quantisers left in the work folder."""
    feeds, files = inputs_of(case), files_of(case, folder)
    for other in ("ort-minmax", "ort-percentile", "ort-dynamic-s8", "nncf", "quark"):
        file = case.model.parent / "quantized" / other / "model.onnx"
        if file.is_file():
            files[other] = file
    for form, file in files.items():
        blame = found(case, file, feeds)
        yield Honest(
            case=case.name,
            form=form,
            named=blame.first.node if blame.first else "",
            words=blame.in_words(),
            departures=blame.departures,
            pieces=blame.pieces,
            by_name=by_name(case, file, feeds[0]),
        )


# The table.


def markdown(record: Record) -> str:
    """Hits per fault and model beside the best threshold of the plain comparison; false alarms."""
    machine = record.machine
    head = f"Measured on {machine.cpu}, {record.samples} inputs, {record.seeds} places per fault."
    return "\n\n".join([head, "\n".join(_hits(record)), "\n".join(_alarms(record)), ""])


def _hits(record: Record) -> Iterator[str]:
    thresholds = [f"by name, {t:g}" for t in record.thresholds]
    yield f"| model | file | fault | named first | {' | '.join(thresholds)} |"
    yield f"|{' --- |' * (4 + len(thresholds))}"
    for key in dict.fromkeys((p.case, p.form, p.fault) for p in record.planted):
        rows = [p for p in record.planted if (p.case, p.form, p.fault) == key]
        plain = [sum(p.by_name[i] == p.node for p in rows) for i in range(len(thresholds))]
        cells = [sum(p.hit for p in rows), *plain]
        yield f"| {' | '.join(key)} | {' | '.join(f'{n}/{len(rows)}' for n in cells)} |"


def _alarms(record: Record) -> Iterator[str]:
    thresholds = [f"by name, {t:g}" for t in record.thresholds]
    yield f"| model | file without a fault | named | {' | '.join(thresholds)} |"
    yield f"|{' --- |' * (3 + len(thresholds))}"
    for row in record.honest:
        cells = [name or "–" for name in (row.named, *row.by_name)]
        yield f"| {row.case} | {row.form} | {' | '.join(cells)} |"


# Joining.


def measure(cases: Sequence[Case], *, seeds: int, say: Callable[[str], None]) -> Record:
    """All cases."""
    faulty: list[Planted] = []
    sound: list[Honest] = []
    for case in cases:
        folder = fs.make_directory(case.model.parent / "blame")
        for one in planted(case, folder, seeds=seeds):
            say(
                f"{one.case}, {one.form}, {one.fault}, {one.seed}: {'hit' if one.hit else 'MISS'}"
                f" planted {one.node} felt {one.felt:.2g} named {one.named} ({one.departures})"
            )
            faulty.append(one)
        for other in honest(case, folder):
            say(f"{other.case}, {other.form}: {other.words}")
            sound.append(other)
    return Record(
        machine=detect_machine(),
        versions=versions_of(VERSIONS),
        samples=SAMPLES,
        seeds=seeds,
        thresholds=THRESHOLDS,
        planted=tuple(faulty),
        honest=tuple(sound),
    )


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> None:
    """Plant, find, write the record and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--cases", default="minilm,lite0")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=default_cache() / "bench-quantize")
    options = parser.parse_args()
    names = options.cases.split(",")
    cases = [CASES[name](fs.make_directory(options.work / name)) for name in names]
    record = measure(cases, seeds=options.seeds, say=_say)
    fs.write_json(options.output, record)
    if options.table:
        fs.write_text(options.table, markdown(record))


if __name__ == "__main__":
    main()
