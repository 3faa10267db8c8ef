"""Engines by path: a bundle, a directory that ``equipoise build`` wrote, or an ONNX file."""

from __future__ import annotations

import atexit
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from equipoise import fs
from equipoise.bundle.chooser import check_fits, none_fits
from equipoise.bundle.golden import GOLDEN_FILE, parse_golden
from equipoise.bundle.manifest import Engine, Manifest
from equipoise.bundle.reading import Bundle, is_bundle, open_bundle
from equipoise.data.readers.npz import read_arrays
from equipoise.errors import IncompatibleError, SourceError
from equipoise.graph.cost import ModelCost, analyze
from equipoise.measure.bench import BenchRecord, bench
from equipoise.parity.compare import Comparison, OutputParity
from equipoise.runtimes.device import this_device
from equipoise.runtimes.engine import ENGINE_MANIFEST, EngineFile, read_engine_manifest
from equipoise.runtimes.protocol import SessionSettings
from equipoise.serving.opening import unpack
from equipoise.spec import Array, ones

_STEADY_RUNS: Final = 5
_HELD: Final = ExitStack()
"""Directories with engines from archives, which live as long as this process."""
atexit.register(_HELD.close)


def find_engine(path: Path) -> EngineFile:
    """The engine at ``path``; every file that its manifest lists is checked first.

    Of a bundle, the first that fits this machine. One in an archive is put into a directory of this
    process, for those who measure engines in other processes.

    Raises:
        SourceError: It is nothing that holds an engine.
        IntegrityError: It is not what its manifest says.
        IncompatibleError: None of a bundle's engines fits this machine.
    """
    if (path / ENGINE_MANIFEST).is_file() and not is_bundle(path):
        built = read_engine_manifest(path)
        return EngineFile(
            file=path / built.engine.file,
            runtime=built.runtime,
            providers=built.settings.providers,
        )
    if path.is_dir() or is_bundle(path):
        return _in_bundle(path)
    if not path.is_file():
        raise SourceError(
            f"no such engine: {path}",
            hint="Give a bundle, a directory that `equipoise build` wrote, or an .onnx file.",
        )
    return EngineFile(file=path)


def _in_bundle(path: Path) -> EngineFile:
    with open_bundle(path) as bundle:
        bundle.verify()
        engine = chosen_engine(bundle)
        folder = path
        if path.is_file():
            folder = _HELD.enter_context(fs.scratch_directory())
            unpack(bundle, engine, folder=folder)
    return EngineFile(file=folder / engine.file, runtime=engine.runtime, providers=engine.providers)


def chosen_engine(bundle: Bundle) -> Engine:
    """The first engine that fits this machine. Raises IncompatibleError that says why none does."""
    refused: dict[str, IncompatibleError] = {}
    for engine in bundle.manifest.engines:
        try:
            check_fits(engine, this_device())
        except IncompatibleError as error:
            refused[engine.name] = error
        else:
            return engine
    raise none_fits(bundle.where, refused)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Inputs to run engines on.

    Attributes:
        feeds: One mapping for each sample.
        kind: What they are, in words.
    """

    feeds: tuple[dict[str, Array], ...]
    kind: str


def samples_for(path: Path, *, inputs: Path | None, sizes: Mapping[str, int]) -> Samples:
    """The inputs of a file, the golden ones of a bundle, or ones of the right shapes.

    Args:
        path: What :func:`find_engine` takes.
        inputs: ``.npz`` with one array per input.
        sizes: Dynamic dimension -> size, where there is neither.

    Raises:
        DataError: ``inputs`` cannot be read.
    """
    if inputs is not None:
        return Samples(feeds=(read_arrays(inputs),), kind=f"inputs from {inputs}")
    if is_bundle(path):
        return _golden_samples(path)
    with find_engine(path).session(SessionSettings()) as session:
        feeds = ones(session.inputs, sizes=sizes)
    chosen = ", ".join(f"{name} {size}" for name, size in sizes.items())
    others = "dynamic sizes 1, sequences 16" if not chosen else f"{chosen}, other sizes 1"
    return Samples(feeds=(feeds,), kind=f"synthetic inputs: ones, {others}")


@dataclass(frozen=True, kw_only=True)
class BundleView:
    """What a bundle holds, and what this machine would run of it.

    Attributes:
        bundle: Where it lies.
        manifest: What it holds; every hash has been checked.
        signed: Whether there is a signature; whose, nobody has checked.
        chosen: Name of the engine that runs here; empty when none does.
        unfit: Engine -> why it does not run here.
        cost: What the chosen engine costs, where it is ONNX.
    """

    bundle: str
    manifest: Manifest
    signed: bool
    chosen: str
    unfit: dict[str, str]
    cost: ModelCost | None


def view_bundle(path: Path, *, sizes: Mapping[str, int], top: int) -> BundleView:
    """Look at a bundle.

    Args:
        path: The bundle.
        sizes: Dynamic dimension -> size, for the cost.
        top: How many of the largest tensors to name.

    Raises:
        IntegrityError: It is no bundle, or not what its hashes say.
    """
    with open_bundle(path) as bundle:
        bundle.verify()
        manifest, signed = bundle.manifest, bundle.signature is not None
    unfit = {engine.name: why for engine in manifest.engines if (why := _why_not(engine))}
    fitting = [engine for engine in manifest.engines if engine.name not in unfit]
    cost = None
    if fitting and fitting[0].file.endswith(".onnx"):
        cost = analyze(find_engine(path).file, sizes=sizes, top=top)
    return BundleView(
        bundle=str(path),
        manifest=manifest,
        signed=signed,
        chosen=fitting[0].name if fitting else "",
        unfit=unfit,
        cost=cost,
    )


def _why_not(engine: Engine) -> str:
    try:
        check_fits(engine, this_device())
    except IncompatibleError as error:
        return error.message
    return ""


def _golden_samples(path: Path) -> Samples:
    with open_bundle(path) as bundle:
        vectors = parse_golden(bundle.read(GOLDEN_FILE), where=f"{path}/{GOLDEN_FILE}")
    return Samples(feeds=tuple(dict(v.inputs) for v in vectors), kind="golden inputs")


@dataclass(frozen=True, kw_only=True)
class EngineComparison:
    """One engine beside another, on the same inputs and in the same rounds.

    Attributes:
        outputs: How the outputs of the second differ from those of the first.
        latencies: Of both; the second has its speed-up over the first.
        size_bytes: Bytes on disk of the first and of the second.
    """

    outputs: tuple[OutputParity, ...]
    latencies: tuple[BenchRecord, ...]
    size_bytes: tuple[int, int]


def compare_engines(
    first: Path, second: Path, *, samples: Samples, threads: int, rounds: int
) -> EngineComparison:
    """Run two engines in one process, in interleaved rounds, and compare what they give.

    Raises:
        InputError: The samples do not fit one of them.
        ParityError: The second lacks an output of the first, or gives another shape.
    """
    engines = [find_engine(first), find_engine(second)]
    return EngineComparison(
        outputs=_differences(engines, samples, threads=threads),
        latencies=bench(engines, samples.feeds, threads=threads, rounds=rounds),
        size_bytes=(_size(first), _size(second)),
    )


def _differences(
    engines: Sequence[EngineFile], samples: Samples, *, threads: int
) -> tuple[OutputParity, ...]:
    comparison, settings = Comparison(), SessionSettings(threads=threads)
    with engines[0].session(settings) as reference, engines[1].session(settings) as other:
        for feeds in samples.feeds:
            comparison.add(reference.run(feeds), other.run(feeds))
    return comparison.result()


def _size(path: Path) -> int:
    if is_bundle(path):
        with open_bundle(path) as bundle:
            return chosen_engine(bundle).size_bytes
    return fs.tree_size_bytes(path) if path.is_dir() else path.stat().st_size


@dataclass(frozen=True, kw_only=True)
class Warmth:
    """What the first moments of an engine take, in milliseconds.

    Attributes:
        open_ms: Opening it.
        first_ms: The first inference.
        later_ms: The fastest of the next few.
    """

    open_ms: float
    first_ms: float
    later_ms: float


def prewarm(path: Path, *, samples: Samples, threads: int) -> Warmth:
    """Open an engine and run it a few times, so that what it compiles or caches is there.

    Raises:
        InputError: The samples do not fit it.
    """
    begin = time.perf_counter()
    with find_engine(path).session(SessionSettings(threads=threads)) as session:
        taken = [time.perf_counter() - begin]
        for index in range(1 + _STEADY_RUNS):
            begin = time.perf_counter()
            session.run(samples.feeds[index % len(samples.feeds)])
            taken.append(time.perf_counter() - begin)
    return Warmth(open_ms=1e3 * taken[0], first_ms=1e3 * taken[1], later_ms=1e3 * min(taken[2:]))
