"""What the runtime makes of a quantised graph: what stays in float, and what each node costs."""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from equipoise import extras, fs
from equipoise.errors import SourceError
from equipoise.quantize.layers import LAYERS
from equipoise.quantize.pairs import DEQUANTIZE, PAIR, QUANTIZE, Wiring, wiring
from equipoise.runtimes.onnxruntime.session import open_inference_session, session_options
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Feeds

_MADE_UP: Final = re.compile(r"(_token_\d+|_nchwc|/duplicated)+$")
"""What ONNX Runtime appends to the name of a node that it rewrites."""

_FLOAT_LAYERS: Final = LAYERS | {"FusedConv", "FusedGemm", "FusedMatMul"}
_KERNEL: Final = "_kernel_time"
_REWRITTEN: Final = "rewritten.onnx"
_MOST_RUNS: Final = 1000
"""Profiles hold a million events at most."""


@dataclass(frozen=True, kw_only=True)
class RewrittenGraph:
    """A quantised graph after the runtime's own rewriting, for this machine.

    Attributes:
        operators: Type of operator -> count.
        islands: Nodes that compute in float between a DequantizeLinear and a QuantizeLinear: each
            pays for the detour and gains nothing.
        fallbacks: Convolutions and products that read dequantised values and compute in float.
        pairs: Names of the QuantizeLinear and DequantizeLinear nodes that are left.
    """

    operators: dict[str, int]
    islands: tuple[str, ...]
    fallbacks: tuple[str, ...]
    pairs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NodeTime:
    """Median time of one node over runs, in milliseconds.

    Attributes:
        name: Node, without what the runtime appends to names.
        operator: Its kernel in the quantised model; in the float one if it is only there.
        float_ms: In the float model; None when the runtime has merged it or it is not there.
        quantized_ms: The same in the quantised model.
    """

    name: str
    operator: str
    float_ms: float | None
    quantized_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel that the runtime runs.

    Attributes:
        name: As the runtime calls it.
        operator: Type of operator.
        inputs: Tensors that it reads.
        outputs: Tensors that it gives.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def rewritten_graph(model: Path, *, threads: int = 1) -> RewrittenGraph:
    """Let ONNX Runtime rewrite a model and look at what is left.

    Raises:
        SourceError: ONNX Runtime refuses the model.
    """
    rewritten = _rewritten(model, threads=threads)
    nodes, wires = rewritten.graph.node, wiring(rewritten)
    floats = [node for node in nodes if _reads_dequantized(node, wires)]
    return RewrittenGraph(
        operators=dict(sorted(Counter(str(node.op_type) for node in nodes).items())),
        islands=tuple(plain_name(node.name) for node in floats if _is_rounded(node, wires)),
        fallbacks=tuple(plain_name(n.name) for n in floats if n.op_type in _FLOAT_LAYERS),
        pairs=tuple(str(node.name) for node in nodes if node.op_type in PAIR),
    )


def _rewritten(model: Path, *, threads: int) -> Any:
    """The graph after the runtime's rewriting, without its large weights."""
    with fs.scratch_directory() as folder:
        options = _keeping_graph(folder, threads=threads)
        open_inference_session(model, options=options)
        return _kept_graph(folder)


def _keeping_graph(folder: Path, *, threads: int) -> Any:
    """Options of a session that writes its rewritten graph into ``folder``."""
    options = session_options(SessionSettings(threads=threads))
    options.optimized_model_filepath = str(folder / _REWRITTEN)
    return options


def _kept_graph(folder: Path) -> Any:
    return extras.require("onnx").load(folder / _REWRITTEN, load_external_data=False)


def _reads_dequantized(node: Any, wires: Wiring) -> bool:
    makers = (wires.producers.get(name) for name in node.input)
    return node.op_type not in PAIR and any(
        m is not None and m.op_type == DEQUANTIZE for m in makers
    )


def _is_rounded(node: Any, wires: Wiring) -> bool:
    readers = (reader for name in node.output for reader in wires.readers.get(name, []))
    return any(reader.op_type == QUANTIZE for reader in readers)


def plain_name(name: str) -> str:
    """The name of a node as the file has it."""
    return _MADE_UP.sub("", name)


def node_times(
    original: Path, quantized: Path, *, feeds: Sequence[Feeds], runs: int, threads: int = 1
) -> tuple[NodeTime, ...]:
    """Profile both models, the costliest node of the quantised one first.

    Args:
        original: Float ONNX file.
        quantized: Quantised ONNX file.
        feeds: Samples, taken in turn.
        runs: Measured runs of each model, after one that is not measured.
        threads: Threads per operator.
    """
    before, after = (
        _plainly_named(_kernel_times(path, feeds=feeds, runs=runs, threads=threads))
        for path in (original, quantized)
    )
    before = _by_node(before, original=original, quantized=quantized)
    kernels = {name: kernel for found in (before, after) for name, (kernel, _) in found.items()}
    times = [
        NodeTime(
            name=name,
            operator=kernel,
            float_ms=before[name][1] if name in before else None,
            quantized_ms=after[name][1] if name in after else None,
        )
        for name, kernel in kernels.items()
    ]
    return tuple(sorted(times, key=lambda t: (-(t.quantized_ms or 0.0), -(t.float_ms or 0.0))))


Times = dict[str, tuple[str, float]]
"""Kernel or node -> (operator, median milliseconds of one run of the model)."""


def _plainly_named(times: Times) -> Times:
    """Under the name in the file; what the runtime has made several of takes the time of all."""
    found: Times = {}
    for name, (operator, milliseconds) in times.items():
        plain = plain_name(name)
        first, before = found.get(plain, (operator, 0.0))
        found[plain] = first, before + milliseconds
    return found


def _by_node(times: Times, *, original: Path, quantized: Path) -> Times:
    """Blocked convolutions are called by what they give; call them by the node that gives it."""
    onnx: Any = extras.require("onnx")
    nodes, others = (
        onnx.load(path, load_external_data=False).graph.node for path in (original, quantized)
    )
    known = {node.name for node in nodes}
    makers = {name: str(node.name) for node in (*nodes, *others) for name in node.output}
    return {n if n in known else makers.get(n, n): found for n, found in times.items()}


def _kernel_times(model: Path, *, feeds: Sequence[Feeds], runs: int, threads: int) -> Times:
    """Profile a model: the time of each kernel, under the name that the runtime gives it."""
    options = session_options(SessionSettings(threads=threads))
    return _profile(model, options, feeds=feeds, runs=runs)


def profile_kernels(
    model: Path, *, feeds: Sequence[Feeds], runs: int, least_s: float = 0.0, threads: int = 1
) -> tuple[tuple[Kernel, ...], Times]:
    """Profile a model: its kernels, in the order of the rewritten graph, and the time of each.

    Both are of one session: the runtime makes up other names when it rewrites the graph again.

    Args:
        model: ONNX file.
        feeds: Samples, taken in turn.
        runs: Measured runs at least, after one that is not measured.
        least_s: Seconds of runs at least: small models need many until caches are warm.
        threads: Threads per operator.

    Raises:
        SourceError: ONNX Runtime refuses the model, or cannot run it on the samples.
    """
    with fs.scratch_directory() as folder:
        options = _keeping_graph(folder, threads=threads)
        times = _profile(model, options, feeds=feeds, runs=runs, least_s=least_s)
        return tuple(map(_kernel, _kept_graph(folder).graph.node)), times


def _kernel(node: Any) -> Kernel:
    return Kernel(
        name=str(node.name),
        operator=str(node.op_type),
        inputs=tuple(node.input),
        outputs=tuple(node.output),
    )


def run_ms(
    model: Path, *, feeds: Sequence[Feeds], runs: int, least_s: float = 0.0, threads: int = 1
) -> float:
    """Median milliseconds of one run that is not profiled; arguments as above.

    Raises:
        SourceError: ONNX Runtime refuses the model, or cannot run it on the samples.
    """
    options = session_options(SessionSettings(threads=threads))
    session = open_inference_session(model, options=options)
    times = _run(session, model, feeds=feeds, runs=runs, least_s=least_s)
    return median(times[1:]) * 1000


def _profile(
    model: Path, options: Any, *, feeds: Sequence[Feeds], runs: int, least_s: float = 0.0
) -> Times:
    with fs.scratch_directory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        session = open_inference_session(model, options=options)
        try:
            _run(session, model, feeds=feeds, runs=runs, least_s=least_s)
        finally:
            written = Path(session.end_profiling())
        return _medians(fs.read_text(written, error=SourceError))


def _run(
    session: Any, model: Path, *, feeds: Sequence[Feeds], runs: int, least_s: float
) -> list[float]:
    """Seconds of each run: ``runs`` and one at least, and more until ``least_s`` have passed."""
    times: list[float] = []
    end = time.monotonic() + least_s
    try:
        while len(times) <= runs or (time.monotonic() < end and len(times) < _MOST_RUNS):
            given = dict(feeds[len(times) % len(feeds)])
            begin = time.perf_counter()
            session.run(None, given)
            times.append(time.perf_counter() - begin)
    except Exception as error:  # onnxruntime has no common base class
        raise SourceError(f"ONNX Runtime cannot run {model}: {error}") from error
    return times


def _medians(profile: str) -> Times:
    """Medians over the runs but the first, of the events of a profile."""
    kernels: dict[str, str] = {}
    durations: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(profile):
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            name = event["name"].removesuffix(_KERNEL)
            kernels[name] = event["args"]["op_name"]
            durations[name].append(event["dur"] / 1000)
    return {n: (kernels[n], median(values[1:] or values)) for n, values in durations.items()}
