"""Leaving in float what must be, and spending the least on it.

A node's harm is the noise that it makes when it alone is quantised; its price is the time that its
integer form saves. Nodes go back to float by harm over price, until what is left is little enough.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise import fs, onnxio, progress
from equipoise.quantize.nodes import FloatNode
from equipoise.quantize.rewritten import node_times
from equipoise.quantize.static import Prepared, written, written_alone
from equipoise.quantize.sweeps import Judge, noise_power
from equipoise.spec import Feeds

_PROFILED_RUNS: Final = 5
_MOVERS_PRICE_SHARE: Final = 0.02
"""Of the median price: what a node costs at least, so that noise of clocks makes none free."""


@dataclass(frozen=True, kw_only=True)
class Spared:
    """The quantised graph, and what was left in float for it.

    Attributes:
        model: ``onnx.ModelProto``.
        nodes: Nodes put back into float, with the reason.
        sqnr_db: Signal to noise of the worst output; None when nothing is lost.
        enough: Whether that is what was asked for.
        notes: What a user should know, in words.
    """

    model: Any
    nodes: tuple[FloatNode, ...]
    sqnr_db: float | None
    enough: bool
    notes: tuple[str, ...]


def spare(prepared: Prepared, *, judge: Judge, min_sqnr_db: float, budget_s: float) -> Spared:
    """Quantise, and put nodes back into float until the outputs keep ``min_sqnr_db``.

    Args:
        prepared: What to quantise.
        judge: Samples, and the float model's outputs on them.
        min_sqnr_db: Signal to noise that the worst output has to keep.
        budget_s: Time for measuring nodes; those that time does not reach stay in integers.
    """
    model = written(prepared)
    score = judge.rounding(model)
    goal = 10 ** (-min_sqnr_db / 10)
    if noise_power(score) <= goal:
        return Spared(model=model, nodes=(), sqnr_db=score.sqnr_db, enough=True, notes=())
    harms = _harms(prepared, judge=judge, budget_s=budget_s)
    prices = _prices(prepared, model, feeds=judge.feeds[:1], threads=judge.threads)
    order = sorted(harms, key=lambda name: -harms[name] / prices[name])
    taken: list[str] = []
    left = noise_power(score)
    while left > goal and len(taken) < len(order):
        taken += _next(order[len(taken) :], harms, left=left, goal=goal)
        model = written(prepared, without=taken)
        score = judge.rounding(model)
        left = noise_power(score)
    return Spared(
        model=model,
        nodes=_told(prepared, taken, harms),
        sqnr_db=score.sqnr_db,
        enough=left <= goal,
        notes=_notes(prepared, harms, enough=left <= goal, min_sqnr_db=min_sqnr_db),
    )


def _harms(prepared: Prepared, *, judge: Judge, budget_s: float) -> dict[str, float]:
    """Node -> noise power of the worst output with that node alone in integers."""
    start = time.monotonic()
    nodes = prepared.placement.nodes
    ordered = [node.name for node in prepared.model.graph.node if node.name in nodes]
    found: dict[str, float] = {}
    for name in progress.track(ordered, total=len(ordered)):
        if found and time.monotonic() > start + budget_s:
            break
        found[name] = noise_power(judge.rounding(written_alone(prepared, name)))
    return found


def _prices(
    prepared: Prepared, model: Any, *, feeds: Sequence[Feeds], threads: int
) -> Mapping[str, float]:
    """Node -> measured milliseconds that its integer form saves, at least a little."""
    with fs.scratch_directory() as folder:
        before, after = folder / "float.onnx", folder / "integers.onnx"
        onnxio.save_model(prepared.model, before)
        onnxio.save_model(model, after)
        times = node_times(before, after, feeds=feeds, runs=_PROFILED_RUNS, threads=threads)
    spent = {t.name: max(t.float_ms or 0.0, t.quantized_ms or 0.0) for t in times}
    floor = _MOVERS_PRICE_SHARE * float(np.median(list(spent.values()) or [1.0])) + 1e-6
    return {name: max(spent.get(name, 0.0), floor) for name in prepared.placement.nodes}


def _next(
    order: Sequence[str], harms: Mapping[str, float], *, left: float, goal: float
) -> list[str]:
    """So many of ``order`` that what the rest leaves is predicted to meet the goal; one at least.

    The noise of single nodes adds up to that of all of them but nearly, and a difference of two
    large sums says nothing of a small rest: the rest's share of the sum is taken instead.
    """
    total = sum(harms[name] for name in order)
    for count in range(1, len(order)):
        if left * sum(harms[name] for name in order[count:]) <= goal * total:
            return list(order[:count])
    return list(order)


def _told(
    prepared: Prepared, taken: Sequence[str], harms: Mapping[str, float]
) -> tuple[FloatNode, ...]:
    operators = {node.name: str(node.op_type) for node in prepared.model.graph.node}
    return tuple(
        FloatNode(
            name=name,
            operator=operators[name],
            reason=f"alone it would leave the outputs {-10 * np.log10(harms[name]):.1f} dB",
        )
        for name in taken
        if harms[name] > 0
    )


def _notes(
    prepared: Prepared, harms: Mapping[str, float], *, enough: bool, min_sqnr_db: float
) -> tuple[str, ...]:
    notes = []
    unmeasured = len(prepared.placement.nodes) - len(harms)
    if unmeasured:
        notes.append(f"time ran out before {unmeasured} nodes were measured: give a larger budget")
    if not enough:
        whatever = "" if unmeasured else " whatever is left in float"
        notes.append(f"the outputs keep less than {min_sqnr_db:g} dB{whatever}")
    return tuple(notes)
