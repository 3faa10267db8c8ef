"""The integer schemes of the known targets."""

from __future__ import annotations

from typing import Final

from equipoise.targets.profile import Int8Scheme

X86_AVX2: Final = Int8Scheme(
    activation="uint8",
    weight="int8",
    per_channel=True,
    saturates=True,
    reason="without VNNI, u8 x s8 products are added in 16 bits and saturate,"
    " so layers that would lose by it keep their int8 weights to seven bits",
)

X86_VNNI: Final = Int8Scheme(
    activation="uint8",
    weight="int8",
    per_channel=True,
    saturates=False,
    reason="VNNI adds u8 x s8 products in 32 bits, so weights use all eight bits",
)

ARM64: Final = Int8Scheme(
    activation="int8",
    weight="int8",
    per_channel=True,
    saturates=False,
    reason="Arm kernels take signed activations and add products in 32 bits",
)

TENSORRT: Final = Int8Scheme(
    activation="int8",
    weight="int8",
    per_channel=True,
    saturates=False,
    reason="TensorRT's parser takes signed integers with zero point 0 and float biases alone, and"
    " fuses a convolution with the bias, Add and Relu that follow it up to the next Q",
    symmetric=True,
    bias="float",
    quantize_outputs=False,
    fuses_adds=True,
    absorbs_clips=False,
    tables=False,
    joins=("Add",),
)
"""NVIDIA, Working with Quantized Types: quantise the inputs of what has weights, not the outputs,
and of an Add the input that no convolution just computed."""

OPENVINO: Final = Int8Scheme(
    activation="uint8",
    weight="int8",
    per_channel=True,
    saturates=True,
    reason="OpenVINO's int8 kernels take u8 x s8 and a float bias, and saturate on CPUs without"
    " VNNI, so layers that would lose by it keep their int8 weights to seven bits",
    bias="float",
    quantize_outputs=False,
    absorbs_clips=False,
)

QNN_HTP: Final = Int8Scheme(
    activation="uint8",
    weight="int8",
    per_channel=True,
    saturates=False,
    reason="Hexagon runs a product in integers where integers come out too, and only the weights"
    " of convolutions and Gemm may have a scale per channel",
    per_tensor=("MatMul",),
    float_products=False,
    tables=False,
    smallest_range=1e-4,
)

QNN_HTP_16: Final = Int8Scheme(
    activation="uint16",
    weight="int8",
    per_channel=True,
    saturates=False,
    reason="Hexagon multiplies u16 activations with s8 weights too, for models that lose too much"
    " in eight bits; products as for qnn-htp",
    per_tensor=("MatMul",),
    float_products=False,
    tables=False,
    smallest_range=1e-4,
)

VITIS_AI: Final = Int8Scheme(
    activation="int8",
    weight="int8",
    per_channel=False,
    saturates=False,
    reason="the NPU rescales by shifts: scales are powers of two, one for each tensor, and zero"
    " is in the middle",
    symmetric=True,
    power_of_two=True,
    tables=False,
)
