"""A departure in a folder that others can run: the smallest graph that still fails.

model.onnx        the guilty nodes, weights inside
reference.onnx    the same piece of the float reference, where it has one
inputs.npz        what the piece reads, from real data: input_0, input_1, ...
expected.npz      what it should give: output
reproduce.py      runs it with onnxruntime and numpy alone; exits 1 while it fails
README.md         which node, which module, how much, which versions
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Final

import numpy as np

from equipoise import fs, onnxio, provenance
from equipoise.errors import DataError, EquipoiseError
from equipoise.parity.blame import BlameSettings, Departure
from equipoise.parity.cut import CutGraph
from equipoise.parity.cut_model import GIVEN, OUT, Cut, cut_model
from equipoise.parity.piece_error import PieceError, PieceMeter
from equipoise.parity.pieces import ReferenceRun, fed, opened
from equipoise.spec import Array, Feeds
from equipoise.stages import versions_of

_PACKAGES: Final = ("equipoise", "numpy", "onnx", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class ReproducerRecord:
    """What was written.

    Attributes:
        directory: Where.
        nodes: Number of nodes of ``model.onnx`` that are the candidate's.
        fails: Whether it fails here, in ONNX Runtime; a fault of another runtime may not.
        reference: Whether there is a ``reference.onnx``.
    """

    directory: Path
    nodes: int
    fails: bool
    reference: bool


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A graph that fails, and the inputs on which it does."""

    model: Any
    nodes: int
    through: frozenset[str]
    known: Mapping[str, Array]
    expected: Array
    error: PieceError


def write_reproducer(  # noqa: PLR0913
    directory: Path,
    departure: Departure,
    *,
    reference: Path,
    candidate: Path,
    feeds: Sequence[Feeds],
    settings: BlameSettings,
) -> ReproducerRecord:
    """Write a reproducer of ``departure`` to ``directory``, whole or not at all.

    It begins with the guilty piece alone. Where that does not fail, it is grown backwards until it
    does.

    Args:
        directory: A directory to make; one that stands there is replaced.
        departure: What ``find_blame`` named.
        reference: As there.
        candidate: As there.
        feeds: As there.
        settings: As there.

    Raises:
        SourceError: A file is no ONNX model.
        DataError: There are no feeds.
        OutputError: The directory cannot be written.
    """
    used = [dict(one) for one in feeds[: settings.samples]]
    if not used:
        raise DataError("there are no inputs to reproduce the departure on")
    maker = _Maker(reference, candidate, departure=departure, settings=settings)
    piece = maker.smallest(used)
    other = maker.reference_model(piece, used[0])
    with fs.staged_directory(directory) as staging:
        maker.write(staging, piece, other)
    return ReproducerRecord(
        directory=directory,
        nodes=piece.nodes,
        fails=maker.fails(piece.error),
        reference=other is not None,
    )


class _Maker:
    """Cuts pieces around a departing value."""

    def __init__(
        self, reference: Path, candidate: Path, *, departure: Departure, settings: BlameSettings
    ) -> None:
        original, given = onnxio.load_model(reference), onnxio.load_model(candidate)
        for model in (original, given):
            onnxio.name_nodes(model)
        self._departure, self._settings = departure, settings
        self._original = original
        self._graph = CutGraph(given, original)
        self._run = ReferenceRun(reference, threads=settings.session.threads)

    def fails(self, error: PieceError) -> bool:
        """Whether the error is more than the departure's allowance."""
        departure, peak = self._departure, self._departure.allowed_peak
        above = peak is not None and error.peak > peak
        fits = not (error.failure or error.shape)
        return not fits or error.relative > departure.allowed or above

    def smallest(self, feeds: Sequence[Feeds]) -> _Piece:
        """The guilty piece, grown until it fails; the whole graph before it in the end."""
        graph, value = self._graph, self._departure.value
        through = set(graph.shared) - set(self._departure.given)
        through &= {name for name in graph.shared if name in graph.makers}
        while True:
            piece = self._worst(feeds, frozenset(through))
            _, given, _ = graph.behind([value], through=through)
            inner = {name for name in given if name in graph.makers}
            if self.fails(piece.error) or not inner:
                return piece
            through |= inner

    def _worst(self, feeds: Sequence[Feeds], through: frozenset[str]) -> _Piece:
        """The piece on the inputs on which it is most wrong."""
        pieces = [self._piece(one, through) for one in feeds]
        return max(pieces, key=lambda p: (self.fails(p.error), p.error.relative))

    def _piece(self, feeds: Feeds, through: frozenset[str]) -> _Piece:
        graph, departure = self._graph, self._departure
        shapes = self._run.shapes(graph, feeds)
        ranks = {name: len(shape) for name, shape in shapes.items()}
        model = _private(cut_model(graph, [departure.value], ranks=ranks, cut=Cut(through=through)))
        names = {value.name.removesuffix(GIVEN) for value in model.graph.input}
        with self._run.giving(sorted({*names, departure.reference})) as giving:
            known = giving(feeds)
        expected = known[departure.reference]
        if departure.step == "runtime":
            with opened(model, settings=self._run.settings) as session:
                expected = fed(session, known)[f"{departure.value}{OUT}"]
        return _Piece(
            model=model,
            nodes=len(graph.behind([departure.value], through=through)[0]),
            through=through,
            known=known,
            expected=expected,
            error=self._error(model, known, expected),
        )

    @property
    def _session(self) -> Any:
        """How the piece has to be run: as written, unless the runtime is to blame."""
        return self._settings.session if self._departure.step == "runtime" else self._run.settings

    def _error(self, model: Any, known: Mapping[str, Array], expected: Array) -> PieceError:
        meter = PieceMeter(self._graph.bounds(self._departure.value))
        try:
            with opened(model, settings=self._session) as session:
                meter.add(expected, fed(session, known)[f"{self._departure.value}{OUT}"])
        except EquipoiseError as error:
            return PieceError(failure=error.message)
        return meter.result()

    def reference_model(self, piece: _Piece, feeds: Feeds) -> Any:
        """The same piece of the reference; None where the value is given itself."""
        graph = self._graph
        _, given, _ = graph.behind([self._departure.value], through=piece.through)
        stops = {graph.shared[name] for name in given}
        meant = self._departure.reference
        own = CutGraph(self._original, self._original)
        if meant in stops or meant not in own.makers:
            return None
        through = set(own.makers) - stops
        ranks = {name: len(shape) for name, shape in self._run.shapes(own, feeds).items()}
        model = cut_model(own, [meant], ranks=ranks, cut=Cut(through=through))
        taken = {value.name.removesuffix(GIVEN) for value in model.graph.input}
        return _private(model) if taken <= set(piece.known) else None

    def write(self, folder: Path, piece: _Piece, other: Any) -> None:
        """All files, into an empty directory."""
        taken = [value.name for value in piece.model.graph.input]
        inputs = {f"input_{i}": piece.known[n.removesuffix(GIVEN)] for i, n in enumerate(taken)}
        onnxio.save_model(piece.model, folder / "model.onnx")
        if other is not None:
            onnxio.save_model(other, folder / "reference.onnx")
        fs.write_bytes(folder / "inputs.npz", _packed(inputs))
        fs.write_bytes(folder / "expected.npz", _packed({"output": piece.expected}))
        fs.write_text(folder / "reproduce.py", self._script(taken))
        fs.write_text(folder / "README.md", self._readme(piece))

    def _script(self, taken: Sequence[str]) -> str:
        departure, session = self._departure, self._session
        bounds = self._graph.bounds(departure.value)
        facts = {
            "allowed": departure.allowed,
            "allowed_peak": departure.allowed_peak,
            "bounds": None if bounds is None else [float(end) for end in bounds],
            "inputs": list(taken),
            "optimize": session.optimize,
            "providers": list(session.providers) or ["CPUExecutionProvider"],
            "threads": session.threads,
            "exact_integers": session.exact_integers,
        }
        lines = [f"{name.upper()} = {value!r}" for name, value in facts.items()]
        head = json.dumps(f"{departure.node} ({departure.operator})")
        return Template(_SCRIPT).substitute(node=head[1:-1], facts="\n".join(lines))

    def _readme(self, piece: _Piece) -> str:
        departure = self._departure
        versions = versions_of(_PACKAGES)
        return Template(_README).substitute(
            words=departure.in_words(),
            node=departure.node,
            operator=departure.operator,
            module=departure.module or "not known",
            value=departure.value,
            nodes=piece.nodes,
            relative=f"{piece.error.relative:.4g}",
            allowed=f"{departure.allowed:.4g}",
            runtime=self._settings.runtime if departure.step == "runtime" else "onnxruntime",
            versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        )


def _private(model: Any) -> Any:
    """``model``, its nodes with the path of their module and nothing else of the exporter."""
    for node in model.graph.node:
        path = provenance.module_path(node)
        del node.metadata_props[:]
        node.ClearField("doc_string")
        if path:
            entry = node.metadata_props.add()
            entry.key, entry.value = provenance.MODULE_KEY, path
    return model


def _packed(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


_README: Final = """# A node that departs

$words

- node: `$node` ($operator), $nodes nodes in `model.onnx`
- module: `$module`
- value: `$value`
- error: $relative of its size, here; explained by rounding: $allowed
- found with $runtime; $versions

`python reproduce.py` needs onnxruntime and numpy. It exits with 1 while the graph fails.
"""

_SCRIPT: Final = '''"""Run the graph around $node and compare it with what it should give.

Needs onnxruntime and numpy. Exits with 1 while it fails, with 0 when it does not.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

$facts

HERE = Path(__file__).resolve().parent
MASK = 1e9


def open_session(name, optimize):
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    if EXACT_INTEGERS:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimize == "none":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(HERE / name), options, providers=PROVIDERS)


def run(name, optimize):
    given = np.load(HERE / "inputs.npz")
    feeds = {name: given[f"input_{index}"] for index, name in enumerate(INPUTS)}
    session = open_session(name, optimize)
    taken = {value.name for value in session.get_inputs()}
    return session.run(None, {key: array for key, array in feeds.items() if key in taken})[0]


def errors(expected, found):
    """Relative and peak error; mask constants count as equal when both are that large."""
    wanted, given = expected.astype(np.float64), found.astype(np.float64)
    if BOUNDS is not None:
        wanted, given = np.clip(wanted, *BOUNDS), np.clip(given, *BOUNDS)
    masked = ~(np.abs(wanted) < MASK)
    alike = (np.sign(wanted) == np.sign(given)) & (np.abs(given) >= 1e4)
    agreed = alike | (np.isnan(wanted) & np.isnan(given))
    with np.errstate(invalid="ignore"):
        difference = np.where(masked, np.where(agreed, 0.0, np.inf), given - wanted)
    difference = np.where(np.isnan(difference), np.inf, difference)
    wanted = np.where(masked, 0.0, wanted)
    noise, signal = np.square(difference).sum(), np.square(wanted).sum()
    relative = float(np.sqrt(noise / signal)) if signal else (np.inf if noise else 0.0)
    scale = float(np.abs(wanted).max(initial=0.0))
    peak = float(np.abs(difference).max(initial=0.0))
    return relative, peak / scale if scale else (np.inf if peak else 0.0)


def fails(name, optimize):
    expected = np.load(HERE / "expected.npz")["output"]
    try:
        found = run(name, optimize)
    except Exception as error:
        print(f"{name} does not run: {error}")
        return True
    if found.shape != expected.shape:
        print(f"{name}: shape {list(found.shape)}, expected {list(expected.shape)}")
        return True
    relative, peak = errors(expected, found)
    print(f"{name} (optimize={optimize}): off by {relative:.4g} of its size; allowed {ALLOWED:.4g}")
    if ALLOWED_PEAK is not None:
        print(f"  largest difference {peak:.4g} of the largest value; allowed {ALLOWED_PEAK:.4g}")
    return relative > ALLOWED or (ALLOWED_PEAK is not None and peak > ALLOWED_PEAK)


def main():
    print(f"onnxruntime {ort.__version__}, numpy {np.__version__}")
    if (HERE / "reference.onnx").is_file():
        fails("reference.onnx", "none")
    if fails("model.onnx", OPTIMIZE):
        print("it still fails")
        return 1
    print("it does not fail here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''
