"""Which nodes static int8 may touch.

Quantising everything that a runtime can quantise destroys transformers: a mask constant (the most
negative float) or one outlier channel stretches the range of a tensor until everything else falls
on one step. The guard leaves a node in float when its calibrated numbers say so, not by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from equipoise import onnxio
from equipoise.quantize.calibrate import TensorRange

MASK_MAGNITUDE: Final = 1e9
"""No trained activation is as large; attention masks (-1e9, -3.4e38, -inf) are."""

MINIMUM_SQNR_DB: Final = 24.0
"""Four effective bits at 6.02 dB each; an activation that keeps fewer has lost its signal."""

_LINEAR: Final = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_GLUE: Final = frozenset(
    {
        "Add", "AveragePool", "Clip", "Concat", "Flatten", "Gather", "GlobalAveragePool",
        "LeakyRelu", "MaxPool", "Mul", "Pad", "Relu", "Reshape", "Resize", "Slice", "Squeeze",
        "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that gain nothing alone but join quantised ones without a detour through float."""

_FRAGILE: Final = frozenset(
    {
        "Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization",
        "SkipLayerNormalization", "Gelu", "BiasGelu", "FastGelu", "Erf", "Exp", "Pow", "Sqrt",
        "Div", "Sigmoid", "Tanh", "ReduceMean", "ReduceSum", "Where", "Attention",
    }
)  # fmt: skip
"""Operators whose outputs the 8-bit grid bends most and whose integer kernels gain least."""


@dataclass(frozen=True, kw_only=True)
class FloatNode:
    """A node that stays in float, and why."""

    name: str
    operator: str
    reason: str


def collapse_prone(model: Any, ranges: Mapping[str, TensorRange]) -> tuple[FloatNode, ...]:
    """The nodes of ``model`` that static int8 would damage, with the reason for each.

    Args:
        model: Float ``onnx.ModelProto`` whose nodes have names.
        ranges: Tensor name -> calibrated range.
    """
    constants = set(onnxio.initializers(model))
    transformer = any(node.op_type in _FRAGILE for node in model.graph.node)
    kept = []
    for node in model.graph.node:
        if not any(name in ranges for name in node.output):
            continue
        reason = _reason(node, ranges, constants=constants, transformer=transformer)
        if reason:
            kept.append(FloatNode(name=node.name, operator=node.op_type, reason=reason))
    return tuple(kept)


def _reason(
    node: Any, ranges: Mapping[str, TensorRange], *, constants: set[str], transformer: bool
) -> str:
    for name in [*node.input, *node.output]:
        if name in ranges and is_mask(ranges[name]):
            return f"{name} holds a mask constant, not activations"
    if node.op_type in _FRAGILE:
        return "an 8-bit grid bends what they compute"
    if transformer and node.op_type not in _LINEAR:
        return "between float operators an integer detour costs time and precision"
    if node.op_type in _LINEAR and not any(name in constants for name in node.input[1:]):
        return "a product of two activations rounds both"
    weak = [name for name in node.input if name in ranges and is_weak(ranges[name])]
    if node.op_type in _LINEAR | _GLUE and weak:
        return f"{weak[0]} would keep only {ranges[weak[0]].int8_sqnr_db:.0f} dB of signal"
    return ""


def is_mask(tensor: TensorRange) -> bool:
    """Whether ``tensor`` carries a mask constant."""
    return tensor.non_finite > 0 or tensor.magnitude >= MASK_MAGNITUDE


def is_weak(tensor: TensorRange) -> bool:
    """Whether ``tensor`` loses its signal on an 8-bit grid over its calibrated range."""
    return tensor.int8_sqnr_db < MINIMUM_SQNR_DB
