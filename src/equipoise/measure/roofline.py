"""What a model costs on a target, estimated by a roofline.

(Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009.) Each node takes the
longer of its operations over the peak and its bytes over the bandwidth, and a moment to start. The
figures that the estimate rests on say where they are from.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal

from equipoise.graph.cost import ModelCost, NodeCost
from equipoise.targets.profile import Figure, Target

_START_US: Final = {"cpu": 3.0, "gpu": 5.0, "npu": 10.0, "browser": 20.0}
"""Microseconds before a node begins: a call, a launch."""

_REACHED: Final = 0.6
"""Share of a peak that a good kernel reaches."""

PEAK_OF: Final = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "fp16", "int8": "int8", "uint8": "int8",
}  # fmt: skip
_QUANTIZED: Final = frozenset({"DequantizeLinear", "QuantizeLinear"})
_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True)
class NodeEstimate:
    """Estimated time of a node.

    Attributes:
        name: Node.
        operator: Its type.
        latency_ms: Milliseconds.
        bound: What it waits for.
    """

    name: str
    operator: str
    latency_ms: float
    bound: Literal["compute", "memory", "start"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a model costs on a target, estimated.

    Attributes:
        latency_ms: Milliseconds of an inference at the sizes of the fit.
        bound_ms: What is waited for -> milliseconds.
        slowest: The nodes that take longest.
        peak: Operations, in 10^12 per second, of the commonest type of numbers.
        bandwidth_gb_s: Memory bandwidth.
    """

    latency_ms: float
    bound_ms: dict[str, float]
    slowest: tuple[NodeEstimate, ...]
    peak: Figure
    bandwidth_gb_s: Figure


def estimate(target: Target, cost: ModelCost) -> Estimate | None:
    """The roofline of a model on a target; None where a figure is missing."""
    bandwidth = target.hardware.bandwidth_gb_s
    peaks = {dtype: _peak(target, dtype) for dtype in {node.dtype for node in cost.nodes}}
    usual = peaks.get(_usual_dtype(cost)) or _peak(target, "float32")
    if bandwidth is None or usual is None:
        return None
    nodes = [
        _node(node, peak=peaks[node.dtype] or usual, bandwidth=bandwidth, target=target)
        for node in cost.nodes
        if node.operator not in _QUANTIZED  # what reads them is what takes time
    ]
    bound: dict[str, float] = {}
    for node in nodes:
        bound[node.bound] = bound.get(node.bound, 0.0) + node.latency_ms
    slowest = sorted(nodes, key=lambda node: -node.latency_ms)[:_SHOWN]
    return Estimate(
        latency_ms=sum(node.latency_ms for node in nodes),
        bound_ms=bound,
        slowest=tuple(slowest),
        peak=usual,
        bandwidth_gb_s=bandwidth,
    )


def _usual_dtype(cost: ModelCost) -> str:
    """The type in which most is multiplied."""
    products = Counter[str]()
    for node in cost.nodes:
        products[node.dtype] += node.multiply_accumulates
    return products.most_common(1)[0][0] if products else "float32"


def _peak(target: Target, dtype: str) -> Figure | None:
    peaks = target.hardware.dense_tops
    return peaks.get(PEAK_OF.get(dtype, "fp32")) or peaks.get("fp32") or peaks.get("fp16")


def _node(node: NodeCost, *, peak: Figure, bandwidth: Figure, target: Target) -> NodeEstimate:
    start_ms = _START_US[target.hardware.kind] / 1e3
    compute_ms = 2 * node.multiply_accumulates / (peak.value * _REACHED * 1e12) * 1e3
    memory_ms = (node.read_bytes + node.written_bytes) / (bandwidth.value * 1e9) * 1e3
    longest = max(compute_ms, memory_ms)
    bound: Literal["compute", "memory", "start"] = "memory" if memory_ms > compute_ms else "compute"
    return NodeEstimate(
        name=node.name,
        operator=node.operator,
        latency_ms=start_ms + longest,
        bound="start" if longest < start_ms else bound,
    )
