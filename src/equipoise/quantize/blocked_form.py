"""How a graph holds weights in blocks: by ONNX Runtime's operators, or by the standard's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np

from equipoise import extras
from equipoise.quantize.blockwise import BlockGrid, Blocks
from equipoise.quantize.layers import Layer
from equipoise.spec import Array

MICROSOFT: Final = "com.microsoft"
SMALLEST_BLOCK: Final = 16

Form = Literal["matmulnbits", "qdq"]


def rewrite_product(
    model: Any, layer: Layer, blocks: Blocks, *, form: Form, accuracy_level: int
) -> None:
    """Let the product of ``layer`` read ``blocks``, in place; its float weight is left over."""
    if form == "qdq":
        _dequantize_blocks(model, layer, blocks)
    else:
        _use_matmulnbits(model, layer, blocks, accuracy_level=accuracy_level)


def _use_matmulnbits(model: Any, layer: Layer, blocks: Blocks, *, accuracy_level: int) -> None:
    """Replace the product by MatMulNBits, and by an Add where a Gemm has something to add."""
    helper = extras.require("onnx").helper
    node = layer.node
    added = layer.operator == "Gemm" and len(node.input) > 2 and node.input[2]
    product = f"{node.output[0]}.product" if added else node.output[0]
    packed = _add_packed(model, layer.weight, blocks, codes=_padded_codes(blocks))
    nodes = [
        helper.make_node(
            "MatMulNBits",
            [layer.input, *packed],
            [product],
            name=node.name,
            domain=MICROSOFT,
            K=layer.inputs,
            N=layer.channels,
            bits=blocks.grid.bits,
            block_size=_kernel_width(blocks),
            accuracy_level=accuracy_level,
        )
    ]
    if added:
        names = [product, node.input[2]]
        nodes.append(helper.make_node("Add", names, [node.output[0]], name=f"{node.name}.bias"))
    _replace(model, node, nodes)


def _add_packed(model: Any, name: str, blocks: Blocks, *, codes: Array) -> list[str]:
    """Add codes, scales and zero points as ONNX Runtime's operators read them; their names."""
    tensors = {f"{name}.codes": codes, f"{name}.scales": blocks.scales}
    if not blocks.grid.symmetric:
        tensors[f"{name}.zeros"] = pack(blocks.zeros, blocks.grid.bits)
    to_tensor = extras.require("onnx").numpy_helper.from_array
    model.graph.initializer.extend(to_tensor(array, key) for key, array in tensors.items())
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(extras.require("onnx").helper.make_opsetid(MICROSOFT, 1))
    return list(tensors)


def _kernel_width(blocks: Blocks) -> int:
    """Block size for ONNX Runtime's operators, which take powers of two alone."""
    return max(SMALLEST_BLOCK, 1 << (blocks.width - 1).bit_length())


def _padded_codes(blocks: Blocks) -> Array:
    """Codes as MatMulNBits reads them: uint8 ``[outputs, blocks, block size * bits / 8]``."""
    outputs, inputs = blocks.codes.shape
    count = blocks.scales.shape[1]
    padded = np.pad(blocks.codes, ((0, 0), (0, count * _kernel_width(blocks) - inputs)))
    return pack(padded, blocks.grid.bits).reshape(outputs, count, -1)


def pack(codes: Array, bits: int) -> Array:
    """Two codes of 4 bits per byte along the last axis, the first in the low half."""
    if bits == 8:
        return codes
    even = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    packed: Array = even[..., ::2] | (even[..., 1::2] << 4)
    return packed


def _dequantize_blocks(model: Any, layer: Layer, blocks: Blocks) -> None:
    """Put a DequantizeLinear in the place of the weight; the product itself stays."""
    tensors = [
        _standard_tensor(f"{layer.weight}.codes", blocks.codes, layer, blocks.grid),
        _float_tensor(f"{layer.weight}.scales", blocks.scales, layer),
    ]
    # Optional by the standard, but ONNX Runtime's exact mode fails on int8 without it.
    if not blocks.grid.symmetric or blocks.grid.bits == 8:
        tensors.append(_standard_tensor(f"{layer.weight}.zeros", blocks.zeros, layer, blocks.grid))
    whole = blocks.scales.shape[1] == 1
    if whole:  # one scale per output is the older, per-axis form, which more runtimes read
        for tensor in tensors[1:]:
            del tensor.dims[1 - layer.channel_axis]
    model.graph.initializer.extend(tensors)
    attributes = {"axis": layer.channel_axis} if whole else {
        "axis": 1 - layer.channel_axis, "block_size": blocks.width,
    }  # fmt: skip
    node = extras.require("onnx").helper.make_node(
        "DequantizeLinear",
        [tensor.name for tensor in tensors],
        [layer.weight],
        name=f"{layer.weight}.dequantize",
        **attributes,
    )
    model.graph.node.insert(0, node)


def _oriented(array: Array, layer: Layer) -> Array:
    """``[outputs, inputs or blocks]`` in the order in which the graph stores the weight."""
    return np.ascontiguousarray(array if layer.channel_axis == 0 else array.T)


def _float_tensor(name: str, array: Array, layer: Layer) -> Any:
    return extras.require("onnx").numpy_helper.from_array(_oriented(array, layer), name)


def _standard_tensor(name: str, codes: Array, layer: Layer, grid: BlockGrid) -> Any:
    """Codes as a tensor of the standard's own type: INT4, UINT4, INT8 or UINT8."""
    onnx = extras.require("onnx")
    kind = f"{'INT' if grid.symmetric else 'UINT'}{grid.bits}"
    values = codes - np.uint8(grid.middle) if grid.symmetric else codes
    oriented = _oriented(values & np.uint8(grid.levels), layer)
    flat = oriented if grid.bits == 8 else pack(oriented.ravel(), grid.bits)
    return onnx.TensorProto(
        name=name,
        data_type=onnx.TensorProto.DataType.Value(kind),
        dims=oriented.shape,
        raw_data=flat.tobytes(),
    )


def rewrite_gathers(model: Any, name: str, blocks: Blocks, *, gathers: Sequence[Any]) -> None:
    """Let ``gathers`` of rows of the table ``name`` read ``blocks``, in place.

    GatherBlockQuantized makes floats of the rows that it picks alone.
    """
    packed = _add_packed(model, name, blocks, codes=pack(blocks.codes, blocks.grid.bits))
    for gather in gathers:
        _replace(model, gather, [_gather_blocks(gather, packed, blocks)])


def _gather_blocks(gather: Any, packed: list[str], blocks: Blocks) -> Any:
    codes, *rest = packed
    return extras.require("onnx").helper.make_node(
        "GatherBlockQuantized",
        [codes, gather.input[1], *rest],
        list(gather.output),
        name=gather.name,
        domain=MICROSOFT,
        bits=blocks.grid.bits,
        block_size=_kernel_width(blocks),
        gather_axis=0,
        quantize_axis=1,
    )


def _replace(model: Any, node: Any, nodes: list[Any]) -> None:
    position = next(i for i, other in enumerate(model.graph.node) if other is node or other == node)
    del model.graph.node[position]
    for offset, new in enumerate(nodes):
        model.graph.node.insert(position + offset, new)
