"""Static int8: Q/DQ pairs with calibrated ranges.

Ranges and placement are ours; writing the Q/DQ nodes is ONNX Runtime's ``QDQQuantizer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.quantize.calibrate import TensorRange
from equipoise.quantize.schemes import StaticInt8

_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


def quantize_static(
    model: Any,
    ranges: Mapping[str, TensorRange],
    *,
    scheme: StaticInt8,
    activation: str,
    float_nodes: tuple[str, ...],
) -> Any:
    """Put Q/DQ pairs around the nodes of ``model``.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes and inferred shapes.
        ranges: Tensor name -> calibrated range.
        scheme: Weights per channel or not, with reduced range or not.
        activation: ``uint8`` or ``int8``.
        float_nodes: Names of nodes to leave in float.
    """
    quantization = extras.require("onnxruntime.quantization")
    qdq: Any = extras.require("onnxruntime.quantization.qdq_quantizer")
    registry: Any = extras.require("onnxruntime.quantization.registry")
    types = {"uint8": quantization.QuantType.QUInt8, "int8": quantization.QuantType.QInt8}
    quantizer = qdq.QDQQuantizer(
        model,
        scheme.per_channel,
        scheme.reduce_range,
        quantization.QuantType.QInt8,
        types[activation],
        _tensors_data(ranges),
        [],
        list(float_nodes),
        sorted({*registry.QLinearOpsRegistry, *registry.QDQRegistry}),
        {"ActivationSymmetric": False, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    return quantizer.model.model


def _tensors_data(ranges: Mapping[str, TensorRange]) -> Any:
    """Our ranges in the form that ``QDQQuantizer`` reads."""
    calibrate: Any = extras.require("onnxruntime.quantization.calibrate")
    data = {name: _bounds(tensor) for name, tensor in ranges.items()}
    return calibrate.TensorsData(calibrate.CalibrationMethod.MinMax, data)


def _bounds(tensor: TensorRange) -> tuple[Any, Any]:
    low, high = (float(np.clip(v, -_FLOAT32_MAX, _FLOAT32_MAX)) for v in (tensor.low, tensor.high))
    return np.float32(low), np.float32(high)
