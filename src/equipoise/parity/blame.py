"""The guilty node of a candidate file that departs from its float reference.

The candidate is cut at every value that it shares with the reference, and each piece is fed with
the reference's values (``cut.py``): its error is its own. Adding noise of the size of its rounding
to the piece shows how large an honest error is (``departing.py``). A file whose pieces are all
honest and that a runtime nevertheless runs wrong is searched by halves (``runtime_fault.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from equipoise import onnxio, provenance
from equipoise.errors import DataError, EquipoiseError
from equipoise.parity.cut import CutGraph
from equipoise.parity.cut_model import GIVEN, OUT, Cut, cut_model
from equipoise.parity.departing import Judged, judge
from equipoise.parity.locate import Located, Scene, locate
from equipoise.parity.piece_error import PieceMeter
from equipoise.parity.pieces import ReferenceRun, fed, measure_pieces, opened
from equipoise.parity.runtime_fault import RuntimeFault, RuntimeSettings, find_fault
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Feeds

_GROUP_BYTES: Final = 256_000_000
_COARSE: Final = 0.1
"""Rounding that takes so much of a value, 20 dB, is worth a word."""

_LOCATED: Final = 16
"""Departures that are looked into; a file with more has been rewritten rather than damaged."""


@dataclass(frozen=True, kw_only=True)
class BlameSettings:
    """How a departure is looked for.

    Attributes:
        runtime: Runtime of the candidate.
        session: How the runtime runs it.
        samples: Use the first so many feeds.
        group_bytes: Bytes of values and weights that are held at a time.
    """

    runtime: str = "onnxruntime"
    session: SessionSettings = field(default_factory=SessionSettings)
    samples: int = 2
    group_bytes: int = _GROUP_BYTES


@dataclass(frozen=True, kw_only=True)
class Departure:
    """A node whose output differs from the reference by more than its arithmetic explains.

    Attributes:
        step: ``file`` when the file itself computes something else, ``runtime`` when the runtime
            makes something else of it than it says.
        node: Its name.
        operator: Its operator type.
        module: Path of the PyTorch module that it comes from; empty when nothing tells.
        value: The value that departs, as the candidate calls it.
        reference: The same in the reference.
        piece: Names of all nodes between the values that were given and ``value``.
        given: Values of the candidate that were given as the reference has them.
        arithmetic: In which numbers the piece computes.
        relative: Root of (sum of squared difference / sum of squared reference) of the piece alone.
        peak: Largest difference / largest value of the reference.
        allowed: Largest ``relative`` that its arithmetic explains.
        allowed_peak: Largest ``peak``; None where peaks are not judged.
        typical: Median ``relative`` of pieces of the same arithmetic that are not exact.
        before: Largest relative error of what the piece reads, all faults before it included.
        why: What is known about the cause, in words.
    """

    step: Literal["file", "runtime"] = "file"
    node: str
    operator: str
    module: str
    value: str
    reference: str
    piece: tuple[str, ...]
    given: tuple[str, ...]
    arithmetic: str
    relative: float
    peak: float
    allowed: float
    allowed_peak: float | None
    typical: float
    before: float
    why: tuple[str, ...]

    def _name(self) -> str:
        module = f" of module {self.module}" if self.module else ""
        return f"{self.node} ({self.operator}){module}"

    def as_coarsest(self) -> str:
        """What an honest rounding costs."""
        return (
            f"the coarsest is {self._name()}, whose grid alone makes {self.value} off by"
            f" {self.relative:.0%} of its size"
        )

    def in_words(self) -> str:
        """One paragraph."""
        others = f" (of a piece of {len(self.piece)} nodes)" if len(self.piece) > 1 else ""
        cause = "as the runtime runs it, " if self.step == "runtime" else ""
        reasons = "".join(f"; {reason}" for reason in self.why)
        return (
            f"{self._name()}{others}: {cause}{self.value} is off by"
            f" {_shown(self.relative)} of its size, {self.arithmetic} explains"
            f" {_shown(self.allowed)}; what it reads is off by {_shown(self.before)}{reasons}"
        )


def _shown(relative: float) -> str:
    return f"{relative:.2g}"


@dataclass(frozen=True, kw_only=True)
class Blame:
    """What was found.

    Attributes:
        first: The first node that departs, in the order of the candidate; None when none does.
        worst: The one whose own error is largest; the first of them when several are.
        coarsest: Where none departs, the one whose honest rounding is largest, if that is much:
            its grid explains it, and may be the wrong grid.
        departures: How many pieces depart.
        pieces: Number of pieces that were compared.
        unshared: Nodes of the candidate that lie in no piece: no shared value depends on them.
        outputs_agree: Whether the runtime gives what the file says; None when a piece departs and
            it was not run.
    """

    first: Departure | None
    worst: Departure | None
    coarsest: Departure | None = None
    departures: int
    pieces: int
    unshared: int
    outputs_agree: bool | None

    def in_words(self) -> str:
        """For a message: one line for the first node and one for the worst."""
        if self.first is None:
            words = f"none of {self.pieces} pieces departs by more than its arithmetic explains"
            return words if self.coarsest is None else f"{words}; {self.coarsest.as_coarsest()}"
        lines = [f"the first node that departs is {self.first.in_words()}"]
        if self.worst is not None and self.worst.value != self.first.value:
            lines.append(f"the one that departs most is {self.worst.in_words()}")
        if self.departures > 1:
            lines.append(f"{self.departures} of {self.pieces} pieces depart")
        return "\n".join(lines)


def find_blame(
    reference: Path, candidate: Path, *, feeds: Sequence[Feeds], settings: BlameSettings
) -> Blame:
    """Name the node at which ``candidate`` departs from ``reference``.

    Args:
        reference: Float ONNX file that is known to be right.
        candidate: ONNX file made from it, whose values keep their names: fused, in half precision,
            in integers.
        feeds: Real inputs of the reference; the first few are used.
        settings: Runtime of the candidate, number of samples, memory.

    Raises:
        SourceError: A file is no ONNX model, or the runtime does not take the reference.
        InputError: The feeds do not fit, or the candidate has an input that the reference has not.
        DataError: There are no feeds.
    """
    used = [dict(one) for one in feeds[: settings.samples]]
    if not used:
        raise DataError("there are no inputs to compare the files on")
    search = _Search(reference, candidate, feeds=used, settings=settings)
    return search.blame()


class _Search:
    """A reference and a candidate, both read once."""

    def __init__(
        self, reference: Path, candidate: Path, *, feeds: Sequence[Feeds], settings: BlameSettings
    ) -> None:
        original, given = onnxio.load_model(reference), onnxio.load_model(candidate)
        for model in (original, given):
            onnxio.name_nodes(model)
        self._settings, self._feeds = settings, feeds
        self._graph = CutGraph(given, original)
        self._run = ReferenceRun(reference, threads=settings.session.threads)
        self._scene = Scene(
            graph=self._graph,
            reference=original,
            run=self._run,
            feeds=feeds[0],
            shapes=self._run.shapes(self._graph, feeds[0]),
        )
        self._modules = provenance.module_paths(given)
        self._reference_modules = _by_value(original)

    def blame(self) -> Blame:
        measured = measure_pieces(
            self._graph, self._run, feeds=self._feeds, group_bytes=self._settings.group_bytes
        )
        judged = judge(self._graph, measured)
        departing = [j for j in judged if j.departs]
        named = [self._departure(j) for j in departing[:_LOCATED]]
        fault = None if departing else self._runtime_fault()
        named += [] if fault is None else [self._of_runtime(fault)]
        coarse = max(judged, key=lambda j: j.error.relative, default=None)
        if named or coarse is None or coarse.error.relative < _COARSE:
            coarse = None
        return Blame(
            first=named[0] if named else None,
            worst=max(named, key=lambda d: d.relative) if named else None,
            coarsest=None if coarse is None else self._departure(coarse),
            departures=len(departing) + (fault is not None),
            pieces=len(judged),
            unshared=self._unshared(judged),
            outputs_agree=None if departing else fault is None,
        )

    def _unshared(self, judged: Sequence[Judged]) -> int:
        covered = {index for j in judged for index in j.piece.nodes}
        return len(self._graph.candidate.graph.node) - len(covered)

    def _departure(self, judged: Judged) -> Departure:
        piece = judged.piece
        located = locate(self._scene, judged)
        return self._named(
            Departure(
                node="",
                operator="",
                module="",
                value=piece.value,
                reference=piece.reference,
                piece=tuple(str(self._graph.node(i).name) for i in piece.nodes),
                given=piece.reads,
                arithmetic=piece.arithmetic,
                relative=judged.error.relative,
                peak=judged.error.peak,
                allowed=judged.allowed,
                allowed_peak=judged.allowed_peak,
                typical=judged.typical,
                before=self._cumulated(piece.reads),
                why=located.why,
            ),
            located,
        )

    def _named(self, departure: Departure, located: Located) -> Departure:
        node = self._graph.node(located.node)
        return replace(
            departure,
            node=str(node.name),
            operator=str(node.op_type),
            module=self._module(located.node, departure),
        )

    def _module(self, index: int, departure: Departure) -> str:
        """What the node itself says, else the reference's maker of its value, else neighbours."""
        node = self._graph.node(index)
        known = self._reference_modules.get(departure.reference, "")
        makes = departure.value in node.output
        own = provenance.module_path(node) or (known if makes else "")
        return own or self._modules[index] or known

    def _cumulated(self, values: Sequence[str]) -> float:
        """Largest relative error of ``values`` in the whole candidate, run as written."""
        made = [name for name in values if name in self._graph.makers]
        if not made:
            return 0.0
        ranks = {name: len(shape) for name, shape in self._scene.shapes.items()}
        model = cut_model(self._graph, made, ranks=ranks, cut=Cut(through=self._graph.shared))
        inputs = [v.name.removesuffix(GIVEN) for v in model.graph.input]
        meant = [self._graph.shared[name] for name in made]
        try:
            with (
                self._run.giving([*inputs, *meant]) as giving,
                opened(model, settings=self._run.settings) as session,
            ):
                known = giving(self._feeds[0])
                found = fed(session, known)
        except EquipoiseError:  # an earlier fault keeps the candidate from running at all
            return math.inf
        return max(self._error(name, known, found) for name in made)

    def _error(self, name: str, known: Feeds, found: Feeds) -> float:
        meter = PieceMeter(self._graph.bounds(name))
        meter.add(known[self._graph.shared[name]], found[f"{name}{OUT}"])
        error = meter.result()
        return math.inf if error.shape else error.relative

    def _runtime_fault(self) -> RuntimeFault | None:
        settings = self._settings
        return find_fault(
            self._scene, RuntimeSettings(runtime=settings.runtime, session=settings.session)
        )

    def _of_runtime(self, fault: RuntimeFault) -> Departure:
        graph, settings = self._graph, self._settings
        version = f"{settings.runtime}, optimize={settings.session.optimize}"
        reasons = [f"it is right as written and wrong as {version} runs it"]
        reasons += [text for text in (fault.error.failure, fault.error.shape) if text]
        departure = Departure(
            step="runtime",
            node="",
            operator="",
            module="",
            value=fault.value,
            reference=graph.shared[fault.value],
            piece=tuple(str(graph.node(i).name) for i in fault.nodes),
            given=fault.given,
            arithmetic="the file as written",
            relative=fault.error.relative,
            peak=fault.error.peak,
            allowed=fault.allowed,
            allowed_peak=None,
            typical=0.0,
            before=fault.before,
            why=tuple(reasons),
        )
        return self._named(departure, Located(node=self._computing(fault.nodes)))

    def _computing(self, nodes: Sequence[int]) -> int:
        """The last of ``nodes`` that computes, and does not only round or move values."""
        rounding = {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear"}
        computing = [i for i in nodes if self._graph.node(i).op_type not in rounding]
        return (computing or list(nodes))[-1]


def _by_value(model: Any) -> dict[str, str]:
    """Value -> path of the module that makes it."""
    modules = provenance.module_paths(model)
    return {name: modules[i] for i, node in enumerate(model.graph.node) for name in node.output}
