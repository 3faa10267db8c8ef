"""Which recipes a run may try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from equipoise import onnxio
from equipoise.compress.cutting import Pruning
from equipoise.compression.automatic import Automatic, automatic_prunings
from equipoise.pipeline import Pipeline
from equipoise.quantize.weight_only import has_tables
from equipoise.search.space import Space, SpaceSettings, baseline_alone, space_for
from equipoise.search.stages import StageLab
from equipoise.tuning.config import TuneConfig, is_automatic


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """A space, and what there is to say of it.

    Attributes:
        space: All recipes.
        pruning: What was decided about pruning, in words; empty where a person did.
    """

    space: Space
    pruning: str = ""


def recipes_for(config: TuneConfig, *, pipeline: Pipeline, lab: StageLab) -> Recipes:
    """The space of ``config``: what the model, the target and the budget allow."""
    saturates = pipeline.job.target.int8.saturates
    if config.recipe is not None:
        return Recipes(space=baseline_alone(saturates=saturates))
    if not is_automatic(config):
        return Recipes(space=_space(config, pipeline, prunings=_asked(config)))
    found = _automatic(config, pipeline=pipeline, lab=lab)
    space = _space(config, pipeline, prunings=found.prunings, first_pruning=True)
    return Recipes(space=space, pruning=found.reason)


def _space(
    config: TuneConfig,
    pipeline: Pipeline,
    *,
    prunings: Sequence[Pruning],
    first_pruning: bool = False,
) -> Space:
    job = pipeline.job
    every = tuple(range(1, job.machine.cores + 1))
    tables = job.target.gathers_blocks and has_tables(onnxio.load_graph(pipeline.float_model))
    return space_for(
        SpaceSettings(
            saturates=job.target.int8.saturates,
            prunings=tuple(prunings),
            first_pruning=first_pruning,
            threads=every if config.threads is None else (),
            targets=config.also,
            tables=tables,
        )
    )


def _automatic(config: TuneConfig, *, pipeline: Pipeline, lab: StageLab) -> Automatic:
    assert config.budget.seconds is not None  # noqa: S101  else it would not be automatic
    return automatic_prunings(
        pipeline,
        budget_s=config.budget.seconds,
        latency_ms=lab.baseline_latency_ms(),
        max_drop=_allowed(config),
        recovery=config.recovery,
    )


def _asked(config: TuneConfig) -> list[Pruning]:
    return [
        Pruning(speedup=speedup, max_drop=_allowed(config), recovery=config.recovery)
        for speedup in config.prune or ()
    ]


def _allowed(config: TuneConfig) -> float:
    """The drop that pruning may cost: any where there is no limit."""
    return 1.0 if config.goal.max_drop is None else config.goal.max_drop
