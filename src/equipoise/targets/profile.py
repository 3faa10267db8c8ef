"""What a device profile says."""

from __future__ import annotations

from dataclasses import dataclass, field
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
class Figure:
    """A figure of a device, and where it is from.

    Attributes:
        value: The figure.
        source: The document that states it; begins with ``unverified`` or ``derived`` where none at
            hand does.
    """

    value: float
    source: str

    @property
    def verified(self) -> bool:
        """Whether a document states it."""
        return not self.source.startswith(("unverified", "derived"))


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a device is.

    Attributes:
        kind: What computes.
        architecture: Of its CPU: ``x86_64`` or ``aarch64``; empty for any.
        flags: CPU features that it has in any case, as ``/proc/cpuinfo`` calls them.
        any_flag: CPU features of which it has one at least.
        cores: CPU cores; 0 when that differs.
        memory_gb: Memory, in 10^9 bytes.
        bandwidth_gb_s: Memory bandwidth, in 10^9 bytes per second.
        dense_tops: Type of numbers -> peak, in 10^12 operations per second; a multiplication and an
            addition are two.
        sparse_tops: The same with two of four weights zero, as some vendors state it.
        compute_capability: Of an NVIDIA GPU.
        htp_architecture: Of a Qualcomm Hexagon NPU.
        power_modes_w: Power limits that it can be set to.
    """

    kind: Literal["cpu", "gpu", "npu", "browser"]
    architecture: Literal["x86_64", "aarch64", ""] = ""
    flags: tuple[str, ...] = ()
    any_flag: tuple[str, ...] = ()
    cores: int = 0
    memory_gb: Figure | None = None
    bandwidth_gb_s: Figure | None = None
    dense_tops: dict[str, Figure] = field(default_factory=dict)
    sparse_tops: dict[str, Figure] = field(default_factory=dict)
    compute_capability: str = ""
    htp_architecture: str = ""
    power_modes_w: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device to make engines for.

    Attributes:
        name: What ``--target`` takes.
        family: Which devices it belongs to.
        summary: One line for people.
        runtime: Runtime of its engines.
        hardware: What the device is.
        int8: Its integer scheme.
        opset: ONNX opset to export with; the largest that its runtime reads for certain.
        max_ir_version: Largest IR version of an ONNX file that the runtime reads.
        artefacts: What it loads, in words.
        dtypes: Types of numbers that it computes in.
        providers: Execution providers or devices of the runtime, in order.
        static_shapes: Whether every size has to be fixed before the engine is built.
        resizes: Whether its runtime resizes pictures in the graph.
        tensorrt: Generation of TensorRT; empty for none.
    """

    name: str
    family: str
    summary: str
    runtime: str
    hardware: Hardware
    int8: Int8Scheme
    opset: int
    max_ir_version: int
    artefacts: tuple[str, ...]
    dtypes: tuple[str, ...]
    providers: tuple[str, ...] = ()
    static_shapes: bool = False
    resizes: bool = True
    tensorrt: Literal["10", "11", "rtx", ""] = ""

    @property
    def gathers_blocks(self) -> bool:
        """Whether its runtime picks rows of tables that are stored in blocks."""
        return self.runtime == "onnxruntime"

    @property
    def channel_multiple(self) -> int:
        """Channels that its kernels take at once, so that widths in between gain nothing.

        16 floats fill a register of AVX-512 and 8 one of AVX2, and ONNX Runtime blocks channels so;
        the integer kernels of GPUs and NPUs take 32.
        """
        if self.hardware.kind in {"gpu", "npu"}:
            return 32
        return 16 if "avx512f" in self.hardware.flags else 8
