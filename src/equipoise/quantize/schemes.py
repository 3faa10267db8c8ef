"""Ways to quantise, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from equipoise.quantize.clip import Clipping, LargestWeight
from equipoise.quantize.halves import Halves
from equipoise.quantize.ranges import Method, Mse
from equipoise.quantize.rounding import RoundingSettings
from equipoise.quantize.treatment import Remedies
from equipoise.quantize.weight_only import WeightOnly

Tables = Literal["int8", "blocks", "float"]
"""How tables that a Gather reads are stored: rows of int8 with one scale each; blocks of 4 bits
with a scale each, which ONNX Runtime alone gathers from; or as they are."""


@dataclass(frozen=True, kw_only=True)
class DynamicInt8:
    """Weights in int8 ahead of time; activation ranges taken anew in every run.

    Attributes:
        reduce_range: Seven-bit weights, so that the 16-bit sums of AVX2 cannot saturate.
        operators: ONNX operator types to quantise; those of Gather only where ``tables`` is int8.
        tables: How embeddings are stored.
    """

    kind: Literal["dynamic"] = "dynamic"
    reduce_range: bool = False
    operators: tuple[str, ...] = ("MatMul", "Gemm", "Conv", "Gather", "Attention")
    tables: Tables = "int8"


@dataclass(frozen=True, kw_only=True)
class StaticInt8:
    """Weights and activations in int8 as QDQ, activation ranges from calibration data.

    Attributes:
        method: How ranges of activations are chosen.
        remedies: What may be done about activations with unlike channels.
        rounding: How weights are rounded so that their errors cancel; None for each to its nearest
            integer.
        bias_correction: Take the mean error of convolutions and Gemm off their biases.
        weight_ranges: How far the grids of weights reach.
        weight_bits: Bits of the weights; None for 8, and for 7 in the layers that would saturate
            where the target's 16-bit sums do.
        min_sqnr_db: Signal to noise that the outputs have to keep on the calibration samples:
            nodes go back to float until they do, those whose float form costs least time.
        budget_s: Time for finding them.
        float_nodes: Names of nodes that stay in float in any case.
        tables: How embeddings are stored.
    """

    kind: Literal["static"] = "static"
    method: Method = field(default_factory=Mse)
    remedies: Remedies = field(default_factory=Remedies)
    rounding: RoundingSettings | None = field(default_factory=RoundingSettings)
    bias_correction: bool = True
    weight_ranges: Clipping = field(default_factory=LargestWeight)
    weight_bits: Literal[7, 8] | None = None
    min_sqnr_db: float = 20.0
    budget_s: float = 300.0
    float_nodes: tuple[str, ...] = ()
    tables: Tables = "int8"


@dataclass(frozen=True, kw_only=True)
class WeightOnlyInt8:
    """Weights stored in int8 per channel and computed in float: a quarter of the size."""

    kind: Literal["weight-only"] = "weight-only"


Quantization = DynamicInt8 | StaticInt8 | WeightOnlyInt8 | WeightOnly | Halves
