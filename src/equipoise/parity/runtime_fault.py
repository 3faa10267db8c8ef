"""Where a runtime makes something else of a file than the file says.

A cut after one of the shared values leaves the nodes before it; what crosses it is given out. The
first cut at which the runtime is wrong is found by halving, and from its value the piece is grown
backwards until it is wrong by itself: a rewrite or kernel shows only when all its nodes are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import fs, onnxio
from equipoise.errors import EquipoiseError
from equipoise.parity.cut_model import GIVEN, OUT, Cut, cut_model
from equipoise.parity.locate import Scene
from equipoise.parity.piece_error import PieceError, PieceMeter
from equipoise.parity.pieces import fed, opened
from equipoise.runtimes.protocol import Session, SessionSettings
from equipoise.runtimes.registry import builder, session_opener
from equipoise.spec import Array

_LEAST: Final = 1024 * 2.0**-23
"""No order of summation moves a float32 network by as much."""

_TIMES: Final = 2.0
"""Kernels of integers round otherwise than the file says. A fault is what is off by more than this
many times what the file itself is off from the reference."""

_GROWTH: Final = 1.5


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """Attributes: runtime: Name of a runtime. session: How it runs."""

    runtime: str
    session: SessionSettings


@dataclass(frozen=True, kw_only=True)
class RuntimeFault:
    """The smallest piece found that the runtime runs wrong.

    Attributes:
        value: The value that is wrong.
        nodes: Indices of the nodes of the piece, in order.
        given: Values of the candidate that were given.
        error: The runtime against the file as written, on the same inputs.
        allowed: Largest relative error that was allowed.
        before: Largest relative error among what crosses the last cut at which all was right.
    """

    value: str
    nodes: tuple[int, ...]
    given: tuple[str, ...]
    error: PieceError
    allowed: float
    before: float


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A value as the runtime gives it: its error and what is allowed."""

    error: PieceError
    allowed: float

    @property
    def wrong(self) -> bool:
        return bool(self.error.failure or self.error.shape) or self.error.relative > self.allowed


def find_fault(scene: Scene, settings: RuntimeSettings) -> RuntimeFault | None:
    """The piece that the runtime runs wrong; None when the outputs are as the file says."""
    graph = scene.graph
    values = [piece.value for piece in graph.pieces()]
    outputs = [name for name in values if name in graph.outputs]
    wrong = [name for name, seen in _seen(scene, settings, outputs).items() if seen.wrong]
    if not wrong:
        return None
    values = _before(scene, values, end=wrong[0])
    return _grown(scene, settings, *_halved(scene, settings, values))


def _before(scene: Scene, values: Sequence[str], *, end: str) -> list[str]:
    """Those of ``values`` from which ``end`` is made, and itself."""
    nodes = set(scene.graph.behind([end], through=scene.graph.shared)[0])
    return [name for name in values if scene.graph.makers[name] in nodes]


def _halved(scene: Scene, settings: RuntimeSettings, values: Sequence[str]) -> tuple[str, float]:
    """The value behind the first wrong cut, and the largest error before it."""
    right, wrong, before = -1, len(values) - 1, 0.0
    while wrong - right > 1:
        middle = (right + wrong) // 2
        seen = _seen(scene, settings, _crossing(scene, values, after=middle))
        if any(one.wrong for one in seen.values()):
            wrong = middle
        else:
            right, before = middle, max((s.error.relative for s in seen.values()), default=0.0)
    return values[wrong], before


def _crossing(scene: Scene, values: Sequence[str], *, after: int) -> list[str]:
    """Values up to the index ``after`` that a later node reads; the last of them always."""
    graph, last = scene.graph, scene.graph.makers[values[after]]
    return [
        name
        for name in values[: after + 1]
        if name == values[after] or any(i > last for i in graph.readers.get(name, []))
    ]


def _grown(scene: Scene, settings: RuntimeSettings, value: str, before: float) -> RuntimeFault:
    """Grow the piece backwards from ``value``, a layer of shared values at a time."""
    graph = scene.graph
    through: set[str] = set()
    layer, tested = 0, 0.0
    while True:
        nodes, given, _ = graph.behind([value], through=through)
        inner = [name for name in given if name in graph.makers]
        if layer >= tested or not inner:
            seen = _seen(scene, settings, [value], through=through)[value]
            if seen.wrong or not inner:
                break
            tested = max(layer * _GROWTH, layer + 1)
        through.update(inner)
        layer += 1
    return RuntimeFault(
        value=value,
        nodes=nodes,
        given=given,
        error=seen.error,
        allowed=seen.allowed,
        before=before,
    )


def _seen(
    scene: Scene,
    settings: RuntimeSettings,
    values: Sequence[str],
    *,
    through: set[str] | None = None,
) -> dict[str, _Seen]:
    """Each value as the runtime gives it, against the same graph as written."""
    graph = scene.graph
    computed = set(graph.shared) if through is None else through
    ranks = {name: len(shape) for name, shape in scene.shapes.items()}
    model = cut_model(graph, values, ranks=ranks, cut=Cut(through=computed))
    known = _known(scene, model, values)
    with opened(model, settings=scene.run.settings) as session:
        written = fed(session, known)
    try:
        with built(model, settings) as session:
            found: Mapping[str, Array] = fed(session, known)
    except EquipoiseError as error:
        failed = PieceError(failure=error.message)
        return {name: _Seen(error=failed, allowed=0.0) for name in values}
    return {
        name: _judged(scene, name, known=known, written=written, found=found) for name in values
    }


def _known(scene: Scene, model: Any, values: Sequence[str]) -> dict[str, Array]:
    """The reference's values of everything that ``model`` takes, and of ``values``."""
    names = {value.name.removesuffix(GIVEN) for value in model.graph.input}
    names |= {scene.graph.shared[name] for name in values}
    with scene.run.giving(sorted(names)) as giving:
        known: dict[str, Array] = giving(scene.feeds)
    return known


def _judged(
    scene: Scene,
    name: str,
    *,
    known: Mapping[str, Array],
    written: Mapping[str, Array],
    found: Mapping[str, Array],
) -> _Seen:
    bounds = scene.graph.bounds(name)
    own, fault = PieceMeter(bounds), PieceMeter(bounds)
    own.add(known[scene.graph.shared[name]], written[f"{name}{OUT}"])
    fault.add(written[f"{name}{OUT}"], found[f"{name}{OUT}"])
    return _Seen(error=fault.result(), allowed=max(_LEAST, _TIMES * own.result().relative))


@contextmanager
def built(model: Any, settings: RuntimeSettings) -> Any:
    """A session of the runtime on a model in memory; it is built first where that is needed."""
    if settings.runtime == "onnxruntime":
        with opened(model, settings=settings.session) as session:
            yield session
        return
    with fs.scratch_directory() as folder:
        onnxio.save_model(model, folder / "cut.onnx")
        yield from _built(folder, settings)


def _built(folder: Path, settings: RuntimeSettings) -> Any:
    made = builder(settings.runtime).build(
        folder / "cut.onnx", fs.make_directory(folder / "engine"), settings=settings.session
    )
    engine = folder / "engine" / made.file
    session: Session
    with session_opener(settings.runtime)(engine, settings=settings.session) as session:
        yield session
