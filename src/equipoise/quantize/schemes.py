"""Ways to quantise, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DynamicInt8:
    """Weights in int8 ahead of time; activation ranges taken anew in every run.

    Attributes:
        reduce_range: Seven-bit weights, so that the 16-bit sums of AVX2 cannot saturate.
        operators: ONNX operator types to quantise.
    """

    kind: Literal["dynamic"] = "dynamic"
    reduce_range: bool = False
    operators: tuple[str, ...] = ("MatMul", "Gemm", "Conv", "Gather", "Attention")


@dataclass(frozen=True, kw_only=True)
class StaticInt8:
    """Weights and activations in int8 as QDQ, activation ranges from calibration data.

    Attributes:
        reduce_range: Seven-bit weights, so that the 16-bit sums of AVX2 cannot saturate.
        per_channel: One weight scale per output channel.
        guarded: Leave the collapse-prone nodes in float: see ``quantize.placement``.
    """

    kind: Literal["static"] = "static"
    reduce_range: bool = False
    per_channel: bool = True
    guarded: bool = False


@dataclass(frozen=True, kw_only=True)
class WeightOnlyInt8:
    """Weights stored in int8 per channel and computed in float: a quarter of the size."""

    kind: Literal["weight-only"] = "weight-only"


Quantization = DynamicInt8 | StaticInt8 | WeightOnlyInt8
