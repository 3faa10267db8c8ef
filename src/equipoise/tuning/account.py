"""What a run found, as data and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from equipoise.measure.interval import metric_interval, smallest_provable_drop
from equipoise.pipeline import Pipeline
from equipoise.quantize.plans import NodeFact
from equipoise.search.choose import broken_by, nearest, prices
from equipoise.search.goal import Goal, Limit
from equipoise.search.lab import Task
from equipoise.search.result import Repeat, TuneResult
from equipoise.search.search import Found
from equipoise.search.space import BASELINE
from equipoise.search.stages import StageLab
from equipoise.stages import versions_of
from equipoise.tuning.config import TuneConfig
from equipoise.tuning.recipes import Recipes

VERSIONS: Final = (
    "equipoise", "numpy", "onnx", "onnxruntime", "onnxscript", "torch", "transformers"
)  # fmt: skip
"""Packages whose versions belong to a result."""


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A search that has ended, and its surroundings.

    Attributes:
        found: What it found.
        recipes: Where it looked.
        lab: Where recipes were tried.
        pipeline: Of the model as it is.
        nodes: Of the engine that was chosen.
        repeats: The same search again.
    """

    found: Found
    recipes: Recipes
    lab: StageLab
    pipeline: Pipeline
    nodes: tuple[NodeFact, ...] = ()
    repeats: tuple[Repeat, ...] = ()


def result_of(searched: Searched, config: TuneConfig) -> TuneResult:
    """All of it, as data."""
    found, pipeline, lab = searched.found, searched.pipeline, searched.lab
    data = pipeline.data.record
    return TuneResult(
        source=config.source,
        data=config.data,
        target=config.target,
        metric=pipeline.job.metric,
        goal=config.goal,
        threads=pipeline.job.threads,
        reference_metric=metric_interval(lab.task.reference, lab.task.value),
        reference_report=lab.reference_report,
        reference_name=pipeline.reference.record.by,
        evaluation_samples=data.evaluation_samples,
        calibration_samples=data.calibration_samples,
        candidates=found.candidates,
        chosen=found.chosen.recipe.name if found.chosen else "",
        chosen_reason=found.reason or _nothing(found, config.goal),
        binding=() if found.chosen else _binding(found, config.goal),
        prices=prices(found.candidates, found.chosen, goal=config.goal),
        nodes=searched.nodes,
        points=sum(1 for _ in searched.recipes.space.points()),
        stopped=found.stopped,
        seconds=found.seconds,
        command=config.command,
        machine=pipeline.job.machine,
        versions=versions_of(VERSIONS),
        warnings=(*data.warnings, *_power_warning(lab.task, config.goal)),
        steps=_steps(searched, config),
        repeats=searched.repeats,
    )


def _power_warning(task: Task, goal: Goal) -> tuple[str, ...]:
    least = smallest_provable_drop(len(task.reference), confidence=goal.confidence)
    if not task.discrete or goal.max_drop is None or least <= goal.max_drop:
        return ()
    words = (
        f"{len(task.reference)} evaluation samples cannot show a drop below {least:.4f} at"
        f" {100 * goal.confidence:g} % confidence, so nothing but float32 can be accepted at"
        f" --max-drop {goal.max_drop:g}"
    )
    return (words,)


def _steps(searched: Searched, config: TuneConfig) -> tuple[str, ...]:
    pipeline, found = searched.pipeline, searched.found
    exported, data = pipeline.exported.record, pipeline.data.record
    tolerance = ", ".join(f"{t.output} {t.atol:.2g}" for t in exported.proof.tolerances)
    prepared = (
        f"Prepared {data.calibration_samples} calibration and {data.evaluation_samples}"
        " evaluation samples that do not overlap."
    )
    proved = (
        f"Exported with {exported.exporter} to opset {exported.verified.opset}; the outputs"
        f" agree with {pipeline.reference.record.by} at {len(exported.verified.parity)}"
        f" combinations of sizes within {tolerance}."
    )
    target = f"Target {config.target}: {pipeline.job.target.int8.reason}."
    pruning = searched.recipes.pruning
    pruned = (_sentence(pruning),) if pruning else ()
    return prepared, proved, target, *pruned, *_search_steps(found, config), _last_step(found)


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _search_steps(found: Found, config: TuneConfig) -> tuple[str, ...]:
    whole = sum(c.measurement is not None for c in found.candidates)
    outraced = sum(c.verdict == "outraced" for c in found.candidates)
    refused = [c.recipe.name for c in found.candidates if c.verdict == "refused"]
    measured_words = (
        f"Tried {len(found.candidates)} recipes and measured {whole} to the end, each in processes"
        f" of its own; {outraced} could not win any more after a few rounds. Latency in at least"
        f" {config.rounds} interleaved rounds against the float engine."
    )
    judged = (
        f"Refused: {', '.join(refused) or 'none'}. The bounds of the metric hold at"
        f" {100 * config.goal.confidence:g} % for all candidates together."
    )
    return measured_words, judged, f"Stopped because {found.stopped}."


def _last_step(found: Found) -> str:
    if found.chosen is None:
        return "Chose nothing: no engine keeps all limits."
    compared = found.chosen.recipe.name == BASELINE or found.interrupted is not None
    return f"Chose {found.chosen.recipe.name}{'' if compared else ', which was measured afresh'}."


def repeat_of(found: Found) -> Repeat:
    """What another search came to."""
    chosen = found.chosen
    measured = chosen.measurement if chosen else None
    return Repeat(
        chosen=chosen.recipe.name if chosen else "",
        speedup=measured.speedup if measured else None,
        size_bytes=measured.size_bytes if measured else None,
        trials=len(found.candidates),
    )


def _binding(found: Found, goal: Goal) -> tuple[Limit, ...]:
    near = nearest(found.candidates, goal=goal)
    return broken_by(near, goal=goal) if near else ()


def _nothing(found: Found, goal: Goal) -> str:
    near = nearest(found.candidates, goal=goal)
    return f"no engine keeps all limits; the nearest is {near.recipe.name}" if near else ""
