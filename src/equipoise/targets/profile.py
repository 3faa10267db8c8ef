"""What a device profile says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

ORT_JOINS: Final = (
    "Add", "AveragePool", "Concat", "Flatten", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul",
    "Reshape", "Resize", "Sigmoid", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators that ONNX Runtime's CPU kernels run in integers, or that only move values."""


@dataclass(frozen=True, kw_only=True)
class Int8Scheme:
    """How a target wants its integers.

    Attributes:
        activation: Type of activations.
        weight: Type of weights; zero is always in their middle.
        per_channel: Whether each output channel has a weight scale of its own.
        per_tensor: Operators whose weights have one scale for all channels even so.
        saturates: Whether the kernels add products in 16 bits, which overflow unless weights keep
            to seven bits.
        reason: Why, in words.
        symmetric: Whether zero is the middle of the activations' type.
        power_of_two: Whether every scale is a power of two.
        bias: Type of the biases of convolutions and Gemm.
        quantize_outputs: Whether a QuantizeLinear follows a node; where not, it comes before the
            next one alone, and the runtime fuses what lies between.
        float_products: Whether a MatMul or Gemm that reads integers may give float out.
        fuses_adds: Whether an Add runs inside the convolution whose output it reads, before that
            is rounded; then its other input alone is quantised.
        absorbs_clips: Whether a Clip or Relu that the grid does anyway goes out of the graph.
        tables: Whether a Gather may pick rows of an embedding that is stored as int8.
        joins: Operators without weights that run in integers between others that do.
        smallest_range: Least range of an activation.
    """

    activation: Literal["uint8", "int8", "uint16", "int16"]
    weight: Literal["int8"]
    per_channel: bool
    saturates: bool
    reason: str
    per_tensor: tuple[str, ...] = ()
    symmetric: bool = False
    power_of_two: bool = False
    bias: Literal["int32", "float"] = "int32"
    quantize_outputs: bool = True
    float_products: bool = True
    fuses_adds: bool = False
    absorbs_clips: bool = True
    tables: bool = True
    joins: tuple[str, ...] = ORT_JOINS
    smallest_range: float = 0.0

    @property
    def least_opset(self) -> int:
        """The first ONNX opset that has these types, and scales per channel."""
        return 21 if self.activation in {"uint16", "int16"} else 13


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
