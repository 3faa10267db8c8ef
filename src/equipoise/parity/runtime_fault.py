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

from equipoise import extras, fs
from equipoise.errors import EquipoiseError
from equipoise.parity.cut_model import GIVEN, OUT, Cut, cut_model
from equipoise.parity.locate import Scene
from equipoise.parity.piece_error import PieceError, PieceMeter
from equipoise.parity.pieces import fed, opened, write_scratch
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
    """A value as the runtime gives it: its error, what is allowed, whether that is wrong."""

    error: PieceError
    allowed: float
    wrong: bool


def find_fault(scene: Scene, settings: RuntimeSettings) -> RuntimeFault | None:
    """The piece that the runtime runs wrong; None when the outputs are as the file says."""
    return _Hunt(scene, settings).fault()


class _Hunt:
    """Looks for the piece of a candidate that a runtime runs wrong."""

    def __init__(self, scene: Scene, settings: RuntimeSettings) -> None:
        self._scene, self._graph, self._settings = scene, scene.graph, settings
        self._fails = False

    def fault(self) -> RuntimeFault | None:
        end = self._wrong_output()
        if end is None:
            return None
        nodes = set(self._graph.behind([end], through=self._graph.shared)[0])
        values = [p.value for p in self._graph.pieces() if self._graph.makers[p.value] in nodes]
        return self._grown(*self._halved(values))

    def _wrong_output(self) -> str | None:
        """The first output of the whole candidate that the runtime gives wrong.

        A runtime that takes the candidate but not a cut of it tells nothing by that.
        """
        model, feeds = self._graph.candidate, dict(self._scene.feeds)
        names = [
            str(value.name) for value in model.graph.output if value.name in self._graph.makers
        ]
        with opened(model, settings=self._scene.run.settings) as session:
            written = session.run(feeds)
        try:
            with built(model, self._settings) as session:
                found = session.run(feeds)
        except EquipoiseError:
            self._fails = True
            return names[0]
        meant = [name for name in names if name in self._graph.shared]
        with self._scene.run.giving([self._graph.shared[name] for name in meant]) as giving:
            known = giving(feeds)
        seen = (
            (n, self._judged(n, known=known, written=written[n], found=found[n])) for n in meant
        )
        return next((name for name, one in seen if one.wrong), None)

    def _halved(self, values: Sequence[str]) -> tuple[str, float]:
        """The value behind the first wrong cut, and the largest error before it."""
        right, wrong, before = -1, len(values) - 1, 0.0
        while wrong - right > 1:
            middle = (right + wrong) // 2
            seen = self._seen(self._crossing(values, after=middle))
            if any(one.wrong for one in seen.values()):
                wrong = middle
            else:
                right, before = middle, max((s.error.relative for s in seen.values()), default=0.0)
        return values[wrong], before

    def _crossing(self, values: Sequence[str], *, after: int) -> list[str]:
        """Values up to the index ``after`` that a later node reads; the last of them always."""
        last = self._graph.makers[values[after]]
        return [
            name
            for name in values[: after + 1]
            if name == values[after] or any(i > last for i in self._graph.readers.get(name, []))
        ]

    def _grown(self, value: str, before: float) -> RuntimeFault | None:
        """Grow the piece backwards from ``value``, a layer of shared values at a time.

        None when not even all before ``value`` is wrong once it is cut out of the file.
        """
        through: set[str] = set()
        layer, tested = 0, 0.0
        while True:
            nodes, given, _ = self._graph.behind([value], through=through)
            inner = [name for name in given if name in self._graph.makers]
            if layer >= tested or not inner:
                seen = self._seen([value], through=through)[value]
                if seen.wrong or not inner:
                    break
                tested = max(layer * _GROWTH, layer + 1)
            through.update(inner)
            layer += 1
        if not seen.wrong:
            return None
        return RuntimeFault(
            value=value,
            nodes=nodes,
            given=given,
            error=seen.error,
            allowed=seen.allowed,
            before=before,
        )

    def _seen(self, values: Sequence[str], *, through: set[str] | None = None) -> dict[str, _Seen]:
        """Each value as the runtime gives it, against the same graph as written."""
        scene = self._scene
        computed = set(self._graph.shared) if through is None else through
        ranks = {name: len(shape) for name, shape in scene.shapes.items()}
        model = cut_model(self._graph, values, ranks=ranks, cut=Cut(through=computed))
        known = self._known(model, values)
        with opened(model, settings=scene.run.settings) as session:
            written = fed(session, known)
        try:
            with built(_shaped(model, written), self._settings) as session:
                found = fed(session, known)
        except EquipoiseError as error:
            failed = PieceError(failure=error.message)
            return {n: _Seen(error=failed, allowed=0.0, wrong=self._fails) for n in values}
        return {
            name: self._judged(
                name, known=known, written=written[f"{name}{OUT}"], found=found[f"{name}{OUT}"]
            )
            for name in values
        }

    def _known(self, model: Any, values: Sequence[str]) -> dict[str, Array]:
        """The reference's values of everything that ``model`` takes, and of ``values``."""
        names = {value.name.removesuffix(GIVEN) for value in model.graph.input}
        names |= {self._graph.shared[name] for name in values}
        with self._scene.run.giving(sorted(names)) as giving:
            known: dict[str, Array] = giving(self._scene.feeds)
        return known

    def _judged(
        self, name: str, *, known: Mapping[str, Array], written: Array, found: Array
    ) -> _Seen:
        """Wrong is what is far from the file and from the reference: kernels may be more exact."""
        bounds, meant = self._graph.bounds(name), known[self._graph.shared[name]]
        own, fault, whole = (PieceMeter(bounds) for _ in range(3))
        own.add(meant, written)
        fault.add(written, found)
        whole.add(meant, found)
        error, allowed = fault.result(), max(_LEAST, _TIMES * own.result().relative)
        off = min(error.relative, whole.result().relative)
        wrong = not self._fails and (bool(error.shape) or off > allowed)
        return _Seen(error=error, allowed=allowed, wrong=wrong)


def _shaped(model: Any, written: Mapping[str, Array]) -> Any:
    """``model`` with the ranks and types of its outputs, which some runtimes want to be told."""
    helper = extras.require("onnx").helper
    del model.graph.output[:]
    model.graph.output.extend(
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
        )
        for name, array in written.items()
    )
    return model


@contextmanager
def built(model: Any, settings: RuntimeSettings) -> Any:
    """A session of the runtime on a model in memory; it is built first where that is needed."""
    if settings.runtime == "onnxruntime":
        with opened(model, settings=settings.session) as session:
            yield session
        return
    with fs.scratch_directory() as folder:
        write_scratch(model, folder / "cut.onnx")
        yield from _built(folder, settings)


def _built(folder: Path, settings: RuntimeSettings) -> Any:
    made = builder(settings.runtime).build(
        folder / "cut.onnx", fs.make_directory(folder / "engine"), settings=settings.session
    )
    engine = folder / "engine" / made.file
    session: Session
    with session_opener(settings.runtime)(engine, settings=settings.session) as session:
        yield session
