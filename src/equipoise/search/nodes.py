"""The chosen model, node by node: what each computes in, and what that costs and gains."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from equipoise.errors import EquipoiseError
from equipoise.pipeline import Pipeline
from equipoise.quantize.plans import node_facts
from equipoise.quantize.schemes import StaticInt8
from equipoise.recipe import Recipe
from equipoise.search.result import NodePlan

_BUDGET_S: Final = 60.0
"""For the harm of single nodes: it explains a choice that is made already."""


def node_plan(pipeline: Pipeline, recipe: Recipe) -> tuple[NodePlan, ...]:
    """Nodes of the engine of ``recipe`` in graph order; empty where it is not static int8.

    What cannot be weighed is left out: the choice does not depend on it.
    """
    quantization = recipe.quantization
    if not isinstance(quantization, StaticInt8):
        return ()
    try:
        model = pipeline.float_of(recipe).model
        settings = replace(quantization, budget_s=_BUDGET_S)
        found = pipeline.gains(model, settings, label=recipe.name)
        made = pipeline.quantize(model, quantization, label=recipe.name).record
    except EquipoiseError:
        return ()
    facts = node_facts(found, float_nodes={node.name: node.reason for node in made.float_nodes})
    return tuple(
        NodePlan(
            name=fact.name,
            operator=fact.operator,
            precision=fact.precision,
            sqnr_db=fact.sqnr_db,
            float_ms=fact.float_ms,
            integer_ms=fact.integer_ms,
            reason=fact.reason,
        )
        for fact in facts
    )
