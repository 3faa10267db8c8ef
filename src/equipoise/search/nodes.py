"""The chosen model, node by node: what each computes in, and what that costs and gains."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from equipoise.errors import EquipoiseError
from equipoise.pipeline import Pipeline
from equipoise.quantize.plans import NodeFact, node_facts
from equipoise.quantize.schemes import StaticInt8
from equipoise.recipe import Recipe

_BUDGET_S: Final = 60.0
"""For the harm of single nodes: it explains a choice that is made already."""


def facts_of(pipeline: Pipeline, recipe: Recipe) -> tuple[NodeFact, ...]:
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
    return node_facts(found, float_nodes={node.name: node.reason for node in made.float_nodes})
