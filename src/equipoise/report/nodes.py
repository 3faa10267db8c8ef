"""The chosen model node by node: what each computes in, how sensitive it is, what it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from equipoise.quantize.plans import NodeFact
from equipoise.report.words import percent, plain
from equipoise.search.result import TuneResult

Tone = Literal["integer", "float", "half", "other"]

_LOUDEST_DB: Final = 60.0
"""From here on the bar of a node's harm is empty: nothing of it shows in an output."""

_NO_BREAK: Final = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node as it is shown.

    Attributes:
        plan: What the search knows of it.
        tone: Kind of its precision, which gives it its colour.
        time_ms: In the precision that it computes in; None where that was not measured.
        time_share: Of the longest one, for its bar.
        harm_share: How long the bar of its harm is; 0 from 60 dB on.
    """

    plan: NodeFact
    tone: Tone
    time_ms: float | None
    time_share: float
    harm_share: float


@dataclass(frozen=True, kw_only=True)
class Precision:
    """All nodes of one precision.

    Attributes:
        name: ``int8``.
        tone: Its colour.
        nodes: How many.
        time_ms: Sum of the times that were measured.
        share: Of the sum over all nodes.
    """

    name: str
    tone: Tone
    nodes: int
    time_ms: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Block:
    """A node that is left in float.

    Attributes:
        name: Of the node.
        operator: Its type.
        time_ms: What it takes.
        integer_ms: What it would take in integers.
        sqnr_db: Signal to noise of the worst output with it alone in integers.
        reason: Why it is in float.
        words: The same in words.
    """

    name: str
    operator: str
    time_ms: float | None
    integer_ms: float | None
    sqnr_db: float | None
    reason: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Blocked:
    """What blocks going further: the nodes left in float, those that take most time first.

    Attributes:
        nodes: They.
        total: Number of all nodes of the model.
        share: Of the time of all nodes; None where none was measured.
    """

    nodes: tuple[Block, ...]
    total: int
    share: float | None

    @property
    def head(self) -> str:
        """How many they are and what they take, in words."""
        time = f" and take {percent(self.share)} of the time" if self.share is not None else ""
        return f"{len(self.nodes)} of {self.total} nodes compute in float{time}"


def node_map(result: TuneResult) -> tuple[Node, ...]:
    """All nodes of the chosen model in graph order; empty where it was not quantised so."""
    longest = max((_time(plan) or 0.0 for plan in result.nodes), default=0.0)
    return tuple(_node(plan, longest=longest) for plan in result.nodes)


def _node(plan: NodeFact, *, longest: float) -> Node:
    time = _time(plan)
    lost = 0.0 if plan.sqnr_db is None else 1 - plan.sqnr_db / _LOUDEST_DB
    return Node(
        plan=plan,
        tone=tone(plan.precision),
        time_ms=time,
        time_share=(time or 0.0) / longest if longest > 0 else 0.0,
        harm_share=min(max(lost, 0.0), 1.0),
    )


def _time(plan: NodeFact) -> float | None:
    return plan.integer_ms if tone(plan.precision) == "integer" else plan.float_ms


def tone(precision: str) -> Tone:
    """The kind of a precision."""
    if "int" in precision:
        return "integer"
    if precision in {"float16", "bfloat16"}:
        return "half"
    return "float" if precision.startswith("float") else "other"


def precisions(nodes: Iterable[Node]) -> tuple[Precision, ...]:
    """Number and time of the nodes of each precision, what takes most first."""
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        groups.setdefault(node.plan.precision, []).append(node)
    times = {name: sum(n.time_ms or 0.0 for n in group) for name, group in groups.items()}
    whole = sum(times.values())
    made = (
        Precision(
            name=name,
            tone=group[0].tone,
            nodes=len(group),
            time_ms=times[name],
            share=times[name] / whole if whole > 0 else 0.0,
        )
        for name, group in groups.items()
    )
    return tuple(sorted(made, key=lambda precision: -precision.time_ms))


def blocked(result: TuneResult) -> Blocked | None:
    """What blocks going further; None where the model was not quantised node by node."""
    if not result.nodes:
        return None
    nodes = node_map(result)
    left = sorted((n for n in nodes if n.tone != "integer"), key=lambda n: -(n.time_ms or 0.0))
    whole = sum(n.time_ms or 0.0 for n in nodes)
    share = sum(n.time_ms or 0.0 for n in left) / whole if whole > 0 else None
    return Blocked(nodes=tuple(map(_block, left)), total=len(nodes), share=share)


def _block(node: Node) -> Block:
    plan = node.plan
    return Block(
        name=plain(plan.name),
        operator=plan.operator,
        time_ms=node.time_ms,
        integer_ms=plan.integer_ms,
        sqnr_db=plan.sqnr_db,
        reason=plan.reason,
        words=_words(node),
    )


def _words(node: Node) -> str:
    """``0.120 ms, 0.050 ms in integers; alone 14.2 dB; too sensitive``."""
    plan = node.plan
    times = [f"{node.time_ms:.3f}{_NO_BREAK}ms"] if node.time_ms is not None else []
    if plan.integer_ms is not None:
        times.append(f"{plan.integer_ms:.3f}{_NO_BREAK}ms in integers")
    harm = f"alone {plan.sqnr_db:.1f}{_NO_BREAK}dB" if plan.sqnr_db is not None else ""
    parts = (", ".join(times), harm, plain(plan.reason))
    return "; ".join(part for part in parts if part) or plan.operator
