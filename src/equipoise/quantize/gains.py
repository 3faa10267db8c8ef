"""Measuring what each node of a model harms and gains in integers.

Harm is the noise of a node alone in integers; gain is time, borders included. What both predict of
whole models is checked on whole models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import fs, onnxio
from equipoise.measure.interval import Interval, median_interval
from equipoise.measure.latency import time_engines
from equipoise.quantize.plans import Check, GainsRecord, NodeGain, decibel, front_of, needed
from equipoise.quantize.quantize import QuantizeConfig, prepare_to_weigh
from equipoise.quantize.schemes import StaticInt8
from equipoise.quantize.static import Prepared, written
from equipoise.quantize.sweeps import Judge, noise_power
from equipoise.quantize.timing import Timing
from equipoise.quantize.weighing import TimingSettings, harms_of, time_nodes, weight_sizes
from equipoise.runtimes.engine import EngineFile

_TIMING: Final = TimingSettings(openings=4, runs=8)
_ROUNDS: Final = 32
_CHECKED: Final = 3
"""Plans whose whole model is made and measured, against the prediction."""

_TIMED_SAMPLES: Final = 4


def weigh_nodes(config: QuantizeConfig, *, output: Path) -> GainsRecord:  # noqa: ARG001
    """Measure what every node of ``config.model`` harms and gains in integers.

    Args:
        config: As of the static quantise stage; ``min_sqnr_db`` of its settings does not count, and
            ``budget_s`` is the time for measuring harm.
        output: Nothing is written.

    Raises:
        SourceError: The model is no ONNX file, is quantised already, or its opset cannot be raised.
        RecipeError: The scheme is not static, has no statistics, or finds nothing to act on.
        IntegrityError: The ranges belong to another model or to other data.
    """
    prepared, judge = prepare_to_weigh(config)
    assert isinstance(config.quantization, StaticInt8)  # noqa: S101  it has been looked at
    return weigh(prepared, judge=judge, budget_s=config.quantization.budget_s)


def weigh(prepared: Prepared, *, judge: Judge, budget_s: float) -> GainsRecord:
    """Measure harm and gain of the nodes of ``prepared``, and check what they predict.

    Args:
        prepared: What may run in integers.
        judge: Samples, and the float model's outputs on them.
        budget_s: Time for measuring harm; times take a few seconds besides.
    """
    harms = harms_of(prepared, judge=judge, budget_s=budget_s)
    feeds = judge.feeds[:_TIMED_SAMPLES]
    timing = time_nodes(prepared, feeds=feeds, threads=judge.threads, settings=_TIMING)
    able = prepared.placement.nodes
    found = GainsRecord(
        nodes=_nodes(prepared, timing, harms),
        latency=timing.model,
        noise=noise_power(judge.rounding(written(prepared))),
        float_ms=_certain(timing.model.predict_ms(())),
        integer_ms=_certain(timing.model.predict_ms(able)),
        checks=(),
        notes=_notes(prepared, timing, harms),
    )
    return _Whole(prepared, judge, found).checked()


def _certain(milliseconds: float) -> Interval:
    return Interval(value=milliseconds, low=milliseconds, high=milliseconds)


def _nodes(prepared: Prepared, timing: Timing, harms: Mapping[str, float]) -> tuple[NodeGain, ...]:
    kept = {node.name: node.reason for node in prepared.kept}
    sizes = weight_sizes(prepared)
    found = []
    for node in prepared.model.graph.node:
        name, operator = str(node.name), str(node.op_type)
        if name in timing.nodes:
            found.append(_able(name, operator, timing, noise=harms.get(name), weights=sizes[name]))
        elif name in timing.others or name in kept:
            reason = kept.get(name, f"{operator} is computed in float")
            plain = timing.others.get(name)
            found.append(
                NodeGain(name=name, operator=operator, able=False, reason=reason, float_ms=plain)
            )
    return tuple(found)


def _able(
    name: str, operator: str, timing: Timing, *, noise: float | None, weights: int
) -> NodeGain:
    times, model = timing.nodes[name], timing.model
    able = frozenset(timing.nodes)
    without = model.settled(able - {name})
    return NodeGain(
        name=name,
        operator=operator,
        noise=noise,
        sqnr_db=decibel(noise),
        float_ms=times.float_ms,
        integer_ms=times.integer_ms,
        gain_ms=model.predict_ms(without) - model.predict_ms(able),
        spread_ms=times.spread_ms,
        weights=weights,
        group=times.group if len(times.group) > 1 else (),
    )


def _notes(prepared: Prepared, timing: Timing, harms: Mapping[str, float]) -> tuple[str, ...]:
    spreads = [times.spread_ms for times in timing.nodes.values()]
    seen = f"{len(timing.designs)} models, {_TIMING.openings} openings each"
    spread = f"{float(np.median(spreads)):.2g} ms, at most {max(spreads):.2g} ms"
    notes = [f"gains of {len(spreads)} nodes from {seen}; they vary by {spread} to either side"]
    unmeasured = len(prepared.placement.nodes) - len(harms)
    if unmeasured:
        notes.append(
            f"time ran out before the noise of {unmeasured} nodes was measured; they stay in"
            " integers: give a larger budget"
        )
    return tuple(notes)


def _times_of(float_ms: float, ratio: Interval) -> Interval:
    return Interval(
        value=float_ms * ratio.value, low=float_ms * ratio.low, high=float_ms * ratio.high
    )


class _Whole:
    """Whole models, measured beside what is predicted of them."""

    def __init__(self, prepared: Prepared, judge: Judge, found: GainsRecord) -> None:
        self._prepared, self._judge, self._found = prepared, judge, found

    def checked(self) -> GainsRecord:
        able = self._found.able
        choices = [c.integers for c in front_of(self._found, count=_CHECKED + 1)]
        some = [c for c in dict.fromkeys(choices) if c not in {able, frozenset()}][:_CHECKED]
        times = self._times([frozenset(), able, *some])
        checks = zip([able, *some], times[1:], strict=True)
        return replace(
            self._found,
            float_ms=times[0],
            integer_ms=times[1],
            checks=tuple(self._check(d, time, float_ms=times[0].value) for d, time in checks),
        )

    def _times(self, designs: Sequence[frozenset[str]]) -> list[Interval]:
        """Milliseconds of each; of all but the first by their ratio to it, round by round."""
        with fs.scratch_directory() as folder:
            files = [folder / f"{index}.onnx" for index in range(len(designs))]
            for file, design in zip(files, designs, strict=True):
                onnxio.save_model(self._written(design), file)
            rounds = time_engines(
                [EngineFile(file=file, runtime="onnxruntime") for file in files],
                [dict(feeds) for feeds in self._judge.feeds[:_TIMED_SAMPLES]],
                threads=self._judge.threads,
                rounds=_ROUNDS,
            )
        float_ms = median_interval(rounds[:, 0])
        ratios = [median_interval(rounds[:, i] / rounds[:, 0]) for i in range(1, len(files))]
        return [float_ms, *(_times_of(float_ms.value, ratio) for ratio in ratios)]

    def _check(self, design: frozenset[str], time: Interval, *, float_ms: float) -> Check:
        model, harms = self._found.latency, self._found.harms
        return Check(
            float_nodes=needed(model, design, able=self._found.able),
            predicted_ms=float_ms * model.predict_ms(design) / model.predict_ms(()),
            measured_ms=time,
            predicted_noise=math.fsum(harms.get(name, 0.0) for name in design),
            measured_noise=noise_power(self._judge.rounding(self._written(design))),
        )

    def _written(self, design: frozenset[str]) -> Any:
        return written(self._prepared, without=self._prepared.placement.nodes - design)
