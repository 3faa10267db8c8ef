"""What to cut next: ways that the table of layers says are fast enough, the best by its loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from equipoise.compress.cutting import Cutting
from equipoise.compress.latency.allocate import Scope, allocate
from equipoise.compress.latency.estimate import Estimator
from equipoise.compress.latency.plans import Plan, plans
from equipoise.compress.structure import Group, Structure
from equipoise.compress.transformer.reading import LayersRecord, TransformerReading
from equipoise.compress.transformer.shapes import TransformerShape
from equipoise.compression.compression import Compression
from equipoise.compression.models import Cut, SourceEngine
from equipoise.errors import NotMetError
from equipoise.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A cut that was made and looked at, but not trained.

    Attributes:
        cut: The model.
        words: What was cut.
        estimated: Speed-up over the original, by the table of layers.
    """

    cut: Cut
    words: str
    estimated: float


class Planner(ABC):
    """Proposes cuts of one model and of what becomes of it.

    Args:
        compression: The stages.
        cutting: What to cut.
        baseline: The original's float engine.
        latency_ms: Of that, measured.
    """

    def __init__(
        self,
        compression: Compression,
        cutting: Cutting,
        *,
        baseline: SourceEngine,
        latency_ms: float,
    ) -> None:
        self._compression, self._cutting = compression, cutting
        self._baseline, self._latency_ms = baseline, latency_ms
        self._original = compression.pipeline.job.source

    def propose(self, source: Source, *, goal: float, measured: float, label: str) -> Proposal:
        """The cut of least loss among those that reach ``goal`` by the table.

        How far the table was from the truth at ``source`` is taken to hold a step further.

        Args:
            source: The original, or what was cut from it.
            goal: Speed-up over the original.
            measured: Speed-up of ``source`` over the original.
            label: What the step is called.

        Raises:
            NotMetError: No cut is so fast; says how far they get and what binds.
            SourceError: Nothing of the model can be cut.
        """
        structure = self._structure(source, label=label)
        optimism = self._speedup(structure) / measured
        ways = self._ways(source, structure, speedup=goal * optimism, label=label)
        best = min(ways, key=lambda way: _loss(way.cut))
        return replace(best, estimated=best.estimated / optimism)

    def _speedup(self, structure: Structure) -> float:
        """Of what ``structure`` is of, over the original, by the table."""
        widths = {group.name: group.width for group in structure.groups}
        latency_ms = self._estimator.latency_ms(widths, blocks=blocks_of(structure))
        return self._estimator.full_ms / latency_ms

    @cached_property
    def _estimator(self) -> Estimator:
        structure = self._structure(self._original, label="look at the model")
        table = self._compression.table(
            structure, multiple=self._compression.multiple_of(self._cutting)
        )
        return Estimator(
            table, structure, whole_ms=self._latency_ms, whole_nodes=self._baseline.nodes
        )

    @abstractmethod
    def _structure(self, source: Source, *, label: str) -> Structure:
        """What of ``source`` can be cut."""

    @abstractmethod
    def _ways(
        self,
        source: Source,
        structure: Structure,
        *,
        speedup: float,
        label: str,
    ) -> list[Proposal]:
        """Cuts that are fast enough by the table, made."""


def _loss(cut: Cut) -> float:
    """Right after the cut; without labels all are alike, and the first is taken."""
    return 0.0 if cut.loss_after is None else cut.loss_after


def blocks_of(structure: Structure) -> int | None:
    """Transformer layers of a structure; None where it has none."""
    return len({layer.block for layer in structure.layers if layer.block >= 0}) or None


def planner_of(
    compression: Compression, cutting: Cutting, *, baseline: SourceEngine, latency_ms: float
) -> Planner:
    """By config for a transformers directory, by channels for every other module."""
    kinds: dict[str, type[Planner]] = {"transformers": _Transformer}
    kind = kinds.get(compression.pipeline.job.source.kind, _Channels)
    return kind(compression, cutting, baseline=baseline, latency_ms=latency_ms)


class _Channels(Planner):
    """Channels, as the knapsack over the table says; and in proportion, for comparison."""

    def _structure(self, source: Source, *, label: str) -> Structure:
        return self._compression.read_channels(source, self._cutting, label=label).structure

    def _ways(
        self,
        source: Source,
        structure: Structure,
        *,
        speedup: float,
        label: str,
    ) -> list[Proposal]:
        scopes: Sequence[Scope] = ("global", "per-layer")
        if self._cutting.scope == "per-layer" or self._cutting.proposals < 2:
            scopes = (self._cutting.scope,)
        found = []
        for scope in scopes:
            allocation = allocate(structure, self._estimator, speedup=speedup, scope=scope)
            cut = self._compression.narrow(
                source, allocation.widths, cutting=self._cutting, label=f"{label}: {scope}"
            )
            words = f"{scope}: {_narrowed(structure, allocation.widths)}"
            found.append(Proposal(cut=cut, words=words, estimated=allocation.estimated_speedup))
        return found


def _narrowed(structure: Structure, widths: Mapping[str, int]) -> str:
    cut = [g for g in structure.groups if widths.get(g.name, g.width) < g.width]
    shown = ", ".join(f"{g.name} {g.width} to {widths[g.name]}" for g in cut[:3])
    return f"{shown} and {len(cut) - 3} more" if len(cut) > 3 else shown


class _Transformer(Planner):
    """Layers, feed-forward width, heads and hidden width together."""

    def _structure(self, source: Source, *, label: str) -> Structure:
        structure = self._reading(source, label=label).structure
        multiple = self._compression.multiple_of(self._cutting)
        groups = tuple(_in_multiples(group, multiple) for group in structure.groups)
        return replace(structure, groups=groups)

    def _reading(self, source: Source, *, label: str) -> TransformerReading:
        importance = self._cutting.importance
        return self._compression.read_transformer(source, label=label, importance=importance)

    def _ways(
        self,
        source: Source,
        structure: Structure,
        *,
        speedup: float,
        label: str,
    ) -> list[Proposal]:
        reading = self._reading(source, label=label)
        layers = self._compression.read_layers(source, label=f"{label}: layers")
        whole = len(reading.shape.layers)
        deep = self._cutting.depth and layers.dispensable
        found = [
            plan
            for plan in plans(structure, self._estimator, speedup=speedup)
            if deep or plan.blocks in {None, whole}
        ]
        if not found:
            raise NotMetError(
                f"no width of {source.name} alone is {speedup:.2f}x as fast",
                hint="Let layers go as well: leave out --no-depth.",
            )
        return [
            self._made(source, plan, reading=reading, layers=layers, label=f"{label}, {number}")
            for number, plan in enumerate(self._shortlist(found, reading), start=1)
        ]

    def _shortlist(self, found: Sequence[Plan], reading: TransformerReading) -> list[Plan]:
        """Of each depth and of each hidden width the plan that keeps most importance."""
        kept = _kept_share(reading.structure)
        best: dict[tuple[int | None, bool], Plan] = {}
        for plan in sorted(found, key=kept):
            narrow = plan.widths.get("hidden", reading.shape.hidden) < reading.shape.hidden
            best[plan.blocks, narrow] = plan
        ranked = sorted(best.values(), key=kept, reverse=True)
        return ranked[: self._cutting.proposals]

    def _made(
        self,
        source: Source,
        plan: Plan,
        *,
        reading: TransformerReading,
        layers: LayersRecord,
        label: str,
    ) -> Proposal:
        shape = _shape_of(plan, reading=reading, layers=layers)
        importance = self._cutting.importance
        cut = self._compression.reduce(source, shape, label=label, importance=importance)
        return Proposal(
            cut=cut, words=_sizes(shape, reading.shape), estimated=plan.estimated_speedup
        )


def _in_multiples(group: Group, multiple: int) -> Group:
    """Widths in multiples that the target likes, where the group has such a width now.

    Heads are counted, not sized.
    """
    whole = math.lcm(group.multiple, multiple)
    fits = group.name != "heads" and group.width % whole == 0
    return replace(group, multiple=whole) if fits else group


def _kept_share(structure: Structure) -> Callable[[Plan], float]:
    """How much of the scores a plan keeps, group by group, times its share of layers."""
    totals = {group.name: sum(group.scores) or 1.0 for group in structure.groups}
    blocks = blocks_of(structure) or 1

    def share(plan: Plan) -> float:
        kept = (plan.blocks or blocks) / blocks
        for group in structure.groups:
            best = sorted(group.scores, reverse=True)[: plan.widths.get(group.name, group.width)]
            kept *= sum(best) / totals[group.name]
        return kept

    return share


def _shape_of(plan: Plan, *, reading: TransformerReading, layers: LayersRecord) -> TransformerShape:
    shape = reading.shape
    keep = plan.blocks or len(shape.layers)
    gone = layers.dispensable[: len(shape.layers) - keep]
    hidden = plan.widths.get("hidden", shape.hidden)
    each = shape.heads // shape.key_value_heads
    groups = plan.widths.get("heads", shape.key_value_heads)
    if reading.coupled:
        groups = hidden // reading.head_size // each
    return replace(
        shape,
        layers=tuple(index for index in shape.layers if index not in gone),
        intermediate=plan.widths.get("intermediate", shape.intermediate),
        hidden=hidden,
        heads=groups * each,
        key_value_heads=groups,
    )


def _sizes(after: TransformerShape, before: TransformerShape) -> str:
    sizes = {
        "layers": (len(before.layers), len(after.layers)),
        "feed-forward": (before.intermediate, after.intermediate),
        "heads": (before.heads, after.heads),
        "hidden": (before.hidden, after.hidden),
    }
    return ", ".join(f"{name} {a} to {b}" for name, (a, b) in sizes.items() if a != b)
