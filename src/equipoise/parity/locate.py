"""Which node of a departing piece is guilty, and what is known about it, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise import extras, onnxio
from equipoise.errors import EquipoiseError
from equipoise.parity.cut import CutGraph
from equipoise.parity.cut_model import OUT, Cut, cut_model
from equipoise.parity.departing import Judged
from equipoise.parity.piece_error import PieceMeter
from equipoise.parity.pieces import ReferenceRun, Shapes, fed, opened
from equipoise.spec import Array, Feeds

_QUANTIZE: Final = "QuantizeLinear"
_SHOWN_VALUES: Final = 8


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that is needed to look into a piece.

    Attributes:
        graph: The candidate.
        reference: ``onnx.ModelProto`` of the reference.
        run: The reference, run.
        feeds: One real input.
        shapes: Shapes of the reference's values on it.
    """

    graph: CutGraph
    reference: Any
    run: ReferenceRun
    feeds: Feeds
    shapes: Shapes


@dataclass(frozen=True, kw_only=True)
class Located:
    """Attributes: node: Index in the candidate. why: What is known, in words."""

    node: int
    why: tuple[str, ...] = ()


def locate(scene: Scene, judged: Judged) -> Located:
    """The guilty node of a piece that departs."""
    piece = judged.piece
    node = piece.nodes[-1]
    if not judged.error.failure and not judged.error.shape:
        node = _within(scene, judged)
    elif len(piece.nodes) > 1:
        node = _namesake(scene, judged, differing=True) or node
    return Located(node=node, why=tuple(_words(scene, judged, node)))


def _within(scene: Scene, judged: Judged) -> int:
    """By what makes a piece of several nodes right, or by a node that the reference has too.

    A grid left out may make it right, and so may what is read by the last node alone.
    """
    piece, graph = judged.piece, scene.graph
    pairs = graph.pairs(piece.nodes)
    if pairs:
        clipping = _clipping(scene, judged, pairs)
        if clipping is not None:
            return clipping
    named = _namesake(scene, judged, differing=True)
    if named is not None:
        return named
    if _right_before(scene, judged):
        return piece.nodes[-1]
    named = _namesake(scene, judged, differing=False)
    return piece.nodes[-1] if named is None else named


def _clipping(scene: Scene, judged: Judged, pairs: Sequence[int]) -> int | None:
    """The QuantizeLinear without which the piece is at least twice as good."""
    graph, value = scene.graph, judged.piece.value
    left = {pair: _relative(scene, value, bypass=(pair,)) for pair in pairs}
    best = min(left, key=lambda pair: left[pair])
    if left[best] > judged.error.relative / 2:
        return None
    return graph.makers[graph.node(best).input[0]]


def _relative(scene: Scene, value: str, *, bypass: Sequence[int]) -> float:
    """Relative error of a piece with some grids left out."""
    meant = scene.graph.shared[value]
    found, known = _run(scene, [value], bypass=bypass)
    meter = PieceMeter(scene.graph.bounds(value))
    meter.add(known[meant], found[value])
    return meter.result().relative


def _run(
    scene: Scene, values: Sequence[str], *, bypass: Sequence[int] = ()
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Values of the candidate from those of the reference, and the latter."""
    graph = scene.graph
    ranks = {name: len(shape) for name, shape in scene.shapes.items()}
    reads = [name for value in values for name in graph.behind([value])[1]]
    meant = [graph.shared[name] for name in (*reads, *values) if name in graph.shared]
    model = cut_model(graph, values, ranks=ranks, cut=Cut(bypass=bypass))
    with (
        scene.run.giving(sorted(set(meant))) as giving,
        opened(model, settings=scene.run.settings) as session,
    ):
        known = giving(scene.feeds)
        found = fed(session, known)
    return {value: found[f"{value}{OUT}"] for value in values}, known


def _namesake(scene: Scene, judged: Judged, *, differing: bool) -> int | None:
    """The node of the piece that the reference has too, where they differ or where it ends."""
    known = {node.name: node for node in scene.reference.graph.node if node.name}
    ends = {name: n for n in scene.reference.graph.node for name in n.output}
    for index in judged.piece.nodes:
        node = scene.graph.node(index)
        other = known.get(node.name)
        if other is None:
            continue
        if differing and any(_differences(scene, node, other)):
            return index
        if not differing and other is ends.get(judged.piece.reference):
            return index
    return None


def _right_before(scene: Scene, judged: Judged) -> bool:
    """Whether what the last node reads is still what the piece should give."""
    graph, piece = scene.graph, judged.piece
    inside = {name for i in piece.nodes[:-1] for name in graph.node(i).output}
    read = [name for name in graph.node(piece.nodes[-1]).input if name in inside]
    try:
        found, known = _run(scene, [*read, piece.value]) if read else ({}, {})
    except EquipoiseError:
        return False
    return any(_still_right(judged, known[judged.piece.reference], found[name]) for name in read)


def _still_right(judged: Judged, wanted: Array, given: Array) -> bool:
    """Whether a value is as near to what the piece should give as the piece may be."""
    meter = PieceMeter()
    meter.add(wanted, given)
    error, peak = meter.result(), judged.allowed_peak
    near = error.relative <= judged.allowed and (peak is None or error.peak <= peak)
    return near and not error.shape


# Words.


def _words(scene: Scene, judged: Judged, index: int) -> Iterator[str]:
    error, node = judged.error, scene.graph.node(index)
    if error.failure:
        yield f"it does not run: {error.failure}"
    if error.shape:
        yield error.shape
    if node.op_type == _QUANTIZE:
        yield from _clipped(scene, node)
    yield from _replaced(scene, judged, node)
    known = {other.name: other for other in scene.reference.graph.node if other.name}
    if node.name in known:
        yield from _differences(scene, node, known[node.name])


def _clipped(scene: Scene, node: Any) -> Iterator[str]:
    """How much a QuantizeLinear cuts off."""
    ends, parts, value = scene.graph.ends(node), scene.graph.grid(node), node.input[0]
    if ends is None or parts is None:
        return
    if value in scene.graph.shared:
        meant = scene.graph.shared[value]
        with scene.run.giving([meant]) as giving:
            found = giving(scene.feeds)[meant].astype(np.float64)
    else:
        found = _run(scene, [value])[0][value].astype(np.float64)
    low, high = (float(np.min(ends[0])), float(np.max(ends[1])))
    slack = float(np.max(parts[0])) / 2
    share = float(np.mean((found < low - slack) | (found > high + slack)))
    yield (
        f"its grid goes from {low:.3g} to {high:.3g}; the values go from {found.min():.3g} to"
        f" {found.max():.3g}, and {100 * share:.2g} % are cut off"
    )


def _replaced(scene: Scene, judged: Judged, node: Any) -> Iterator[str]:
    """Whether the reference makes the value by another operator."""
    maker = next(
        (n for n in scene.reference.graph.node if judged.piece.reference in n.output), None
    )
    if maker is not None and node.op_type not in {maker.op_type, _QUANTIZE, "DequantizeLinear"}:
        yield f"the reference makes this value by {maker.op_type} ({maker.name})"


def _differences(scene: Scene, node: Any, other: Any) -> Iterator[str]:
    """In what a node differs from the reference's node of its name: attributes, then constants."""
    if node.op_type == other.op_type and node.domain == other.domain:
        mine, theirs = _attributes(node), _attributes(other)
        for name in sorted(mine.keys() | theirs.keys()):
            if not _alike(mine.get(name), theirs.get(name)):
                left, right = _shown(mine.get(name)), _shown(theirs.get(name))
                yield f"{name} is {left}, in the reference {right}"
    yield from _constants(scene, node, other)


def _attributes(node: Any) -> Mapping[str, Any]:
    helper = extras.require("onnx").helper
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.HasField("g")}


def _alike(mine: Any, theirs: Any) -> bool:
    """Equal; an attribute that one side leaves out has its default."""
    return mine is None or theirs is None or repr(mine) == repr(theirs)


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _constants(scene: Scene, node: Any, other: Any) -> Iterator[str]:
    """Constants of the same place whose content differs."""
    theirs = onnxio.initializers(scene.reference)
    for mine, name in zip(node.input, other.input, strict=False):
        left, right = scene.graph.constants.get(mine), theirs.get(name)
        if left is None or right is None or left.data_type != right.data_type:
            continue
        text = _difference_of(left, right)
        if text:
            yield f"its constant {mine} {text}"


def _difference_of(left: Any, right: Any) -> str:
    to_array = extras.require("onnx").numpy_helper.to_array
    mine, theirs = to_array(left), to_array(right)
    if mine.shape != theirs.shape:
        return f"has shape {list(mine.shape)}, in the reference {list(theirs.shape)}"
    if np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f"):
        return ""
    if mine.size <= _SHOWN_VALUES:
        return f"is {mine.tolist()}, in the reference {theirs.tolist()}"
    changed = int((mine != theirs).sum())
    return f"differs from the reference's in {changed} of {mine.size} values"
