"""The table stage: what each layer costs at each width, measured on the target's runtime."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from equipoise import fs, onnxio
from equipoise.compress.latency.bare import bare
from equipoise.compress.latency.operators import OneLayer, nothing, one_layer
from equipoise.compress.latency.shapes import (
    WEIGHT_BYTES,
    Precision,
    check_shape,
    weight_values,
)
from equipoise.compress.latency.timing import Timed, Turns, median_of, time_in_turns
from equipoise.compress.structure import LayerShape
from equipoise.data.store import Rows
from equipoise.errors import InputError, UsageError
from equipoise.measure.interval import Interval
from equipoise.measure.kernels import kernels_of
from equipoise.runtimes.engine import EngineFile
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import builder
from equipoise.spec import Array
from equipoise.targets.machine import detect_machine
from equipoise.targets.profile import Int8Scheme

_SESSION_BYTES: Final = 4 << 20
"""What an open session takes besides its weights, which it holds twice: as given, and packed."""

_SHARE_OF_MEMORY: Final = 0.25
_MOST_SESSIONS: Final = 600
_MOST_SAMPLES: Final = 16
_CHAIN: Final = 33
_EMPTY: Final = 2
"""Models that do nothing: one of one node, and one of many."""


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """What to measure.

    Attributes:
        shapes: Layers, as ``shapes_of`` lists them.
        runtime: Runtime of the target.
        machine: Description of the machine, so that a table is never taken for another's.
        scheme: How the target wants its integers.
        precision: Of the layers.
        threads: Threads per operator.
        static: Whether the model's batch and positions are fixed; TensorRT takes no others here.
        rounds: Rounds over all layers at most; it stops when every median is certain to 3 %.
        working_sets: Bytes that one inference of a whole model reads, of models of several sizes,
            rising. Between two calls of a layer others read as much, so that its weights lie where
            they would lie in that model.
        providers: Execution providers or devices of the runtime.
        whole: Engine of the whole model in the same precision, timed among its layers; None for
            none.
        samples: Directory of its inputs, at the sizes that the shapes have.
    """

    shapes: tuple[LayerShape, ...]
    runtime: str
    machine: str
    scheme: Int8Scheme
    precision: Precision = "float32"
    threads: int = 1
    static: bool = False
    rounds: int = 30
    working_sets: tuple[int, ...] = (0,)
    providers: tuple[str, ...] = ()
    whole: Path | None = None
    samples: Path | None = None


@dataclass(frozen=True, kw_only=True)
class LayerLatency:
    """One layer.

    Attributes:
        shape: What was measured.
        latency_ms: Milliseconds of a call less what it costs by itself, for each working set of the
            table.
    """

    shape: LayerShape
    latency_ms: tuple[Interval, ...]


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """Measured latencies of layers.

    Attributes:
        working_sets: Bytes that others read between two calls, rising.
        layers: The layers.
        call_ms: A call that does nothing, at the largest working set.
        node_ms: What every node takes before it begins; the layers have it in them.
        whole_ms: The whole model, the call with it; None where none was given.
        whole_nodes: Nodes that the runtime runs of it; 0 where it does not say.
        runtime: Runtime that ran them.
        precision: Of the layers.
        threads: Threads per operator.
        machine: Description of the machine.
        rounds: Times that each was timed.
        took_s: Seconds that the table took.
    """

    working_sets: tuple[int, ...]
    layers: tuple[LayerLatency, ...]
    call_ms: Interval
    node_ms: float
    whole_ms: Interval | None
    whole_nodes: int
    runtime: str
    precision: Precision
    threads: int
    machine: str
    rounds: int
    took_s: float


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What was measured in one go."""

    layers: tuple[LayerLatency, ...]
    call_ms: Interval
    node_ms: float
    whole_ms: Interval | None
    rounds: int


def measure_layers(config: TableConfig, *, output: Path) -> LayerTable:  # noqa: ARG001
    """Measure every layer of ``config``; ``output`` stays empty, the record has it all.

    Raises:
        InputError: There is no layer to measure, or there can be no such layer.
        UsageError: There is no such runtime, or a whole model is given without samples.
        SourceError: The runtime refuses a layer.
    """
    begin = time.perf_counter()
    _check(config)
    parts = [_measure(config, shapes) for shapes in _parts(config)]
    return LayerTable(
        working_sets=config.working_sets,
        layers=tuple(layer for part in parts for layer in part.layers),
        call_ms=parts[0].call_ms,
        node_ms=parts[0].node_ms,
        whole_ms=parts[0].whole_ms,
        whole_nodes=_whole_nodes(config),
        runtime=config.runtime,
        precision=config.precision,
        threads=config.threads,
        machine=config.machine,
        rounds=min(part.rounds for part in parts),
        took_s=time.perf_counter() - begin,
    )


def _check(config: TableConfig) -> None:
    if not config.shapes:
        raise InputError("no layer to measure", hint="Give the shapes that shapes_of() lists.")
    if (config.whole is None) != (config.samples is None):
        raise UsageError("a whole model is timed on samples: give both, or none of them")
    if config.rounds < 1:
        raise UsageError(f"rounds is {config.rounds}; it has to be at least 1")
    if not config.working_sets or list(config.working_sets) != sorted(set(config.working_sets)):
        raise UsageError(f"working sets are {config.working_sets}; they have to rise")
    for shape in config.shapes:
        check_shape(shape)


def _parts(config: TableConfig) -> Iterator[tuple[LayerShape, ...]]:
    """The shapes, each once, in parts whose engines fit into memory side by side."""
    limit = detect_machine().memory_bytes * _SHARE_OF_MEMORY
    part: list[LayerShape] = []
    held = 0
    for shape in dict.fromkeys(config.shapes):
        needed = _SESSION_BYTES + 2 * weight_values(shape) * WEIGHT_BYTES[config.precision]
        if part and (held + needed > limit or len(part) == _MOST_SESSIONS):
            yield tuple(part)
            part, held = [], 0
        part.append(shape)
        held += needed
    yield tuple(part)


def _measure(config: TableConfig, shapes: Sequence[LayerShape]) -> _Part:
    """Open an engine for each of ``shapes``, and time them in turns with a call of nothing."""
    with ExitStack() as stack:
        timed = [_opened(nothing(nodes=count), config, stack) for count in (1, _CHAIN)]
        timed += [_opened(_layer(shape, config), config, stack) for shape in shapes]
        timed += _whole(config, stack)
        turns = Turns(
            rounds=config.rounds,
            least_rounds=min(config.rounds, Turns.least_rounds),
            working_sets=config.working_sets,
        )
        rows = time_in_turns(timed, turns=turns)
    calls, chains = ([median_of(each[:, [i]])[0] for each in rows] for i in range(_EMPTY))
    node_ms = max(0.0, (chains[-1].value - calls[-1].value) / (_CHAIN - 1))
    last = _EMPTY + len(shapes)
    layers = [
        median_of(each[:, _EMPTY:last], less=max(0.0, call.value - node_ms))
        for each, call in zip(rows, calls, strict=True)
    ]
    whole = median_of(np.concatenate(rows[:, :, last:]))
    return _Part(
        layers=tuple(
            LayerLatency(shape=shape, latency_ms=tuple(intervals))
            for shape, *intervals in zip(shapes, *layers, strict=True)
        ),
        call_ms=calls[-1],
        node_ms=node_ms,
        whole_ms=whole[0] if whole else None,
        rounds=rows.shape[1],
    )


def _settings(config: TableConfig) -> SessionSettings:
    return SessionSettings(threads=config.threads, providers=config.providers)


def _layer(shape: LayerShape, config: TableConfig) -> OneLayer:
    return one_layer(shape, precision=config.precision, scheme=config.scheme, static=config.static)


def _opened(layer: OneLayer, config: TableConfig, stack: ExitStack) -> Timed:
    """An engine of one layer; its file is gone once it is open."""
    settings = _settings(config)
    model, feeds = layer.model, layer.feeds
    if config.runtime == "onnxruntime" and not _accelerated(config):
        model, feeds = bare(model, feeds, settings=settings)
    read = model.ByteSize() + sum(array.nbytes for array in feeds.values())
    with fs.scratch_directory() as folder:
        onnxio.save_model(model, folder / "layer.onnx")
        made = builder(config.runtime).build(
            folder / "layer.onnx", fs.make_directory(folder / "engine"), settings=settings
        )
        file = EngineFile(file=folder / "engine" / made.file, runtime=config.runtime)
        session = stack.enter_context(file.session(settings))
    return Timed(session=session, feeds=(feeds,), read_bytes=read)


def _accelerated(config: TableConfig) -> bool:
    return any(name != "CPUExecutionProvider" for name in config.providers)


def _whole(config: TableConfig, stack: ExitStack) -> list[Timed]:
    """The whole model, which leaves the caches by itself as it found them."""
    if config.whole is None or config.samples is None:
        return []
    file = EngineFile(file=config.whole, runtime=config.runtime)
    session = stack.enter_context(file.session(_settings(config)))
    rows = Rows(config.samples)
    feeds = tuple(_copied(rows[index]) for index in range(min(len(rows), _MOST_SAMPLES)))
    return [Timed(session=session, feeds=feeds, read_bytes=config.working_sets[-1])]


def _whole_nodes(config: TableConfig) -> int:
    if config.whole is None:
        return 0
    engine = EngineFile(file=config.whole, runtime=config.runtime, providers=config.providers)
    return sum(kernels_of(engine, threads=config.threads).values())


def _copied(row: dict[str, Array]) -> dict[str, Array]:
    """Arrays of its own, where those of a store on disk cannot be written."""
    return {name: np.array(array) for name, array in row.items()}
