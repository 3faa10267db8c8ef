"""What a device profile says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Int8Scheme:
    """How a target wants its integers.

    Attributes:
        activation: Type of activations.
        weight: Type of weights.
        per_channel: Whether each output channel has a weight scale of its own.
        saturates: Whether the kernels add products in 16 bits, which overflow unless weights keep
            to seven bits.
        reason: Why, in words.
    """

    activation: Literal["uint8", "int8"]
    weight: Literal["uint8", "int8"]
    per_channel: bool
    saturates: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device to make engines for.

    Attributes:
        name: What ``--target`` takes.
        summary: One line for people.
        runtime: Runtime of its engines.
        int8: Its integer scheme.
        opset: ONNX opset to export with.
        resizes: Whether its runtime resizes pictures in the graph.
        max_ir_version: Largest IR version of an ONNX file that the runtime reads.
    """

    name: str
    summary: str
    runtime: str
    int8: Int8Scheme
    opset: int
    max_ir_version: int
    resizes: bool = True
