"""Precision per node as a front of plans: from everything in integers to nearly all in float.

Each plan is the fastest for its noise, by a knapsack over what was measured of every node: the
harm that it does in integers, and the time that it gains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from equipoise.measure.interval import Interval
from equipoise.quantize.borders import LatencyModel
from equipoise.quantize.front import front
from equipoise.quantize.knapsack import Choice, worth_of_integers
from equipoise.quantize.schemes import StaticInt8

NO_LIMIT_DB: Final = -300.0
"""A plan has chosen already what stays in float: nothing else goes back."""


@dataclass(frozen=True, kw_only=True)
class NodeGain:
    """One node of the float graph.

    Attributes:
        name: Node.
        operator: Its type.
        able: Whether it may run in integers.
        reason: Why not, in words.
        noise: Noise over signal of the worst output, as a ratio of powers, with this node alone in
            integers; None where that was not measured.
        sqnr_db: The same in dB; None where nothing is lost either.
        float_ms: Time of its kernels in the float model; None where the runtime has it in another
            node.
        integer_ms: The same with everything in integers, with its share of what rounds and restores
            tensors at its borders.
        gain_ms: What the whole is predicted to lose when this node alone goes to float, with the
            borders that then appear and vanish and the nodes that have to follow it.
        spread_ms: Half the range of the difference of both forms over the openings.
        weights: Number of its weights.
        group: The nodes that the runtime computes with it: their times cannot be told apart.
    """

    name: str
    operator: str
    able: bool = True
    reason: str = ""
    noise: float | None = None
    sqnr_db: float | None = None
    float_ms: float | None = None
    integer_ms: float | None = None
    gain_ms: float = 0.0
    spread_ms: float = 0.0
    weights: int = 0
    group: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether both its noise and its times were measured."""
        return self.noise is not None


@dataclass(frozen=True, kw_only=True)
class Check:
    """A whole model that was made and measured, beside what was predicted of it.

    Attributes:
        float_nodes: Nodes in float.
        predicted_ms: Milliseconds of one run: the float model's, times the predicted ratio to it.
        measured_ms: The same with the measured ratio, of interleaved rounds.
        predicted_noise: Noise power, by the sum over nodes.
        measured_noise: The same measured.
    """

    float_nodes: tuple[str, ...]
    predicted_ms: float
    measured_ms: Interval
    predicted_noise: float
    measured_noise: float

    @property
    def error(self) -> float:
        """Predicted over measured time, less 1."""
        return self.predicted_ms / self.measured_ms.value - 1


@dataclass(frozen=True, kw_only=True)
class GainsRecord:
    """What the nodes of a model harm and gain in integers, on this machine.

    Attributes:
        nodes: Nodes that take time or may run in integers, in graph order.
        latency: Time of the whole model, of any choice of nodes in integers.
        noise: Noise power of the worst output with everything in integers.
        float_ms: Measured milliseconds of the model with all nodes in float.
        integer_ms: Of the model with everything in integers, by its ratio to the float one.
        checks: Predictions beside measurements: everything in integers first, then some plans.
        notes: What a user should know, in words.
    """

    nodes: tuple[NodeGain, ...]
    latency: LatencyModel
    noise: float
    float_ms: Interval
    integer_ms: Interval
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def harms(self) -> dict[str, float]:
        """Node that was measured -> its noise power, scaled so that all together make the whole."""
        known = {node.name: node.noise for node in self.nodes if node.noise is not None}
        total = math.fsum(known.values())
        return {n: p * (self.noise / total if total else 1.0) for n, p in known.items()}

    @property
    def able(self) -> frozenset[str]:
        """The nodes that may run in integers."""
        return frozenset(node.name for node in self.nodes if node.able)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A choice of precisions.

    Attributes:
        float_nodes: Nodes to leave in float, for ``StaticInt8.float_nodes``.
        predicted_noise: Noise power of the worst output.
        predicted_ms: Milliseconds of one run.
        predicted_speedup: Time of the float model over it.
    """

    float_nodes: tuple[str, ...]
    predicted_noise: float
    predicted_ms: float
    predicted_speedup: float

    @property
    def predicted_sqnr_db(self) -> float | None:
        """The noise as signal to noise in dB; None for none."""
        return decibel(self.predicted_noise)

    def settings(self, base: StaticInt8) -> StaticInt8:
        """``base`` with the nodes of this plan in float besides its own, and no others."""
        nodes = tuple(dict.fromkeys((*base.float_nodes, *self.float_nodes)))
        return replace(base, float_nodes=nodes, min_sqnr_db=NO_LIMIT_DB)


@dataclass(frozen=True, kw_only=True)
class NodeFact:
    """One node of a model that was made.

    Attributes:
        name: Node.
        operator: Its type.
        precision: ``int8`` or ``float32``.
        sqnr_db: As of :class:`NodeGain`.
        float_ms: As of :class:`NodeGain`.
        integer_ms: As of :class:`NodeGain`.
        reason: Why it is in float, in words; empty for integers.
    """

    name: str
    operator: str
    precision: str
    sqnr_db: float | None = None
    float_ms: float | None = None
    integer_ms: float | None = None
    reason: str = ""


def decibel(noise: float | None) -> float | None:
    """Signal to noise in dB of a noise power; None for none."""
    return -10 * math.log10(noise) if noise else None


def front_of(found: GainsRecord, *, count: int) -> tuple[Choice, ...]:
    """The fastest choices for falling noise, the noisiest first; see :func:`plans`."""
    sizes = {node.name: node.weights for node in found.nodes if node.able}
    spreads = {node.name: node.spread_ms for node in found.nodes if node.able}
    worth = worth_of_integers(sizes, spreads, float_ms=found.latency.predict_ms(()))
    return front(found.latency, found.harms, worth_ms=worth, count=count)


def plans(found: GainsRecord, *, count: int = 8) -> tuple[Plan, ...]:
    """The front of plans: the first has everything in integers, the last nearly nothing.

    The second is the fastest, with those nodes in float whose integers gain nothing; from there on
    each is the fastest for its noise. There may be fewer than ``count``.
    """
    whole = Choice(
        integers=found.able,
        noise=math.fsum(found.harms.values()),
        ms=found.latency.predict_ms(found.able),
    )
    others = [c for c in front_of(found, count=count - 1) if c.integers != found.able]
    return tuple(_plan(found, choice) for choice in (whole, *others))


def _plan(found: GainsRecord, choice: Choice) -> Plan:
    return Plan(
        float_nodes=needed(found.latency, choice.integers, able=found.able),
        predicted_noise=choice.noise,
        predicted_ms=choice.ms,
        predicted_speedup=found.latency.predict_ms(()) / choice.ms,
    )


def needed(
    model: LatencyModel, integers: frozenset[str], *, able: frozenset[str]
) -> tuple[str, ...]:
    """The nodes that have to be named to stay in float so that only ``integers`` do not.

    Joins that lose what they read or lead to follow by themselves.
    """
    out = [name for name in model.changes_ms if name in able - integers]
    chosen = [name for name in out if name in model.settled(integers | {name})]
    follows = model.settled(able - set(chosen)) == integers
    return tuple(chosen if follows else out)


def node_facts(found: GainsRecord, *, float_nodes: Mapping[str, str]) -> tuple[NodeFact, ...]:
    """What a report says of each node of a model that was made.

    Args:
        found: What the nodes harm and gain.
        float_nodes: Node left in float -> why; an empty reason is filled in from ``found``.
    """
    integers = found.latency.settled(found.able - set(float_nodes))
    return tuple(
        NodeFact(
            name=node.name,
            operator=node.operator,
            precision="int8" if node.name in integers else "float32",
            sqnr_db=node.sqnr_db,
            float_ms=node.float_ms,
            integer_ms=node.integer_ms,
            reason="" if node.name in integers else _reason(node, float_nodes),
        )
        for node in found.nodes
    )


def _reason(node: NodeGain, float_nodes: Mapping[str, str]) -> str:
    if float_nodes.get(node.name):
        return float_nodes[node.name]
    if not node.able:
        return node.reason
    if node.name not in float_nodes:
        return "what it reads or leads to is in float"
    if node.gain_ms <= 0:
        return f"its integers gain nothing ({-node.gain_ms:.2g} ms slower)"
    harm = "" if node.sqnr_db is None else f"alone it would leave the outputs {node.sqnr_db:.1f} dB"
    return f"{harm}; its integers gain {node.gain_ms:.2g} ms"
