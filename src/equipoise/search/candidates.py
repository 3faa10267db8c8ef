"""The candidates that are tried for a target, as recipes."""

from __future__ import annotations

from typing import Final

from equipoise.compress.cutting import Pruning
from equipoise.quantize.schemes import DynamicInt8, StaticInt8, WeightOnlyInt8
from equipoise.recipe import Recipe

BASELINE: Final = "float32"


def pruned(pruning: Pruning, *, saturates: bool) -> tuple[Recipe, ...]:
    """The model pruned to a goal, in float and in both kinds of int8."""
    name = f"pruned-{pruning.speedup:g}x"
    words = f"Pruned to {pruning.speedup:g} times the speed and trained again"
    return (
        Recipe(name=name, summary=f"{words}.", pruning=pruning),
        Recipe(
            name=f"{name}-int8-dynamic",
            summary=f"{words}; activations quantised in every run.",
            pruning=pruning,
            quantization=DynamicInt8(reduce_range=saturates),
        ),
        Recipe(
            name=f"{name}-int8-static",
            summary=f"{words}; ranges from calibration data.",
            pruning=pruning,
            quantization=StaticInt8(),
        ),
    )


def candidates(*, saturates: bool) -> tuple[Recipe, ...]:
    """All recipes for a CPU, the float baseline first.

    Args:
        saturates: Whether the 16-bit sums of the target's int8 kernels can overflow. Where they
            can, dynamic schemes take seven-bit weights; static ones find out which layers need it.
    """
    range_note = "7-bit weights, because this CPU saturates" if saturates else "8-bit weights"
    return (
        Recipe(name=BASELINE, summary="The exported model as it is."),
        Recipe(
            name="float32-fused",
            summary="Attention, layer norm and GELU as single operators.",
            fused=True,
        ),
        Recipe(
            name="int8-weights",
            summary="Weights stored as int8 per channel, computed in float.",
            quantization=WeightOnlyInt8(),
        ),
        Recipe(
            name="int8-dynamic",
            summary=f"Activations quantised in every run; {range_note}.",
            quantization=DynamicInt8(reduce_range=saturates),
        ),
        Recipe(
            name="int8-dynamic-fused",
            summary=f"The same on the fused graph; {range_note}.",
            fused=True,
            quantization=DynamicInt8(reduce_range=saturates),
        ),
        Recipe(
            name="int8-static",
            summary="Ranges from calibration data; what int8 would harm stays in float.",
            quantization=StaticInt8(),
        ),
        Recipe(
            name="int8-static-fused",
            summary="The same on the fused graph.",
            fused=True,
            quantization=StaticInt8(),
        ),
    )
