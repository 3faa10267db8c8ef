"""The layers of a graph that have weights: convolutions and products, seen in one way.

Whatever the operator, the weights of a layer are ``[groups, outputs, inputs]`` here: each of the
``groups * outputs`` channels is the dot product of its row with a patch of the input, and
:meth:`Layer.patches` cuts an activation into such patches. So an algorithm over weights is written
once for convolutions of any kind, MatMul and Gemm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise import extras, onnxio
from equipoise.quantize.weights import read_in_subgraphs
from equipoise.spec import Array

LAYERS: Final = frozenset({"Conv", "Gemm", "MatMul"})
"""Operators that have a weight of this form."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A node with a constant weight.

    Attributes:
        node: The ``NodeProto``.
        weight: Name of the weight's initializer.
        shape: Shape of the weight as the graph stores it.
        bias: Name of the initializer that is added per channel, by the node itself or by the one
            Add that alone reads its output; empty when there is none.
        result: Name of the tensor after the bias.
    """

    node: Any
    weight: str
    shape: tuple[int, ...]
    bias: str
    result: str

    @property
    def name(self) -> str:
        """Name of the node."""
        return str(self.node.name)

    @property
    def operator(self) -> str:
        """Type of the node."""
        return str(self.node.op_type)

    @property
    def input(self) -> str:
        """Name of the activation that the layer reads."""
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        """Name of the tensor that the node itself writes."""
        return str(self.node.output[0])

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 of a product."""
        return int(onnxio.attribute(self.node, "group", 1)) if self.operator == "Conv" else 1

    @property
    def channel_axis(self) -> int:
        """Axis of the stored weight that counts output channels."""
        if self.operator == "Conv":
            return 0
        if self.operator == "Gemm" and onnxio.attribute(self.node, "transB", 0):
            return 0
        return 1

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.channel_axis]

    @property
    def inputs(self) -> int:
        """Number of weights of each output channel."""
        return math.prod(self.shape) // self.channels

    def rows(self, stored: Array) -> Array:
        """A stored weight as ``[groups, outputs, inputs]``."""
        matrix = np.moveaxis(stored, self.channel_axis, 0)
        return np.ascontiguousarray(matrix).reshape(self.groups, self.channels // self.groups, -1)

    def stored(self, rows: Array) -> Array:
        """``[groups, outputs, inputs]`` in the form that the graph stores."""
        moved = (self.channels, *np.delete(self.shape, self.channel_axis).tolist())
        return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, self.channel_axis))

    def patches(self, activation: Array, *, most: int | None = None) -> Array:
        """What each output position of the layer reads.

        Args:
            activation: An input of the layer: ``[batch, channels, *space]`` of a convolution,
                ``[..., inputs]`` of a product.
            most: Take so many positions at most, spread evenly; all when None.

        Returns:
            float array ``[groups, positions, inputs]``, positions in the order of the output.
        """
        if self.operator == "Conv":
            return _convolution_patches(self, activation, most=most)
        flat = activation.reshape(1, -1, activation.shape[-1])
        return flat[:, _spread(flat.shape[1], most)]

    def flat_output(self, activation: Array) -> Array:
        """An output of the layer as ``[positions, channels]``, in the order of the patches."""
        axis = 1 if self.operator == "Conv" else -1
        return np.moveaxis(activation, axis, -1).reshape(-1, self.channels)


def find_layers(model: Any) -> tuple[Layer, ...]:
    """Layers of the main graph whose weight nobody else reads, in the order of the graph.

    Args:
        model: ``onnx.ModelProto`` with named nodes.
    """
    constants = onnxio.initializers(model)
    readers = onnxio.consumers(model)
    given_out = {value.name for value in model.graph.output} | read_in_subgraphs(model)
    found = []
    for node in model.graph.node:
        tensor = _weight(node, constants)
        if tensor is None or len(readers[tensor.name]) > 1 or tensor.name in given_out:
            continue
        bias, result = _bias(node, constants, readers, given_out)
        found.append(
            Layer(
                node=node,
                weight=tensor.name,
                shape=tuple(tensor.dims),
                bias=bias,
                result=result,
            )
        )
    return tuple(found)


def read_array(model: Any, name: str) -> Array:
    """The values of an initializer."""
    array: Array = extras.require("onnx").numpy_helper.to_array(onnxio.initializers(model)[name])
    return array


def write_array(model: Any, name: str, array: Array) -> None:
    """Give an initializer other values, or add one."""
    tensor = extras.require("onnx").numpy_helper.from_array(array, name)
    present = onnxio.initializers(model).get(name)
    if present is None:
        model.graph.initializer.append(tensor)
    else:
        present.CopyFrom(tensor)


def _weight(node: Any, constants: dict[str, Any]) -> Any:
    if node.op_type not in LAYERS or len(node.input) < 2 or node.domain not in {"", "ai.onnx"}:
        return None
    tensor = constants.get(node.input[1])
    if tensor is None or tensor.data_type != extras.require("onnx").TensorProto.FLOAT:
        return None
    if node.op_type != "Conv" and len(tensor.dims) != 2:
        return None
    return None if node.op_type == "Gemm" and not _plain(node) else tensor


def _plain(gemm: Any) -> bool:
    """Whether a Gemm is a product and a sum, no more."""
    return not onnxio.attribute(gemm, "transA", 0) and all(
        onnxio.attribute(gemm, name, 1.0) == 1.0 for name in ("alpha", "beta")
    )


def _bias(
    node: Any, constants: dict[str, Any], readers: dict[str, list[Any]], given_out: set[str]
) -> tuple[str, str]:
    output = node.output[0]
    if len(node.input) > 2 and node.input[2]:
        return (node.input[2] if _is_row(constants.get(node.input[2])) else ""), output
    after = readers.get(output, [])
    if node.op_type != "MatMul" or len(after) != 1 or output in given_out:
        return "", output
    others = [name for name in after[0].input if name != output]
    if after[0].op_type != "Add" or len(others) != 1 or others[0] not in constants:
        return "", output
    return (others[0], after[0].output[0]) if len(constants[others[0]].dims) == 1 else ("", output)


def _is_row(tensor: Any) -> bool:
    """Whether a bias is one number per channel, or for all; a Gemm may add a matrix."""
    return tensor is not None and all(size == 1 for size in tensor.dims[:-1])


def _spread(count: int, most: int | None) -> slice:
    """Evenly spaced indices, ``most`` of them at most.

    The step shares no factor with the count, or it would visit a few columns of an image alone.
    """
    least = 1 if most is None else max(1, -(-count // most))
    return slice(None, None, next(s for s in itertools.count(least) if math.gcd(s, count) == 1))


def _convolution_patches(layer: Layer, activation: Array, *, most: int | None) -> Array:
    """``[groups, positions, inputs]``; positions are picked before any value is copied."""
    windows = _windows(layer.node, activation, layer.shape[2:])
    rank = len(layer.shape) - 2
    batch, channels = windows.shape[:2]
    counted = np.arange(batch * int(np.prod(windows.shape[2 : 2 + rank])))
    chosen = counted[_spread(len(counted), most)]
    image, *place = np.unravel_index(chosen, (batch, *windows.shape[2 : 2 + rank]))
    picked: Array = np.moveaxis(windows, 1, 1 + rank)[(image, *place)]
    inputs = channels // layer.groups * int(np.prod(layer.shape[2:]))
    return picked.reshape(len(chosen), layer.groups, inputs).swapaxes(0, 1)


def _windows(node: Any, activation: Array, kernel: tuple[int, ...]) -> Array:
    """A view ``[batch, channels, *positions, *kernel]`` of the padded activation."""
    strides = onnxio.attribute(node, "strides", [1] * len(kernel))
    dilations = onnxio.attribute(node, "dilations", [1] * len(kernel))
    pads = _pads(node, activation.shape[2:], kernel, strides, dilations)
    padded = np.pad(activation, [(0, 0), (0, 0), *pads]) if np.any(pads) else activation
    spans = [dilation * (size - 1) + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, 2 + len(kernel)))
    windows: Array = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=axes)
    steps = tuple(slice(None, None, step) for step in strides)
    inner = tuple(slice(None, None, step) for step in dilations)
    return windows[(slice(None), slice(None), *steps, *inner)]


def _pads(
    node: Any, space: tuple[int, ...], kernel: tuple[int, ...], strides: Any, dilations: Any
) -> list[tuple[int, int]]:
    automatic = onnxio.attribute(node, "auto_pad", b"NOTSET")
    if automatic in {b"SAME_UPPER", b"SAME_LOWER"}:
        return list(_same(space, kernel, strides, dilations, upper=automatic == b"SAME_UPPER"))
    rank = len(kernel)
    pads = (
        [0] * (2 * rank)
        if automatic == b"VALID"
        else onnxio.attribute(node, "pads", [0] * 2 * rank)
    )
    return list(zip(pads[:rank], pads[rank:], strict=True))


def _same(
    space: tuple[int, ...], kernel: tuple[int, ...], strides: Any, dilations: Any, *, upper: bool
) -> Iterator[tuple[int, int]]:
    for size, width, stride, dilation in zip(space, kernel, strides, dilations, strict=True):
        needed = max((-(-size // stride) - 1) * stride + dilation * (width - 1) + 1 - size, 0)
        less, more = needed // 2, needed - needed // 2
        yield (less, more) if upper else (more, less)
