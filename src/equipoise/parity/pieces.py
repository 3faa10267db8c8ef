"""The error of every piece of a candidate, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from equipoise import extras, fs, onnxio
from equipoise.errors import EquipoiseError
from equipoise.parity.cut import CutGraph, Piece
from equipoise.parity.cut_model import GIVEN, OUT, Cut, Form, cut_model
from equipoise.parity.piece_error import PieceError, PieceMeter
from equipoise.runtimes.protocol import Session, SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array, Feeds

_SHAPE: Final = "#shape"
_SMALL_BYTES: Final = 1_000_000_000
Measured = tuple[Piece, PieceError]


def measure_pieces(
    graph: CutGraph, run: ReferenceRun, *, feeds: Sequence[Feeds], group_bytes: int
) -> list[Measured]:
    """Every piece of the candidate with its error, in graph order.

    Args:
        graph: The candidate and its reference.
        run: The reference, run.
        feeds: Real inputs.
        group_bytes: Bytes of values and weights that are held at a time; one piece at the least.

    Raises:
        InputError: The feeds do not fit the reference.
        SourceError: The runtime does not take the reference.
    """
    sizes = run.shapes(graph, feeds[0])
    found: list[Measured] = []
    for group in _groups(graph, sizes, limit=group_bytes):
        found += _measure(graph, run, group, feeds=feeds, sizes=sizes)
    return found


Shapes = Mapping[str, tuple[int, ...]]


class ReferenceRun:
    """The reference, run as written, with values of its inside given out.

    Args:
        path: ONNX file.
        threads: Threads per operator.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        self._model = onnxio.load_model(path)
        self._types = onnxio.value_types(self._model)
        self._threads = threads

    @property
    def settings(self) -> SessionSettings:
        """As written, by ONNX Runtime."""
        return SessionSettings(threads=self._threads, optimize="none")

    def shapes(self, graph: CutGraph, feeds: Feeds) -> dict[str, tuple[int, ...]]:
        """Value -> its shape on ``feeds``, of every value that the candidate shares."""
        helper: Any = extras.require("onnx.helper")
        names = sorted(set(graph.shared.values()))
        model = onnxio.copied(self._model)
        del model.graph.output[:]
        for name in names:
            model.graph.node.append(helper.make_node("Shape", [name], [f"{name}{_SHAPE}"]))
            info = helper.make_tensor_value_info(f"{name}{_SHAPE}", 7, None)
            model.graph.output.append(info)
        with opened(model, settings=self.settings) as session:
            found = session.run(dict(feeds))
        return {name: tuple(found[f"{name}{_SHAPE}"].tolist()) for name in names}

    @contextmanager
    def giving(self, names: Sequence[str]) -> Iterator[Any]:
        """A function from feeds to the values ``names``."""
        helper: Any = extras.require("onnx.helper")
        inputs = {value.name for value in self._model.graph.input}
        asked = [name for name in dict.fromkeys(names) if name not in inputs]
        model = onnxio.copied(self._model)
        del model.graph.output[:]
        model.graph.output.extend(
            helper.make_tensor_value_info(name, self._types[name], None) for name in asked
        )
        if not asked:
            yield lambda feeds: {name: feeds[name] for name in names}
            return
        with opened(model, settings=self.settings) as session:
            yield lambda feeds: {
                name: array
                for name, array in {**feeds, **session.run(dict(feeds))}.items()
                if name in names
            }


@contextmanager
def opened(
    model: Any, *, settings: SessionSettings, runtime: str = "onnxruntime"
) -> Iterator[Session]:
    """A session of a model in memory."""
    with fs.scratch_directory() as folder:
        write_scratch(model, folder / "cut.onnx")
        with session_opener(runtime)(folder / "cut.onnx", settings=settings) as session:
            yield session


def write_scratch(model: Any, path: Path) -> None:
    """Write a model that nobody keeps: a small one without waiting for the disk."""
    if sum(tensor.ByteSize() for tensor in model.graph.initializer) > _SMALL_BYTES:
        onnxio.save_model(model, path)
        return
    with fs.appending(path) as file:
        file.write(model.SerializeToString())


def _groups(graph: CutGraph, shapes: Shapes, *, limit: int) -> Iterator[list[Piece]]:
    """Pieces in order, in groups whose values and weights fit into ``limit`` bytes."""
    group: list[Piece] = []
    held: dict[str, int] = {}
    for piece in graph.pieces():
        values = {graph.shared[name] for name in (*piece.reads, piece.value)}
        needed = {name: 4 * math.prod(shapes[name]) for name in values}
        needed |= {name: graph.constants[name].ByteSize() for name in piece.constants}
        if group and sum({**held, **needed}.values()) > limit:
            yield group
            group, held = [], {}
        group.append(piece)
        held.update(needed)
    if group:
        yield group


def _measure(
    graph: CutGraph,
    run: ReferenceRun,
    group: Sequence[Piece],
    *,
    feeds: Sequence[Feeds],
    sizes: Shapes,
) -> list[Measured]:
    """The errors of a group; one that does not run is halved until the guilty piece is alone."""
    try:
        return _measure_together(graph, run, group, feeds=feeds, sizes=sizes)
    except EquipoiseError as error:
        if len(group) == 1:
            return [(group[0], PieceError(failure=error.message))]
    halves = group[: len(group) // 2], group[len(group) // 2 :]
    return [m for half in halves for m in _measure(graph, run, half, feeds=feeds, sizes=sizes)]


def _measure_together(
    graph: CutGraph,
    run: ReferenceRun,
    group: Sequence[Piece],
    *,
    feeds: Sequence[Feeds],
    sizes: Shapes,
) -> list[Measured]:
    ranks = {name: len(shape) for name, shape in sizes.items()}
    values = [piece.value for piece in group]
    meters = {piece.value: PieceMeter(graph.bounds(piece.value)) for piece in group}
    names = {graph.shared[name] for piece in group for name in (*piece.reads, piece.value)}
    forms: tuple[Form, ...] = ("exact", "still", "noisy")
    with ExitStack() as stack:
        giving = stack.enter_context(run.giving(sorted(names)))
        sessions = {
            form: stack.enter_context(
                opened(
                    cut_model(graph, values, ranks=ranks, cut=Cut(form=form)), settings=run.settings
                )
            )
            for form in forms
        }
        for one in feeds:
            known = giving(one)
            found = {form: fed(session, known) for form, session in sessions.items()}
            for piece in group:
                exact, still, noisy = (found[form][f"{piece.value}{OUT}"] for form in forms)
                meter, wanted = meters[piece.value], known[piece.reference]
                meter.add(wanted, exact)
                meter.add_rounding(wanted, still=still, noisy=noisy)
    return [(piece, meters[piece.value].result()) for piece in group]


def fed(session: Session, known: Mapping[str, Array]) -> dict[str, Array]:
    """Run a model of pieces on values of the reference."""
    return session.run({spec.name: known[spec.name.removesuffix(GIVEN)] for spec in session.inputs})
