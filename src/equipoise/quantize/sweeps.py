"""Which nodes do the damage: each quantised alone, and each left out of the quantisation.

The sweeps run graphs as written, so they tell what rounding does, on any machine alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from equipoise import fs, onnxio, progress
from equipoise.data.metrics import Metric
from equipoise.parity.compare import Comparison, OutputParity
from equipoise.quantize.observe import observing
from equipoise.quantize.pairs import only, quantized_nodes, without
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array, Feeds

STANDS_OUT: Final = 0.1
"""A node is worth leaving in float when it makes at least this share of the noise that is left."""

ENOUGH_DB: Final = 30.0
"""Above this the noise changes one decision in thousands; more nodes in float only cost speed."""

_ALONE_SHARE: Final = 2 / 3
_MOVERS: Final = frozenset(
    {
        "Cast", "Expand", "Flatten", "Identity", "IsNaN", "Reshape", "Shape", "Slice", "Split",
        "Squeeze", "Transpose", "Unsqueeze",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a model compares with the float one.

    Attributes:
        sqnr_db: Of the worst output; None when all outputs are equal.
        cosine: Mean over samples, of the worst output.
        metric: The task's metric, where there are labels.
    """

    sqnr_db: float | None
    cosine: float
    metric: float | None = None


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What quantising one node, or all nodes of one type, does.

    Attributes:
        name: Node, or type of operator.
        operator: Type of operator.
        nodes: Number of nodes.
        alone: The model with nothing else quantised.
        spared: The model with everything else quantised; None when time ran out before.
    """

    name: str
    operator: str
    nodes: int
    alone: Score
    spared: Score | None


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What models are compared on.

    Attributes:
        feeds: Inputs of each sample.
        references: Outputs of the float model on each.
        labels: The label of each; empty without a metric.
        metric: The task's metric, or None.
        threads: Threads per operator.
    """

    feeds: Sequence[Feeds]
    references: Sequence[dict[str, Array]]
    labels: Sequence[Array] = ()
    metric: Metric | None = None
    threads: int = 1

    def score(self, model: Any) -> Score:
        """Run an ``onnx.ModelProto`` on the samples.

        Raises:
            InputError: The samples do not fit it.
            ParityError: It lacks an output of the float model, or gives another shape.
        """
        with observing(model, self.references[0], threads=self.threads) as observe:
            return self.compare(observe)

    def rounding(self, model: Any) -> Score:
        """Run an ``onnx.ModelProto`` as written: what its Q/DQ pairs do, and no kernel or rewrite.

        ONNX Runtime rounds the float weights of a Conv or Gemm between Q and DQ to a grid of its
        own, so that a node put back into float among quantised ones would not be in float. Raises
        as :meth:`score`.
        """
        settings = SessionSettings(threads=self.threads, optimize="none")
        with fs.scratch_directory() as folder:
            onnxio.save_model(model, folder / "written.onnx")
            with session_opener("onnxruntime")(folder / "written.onnx", settings=settings) as run:
                return self.compare(run.run)

    def compare(self, run: Callable[[Feeds], dict[str, Array]]) -> Score:
        """The score of whatever gives the outputs of the model. Raises as :meth:`score`."""
        comparison, statistics = Comparison(), []
        for index, (feeds, wanted) in enumerate(zip(self.feeds, self.references, strict=True)):
            outputs = run(feeds)
            comparison.add(wanted, outputs)
            if self.metric is not None:
                label = self.labels[index]
                statistics.append(self.metric.statistics(outputs, label, wanted))
        return self._summary(comparison, statistics)

    def first(self, count: int) -> Judge:
        """The same judge on the first samples alone."""
        return replace(
            self,
            feeds=self.feeds[:count],
            references=self.references[:count],
            labels=self.labels[:count],
        )

    def _summary(self, comparison: Comparison, statistics: list[Array]) -> Score:
        outputs = comparison.result()
        value = None
        if self.metric is not None:
            value = float(self.metric.value(np.stack(statistics).sum(0)))
        return replace(score_of(outputs), metric=value)


def score_of(outputs: Sequence[OutputParity]) -> Score:
    """The score of the worst outputs."""
    noisy = [output.sqnr_db for output in outputs if output.sqnr_db is not None]
    return Score(sqnr_db=min(noisy, default=None), cosine=min(output.cosine for output in outputs))


def operator_groups(quantized: Any) -> dict[str, tuple[str, ...]]:
    """Type of operator -> names of its quantised nodes, the commonest first."""
    groups: dict[str, tuple[str, ...]] = {}
    for node in rounding_nodes(quantized):
        groups[node.op_type] = (*groups.get(node.op_type, ()), node.name)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def rounding_nodes(quantized: Any) -> tuple[Any, ...]:
    """The quantised nodes that compute: what only moves values adds no noise of its own."""
    return tuple(node for node in quantized_nodes(quantized) if node.op_type not in _MOVERS)


def sweep(
    quantized: Any, groups: Mapping[str, tuple[str, ...]], *, judge: Judge, budget_s: float
) -> tuple[Damage, ...]:
    """Measure groups of nodes in the given order until time is up.

    Two thirds of the time are for groups alone; then the most damaging ones are spared in turn.

    Args:
        quantized: ``onnx.ModelProto`` with Q/DQ pairs and named nodes, best
            :func:`~equipoise.quantize.pairs.with_originals`.
        groups: Name -> nodes.
        judge: What to compare on.
        budget_s: Time in seconds; at least one group is measured.

    Returns:
        The groups that were measured, the most damaging first.
    """
    operators = {node.name: str(node.op_type) for node in quantized.graph.node}
    start = time.monotonic()
    alone: dict[str, Score] = {}
    for name, nodes in progress.track(groups.items(), total=len(groups)):
        if alone and time.monotonic() > start + _ALONE_SHARE * budget_s:
            break
        alone[name] = judge.rounding(only(quantized, nodes))
    spared: dict[str, Score] = {}
    ordered = sorted(alone, key=lambda name: -noise_power(alone[name]))
    for name in progress.track(ordered, total=len(ordered)):
        if spared and time.monotonic() > start + budget_s:
            break
        spared[name] = judge.rounding(without(quantized, groups[name]))
    return tuple(
        Damage(
            name=name,
            operator=operators[groups[name][0]],
            nodes=len(groups[name]),
            alone=alone[name],
            spared=spared.get(name),
        )
        for name in ordered
    )


def noise_power(score: Score) -> float:
    """Noise over signal, as a ratio of powers."""
    return 0.0 if score.sqnr_db is None else float(10 ** (-score.sqnr_db / 10))


def standing_out(damages: Sequence[Damage], *, whole: Score) -> tuple[str, ...]:
    """The nodes that are worth leaving in float, the most damaging first.

    Rounding noise of different nodes is nearly independent, so that its powers add. A node is
    taken while it makes a good share of what is left and what is left is too much: a model whose
    noise comes from everywhere has no node to blame.

    Args:
        damages: Of single nodes, the most damaging first.
        whole: The model with all of them quantised.
    """
    left = max(noise_power(whole), sum(noise_power(damage.alone) for damage in damages))
    enough = 10 ** (-ENOUGH_DB / 10)
    chosen: list[str] = []
    for damage in damages:
        power = noise_power(damage.alone)
        if left <= enough or power < STANDS_OUT * left:
            break
        chosen.append(damage.name)
        left -= power
    return tuple(chosen)
