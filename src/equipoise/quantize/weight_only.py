"""Weights of products and tables in blocks of 4 or 8 bits, computed in float.

Two forms. ``matmulnbits`` is ONNX Runtime's operator: kernels for it exist on CPUs, CUDA and
WebGPU. ``qdq`` is the standard's DequantizeLinear with blocks, which TensorRT reads, and which
ONNX Runtime fuses into the same kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from equipoise import extras, onnxio
from equipoise.errors import DataError, RecipeError
from equipoise.quantize.blockwise import (
    Algorithm,
    BlockGrid,
    Blocks,
    Gptq,
    HalfQuadratic,
    Nearest,
    gptq,
    half_quadratic,
    round_to_nearest,
)
from equipoise.quantize.layers import Layer, find_layers, read_array
from equipoise.quantize.nodes import FloatNode
from equipoise.quantize.observe import observing
from equipoise.quantize.weights import quantize_weights, read_in_subgraphs
from equipoise.spec import Array, Feeds

MICROSOFT: Final = "com.microsoft"
_BLOCKS_OPSET: Final = 21
"""Blocks and 4-bit types came to DequantizeLinear with this opset, and with IR version 10."""

_BLOCKS_IR: Final = 10
_SMALLEST_BLOCK: Final = 16
_MINIMUM_VALUES: Final = 1024
"""A smaller weight saves less than the names of its new tensors take."""


@dataclass(frozen=True, kw_only=True)
class WeightOnly:
    """Block-wise weight-only quantisation.

    Attributes:
        grid: Bits, block size, symmetric or not.
        algorithm: How codes are chosen; GPTQ needs calibration rows.
        form: ``matmulnbits`` or ``qdq``.
        accuracy_level: What ``matmulnbits`` may compute in: 0 as the input, 1 float32, 2 float16,
            3 bfloat16, 4 int8. ``qdq`` leaves the choice to the runtime; ONNX Runtime takes int8.
        tables: Tables that a Gather reads: on the same ``blocks`` (ONNX Runtime alone), as ``int8``
            rows, which every runtime gathers, or left in ``float``.
    """

    kind: Literal["weight-only-blocks"] = "weight-only-blocks"
    grid: BlockGrid = field(default_factory=BlockGrid)
    algorithm: Algorithm = field(default_factory=Nearest)
    form: Literal["matmulnbits", "qdq"] = "matmulnbits"
    accuracy_level: Literal[0, 1, 2, 3, 4] = 0
    tables: Literal["blocks", "int8", "float"] = "int8"

    def __post_init__(self) -> None:
        if self.form == "qdq" and self.tables == "blocks":
            raise RecipeError(
                "the form 'qdq' has no operator that gathers from blocks",
                hint="Choose tables 'int8' or 'float', or the form 'matmulnbits'.",
            )


@dataclass(frozen=True, kw_only=True)
class BlockedWeight:
    """A weight that became blocks.

    Attributes:
        name: The float initializer that is gone.
        operator: What read it.
        shape: Its shape in the graph.
        sqnr_db: Power of the weight over the power of its error, in dB; None when it is exact.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    sqnr_db: float | None


@dataclass(frozen=True, kw_only=True)
class WeightOnlyRecord:
    """What became of a model.

    Attributes:
        weights: Weights and tables that became blocks, in the order of the graph.
        int8_tables: Number of tables stored as int8 rows.
        kept: Products whose weight stayed in float, with the reason.
        passes: How often the calibration rows were run.
    """

    weights: tuple[BlockedWeight, ...]
    int8_tables: int
    kept: tuple[FloatNode, ...]
    passes: int


def quantize_blocks(
    model: Any,
    scheme: WeightOnly,
    *,
    rows: Iterable[Feeds] = (),
    float_nodes: frozenset[str] = frozenset(),
) -> tuple[Any, WeightOnlyRecord]:
    """Store the weights of the products and tables of ``model`` in blocks.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes; it is changed, and a new one is given
            back where the opset has to be raised.
        scheme: How.
        rows: Calibration inputs for GPTQ, iterated once per pass.
        float_nodes: Names of nodes to leave in float.

    Raises:
        RecipeError: No product or table of the model can be stored so.
        DataError: GPTQ without calibration rows.
        NonFiniteError: A weight, or the activations of a layer, hold NaN or infinity.
        SourceError: The form needs a later opset and the model cannot be raised to it.
    """
    if scheme.form == "qdq":
        model = onnxio.raise_opset(model, _BLOCKS_OPSET)
        model.ir_version = max(model.ir_version, _BLOCKS_IR)
    layers = _products(model, float_nodes)
    kept = tuple(_kept(model, layers, float_nodes))
    chosen, passes = choose_blocks(model, layers, scheme=scheme, rows=rows)
    record = [_told(model, layer, chosen[layer.weight]) for layer in layers]
    for layer in layers:
        _rewrite_product(model, layer, chosen[layer.weight], scheme=scheme)
    if scheme.tables == "blocks":
        record += block_tables(model, scheme)
    int8 = frozenset({"Gather"}) if scheme.tables == "int8" else frozenset()
    tables = quantize_weights(model, operators=int8)
    if not record and not tables:
        raise RecipeError(
            "the model has no product or table whose weights can be stored in blocks",
            hint="Block-wise storage takes MatMul, Gemm and Gather with a constant float matrix.",
        )
    for layer in layers:
        onnxio.remove_initializer(model, layer.weight)
    return model, WeightOnlyRecord(
        weights=tuple(record), int8_tables=tables, kept=kept, passes=passes
    )


def choose_blocks(
    model: Any, layers: Sequence[Layer], *, scheme: WeightOnly, rows: Iterable[Feeds] = ()
) -> tuple[dict[str, Blocks], int]:
    """Quantise the weights of ``layers``; the model stays as it is.

    Returns:
        Name of the weight -> its blocks, and how often ``rows`` were run.

    Raises:
        DataError: GPTQ without calibration rows.
        NonFiniteError: A weight, or the activations of a layer, hold NaN or infinity.
    """
    algorithm = scheme.algorithm
    if not isinstance(algorithm, Gptq):
        return {layer.weight: _without_data(_matrix(model, layer), scheme) for layer in layers}, 0
    chosen, passes = {}, 0
    for group in _groups(layers, limit_bytes=algorithm.hessian_bytes):
        hessians = _hessians(model, group, rows)
        passes += 1
        for layer in group:
            chosen[layer.weight] = gptq(
                _matrix(model, layer),
                hessians[layer.input],
                grid=scheme.grid,
                settings=algorithm,
            )
    return chosen, passes


def _without_data(matrix: Array, scheme: WeightOnly) -> Blocks:
    if isinstance(scheme.algorithm, HalfQuadratic):
        return half_quadratic(matrix, scheme.grid, settings=scheme.algorithm)
    nearest = scheme.algorithm if isinstance(scheme.algorithm, Nearest) else Nearest()
    return round_to_nearest(matrix, scheme.grid, settings=nearest)


def _matrix(model: Any, layer: Layer) -> Array:
    """The weight of a product as ``[outputs, inputs]``."""
    matrix: Array = layer.rows(read_array(model, layer.weight))[0]
    return matrix


def _groups(layers: Sequence[Layer], *, limit_bytes: int) -> Iterator[list[Layer]]:
    """Layers whose Hessians fit into memory together; layers that share an input share one."""
    group: list[Layer] = []
    held: dict[str, int] = {}
    for layer in sorted(layers, key=lambda one: [x.input for x in layers].index(one.input)):
        size = 8 * _inputs(layer) ** 2
        if group and layer.input not in held and sum(held.values()) + size > limit_bytes:
            yield group
            group, held = [], {}
        group.append(layer)
        held[layer.input] = size
    if group:
        yield group


def _inputs(layer: Layer) -> int:
    return math.prod(layer.shape) // layer.channels


def _hessians(model: Any, group: Sequence[Layer], rows: Iterable[Feeds]) -> dict[str, Array]:
    """Input of a layer -> sum of ``x x^T`` over all its positions in all rows, float64."""
    by_input = {layer.input: layer for layer in group}
    sums = {name: np.zeros((_inputs(layer),) * 2) for name, layer in by_input.items()}
    seen = 0
    with observing(model, by_input) as observe:
        for feeds in rows:
            seen += 1
            for name, activation in observe(feeds).items():
                (patches,) = by_input[name].patches(activation)
                sums[name] += patches.T @ patches
    if not seen:
        raise DataError(
            "GPTQ needs calibration rows; there are none",
            hint="Give calibration data, or choose the algorithm 'rtn' or 'hqq'.",
        )
    return sums


def _products(model: Any, float_nodes: frozenset[str]) -> tuple[Layer, ...]:
    elsewhere = read_in_subgraphs(model)
    return tuple(
        layer
        for layer in find_layers(model)
        if layer.operator != "Conv"
        and layer.name not in float_nodes
        and layer.weight not in elsewhere
        and math.prod(layer.shape) >= _MINIMUM_VALUES
        and _inputs(layer) >= _SMALLEST_BLOCK
    )


def _kept(model: Any, layers: Sequence[Layer], float_nodes: frozenset[str]) -> Iterator[FloatNode]:
    """Products with a constant weight that is not among ``layers``, and why."""
    constants, elsewhere = onnxio.initializers(model), read_in_subgraphs(model)
    taken = {layer.name for layer in layers}
    for node in model.graph.node:
        tensor = constants.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type not in {"MatMul", "Gemm"} or tensor is None or node.name in taken:
            continue
        reason = _misfit(tensor)
        if tensor.name in elsewhere:
            reason = "a subgraph reads its weight too"
        if node.name in float_nodes:
            reason = "it was asked to stay"
        yield FloatNode(name=node.name, operator=node.op_type, reason=reason)


def _misfit(tensor: Any) -> str:
    if math.prod(tensor.dims) < _MINIMUM_VALUES or min(tensor.dims) < _SMALLEST_BLOCK:
        return f"its weight of shape {list(tensor.dims)} is too small for blocks"
    if len(tensor.dims) != 2:
        return f"its weight of shape {list(tensor.dims)} is no matrix"
    return "its weight has other readers, or is scaled, transposed or not float32"


def _told(model: Any, layer: Layer, blocks: Blocks) -> BlockedWeight:
    return BlockedWeight(
        name=layer.weight,
        operator=layer.operator,
        shape=layer.shape,
        sqnr_db=_weight_sqnr(_matrix(model, layer), blocks),
    )


def _weight_sqnr(matrix: Array, blocks: Blocks) -> float | None:
    noise = float(np.square(matrix - blocks.weight(), dtype=np.float64).sum())
    signal = float(np.square(matrix, dtype=np.float64).sum())
    return 10 * math.log10(signal / noise) if noise and signal else None


def _rewrite_product(model: Any, layer: Layer, blocks: Blocks, *, scheme: WeightOnly) -> None:
    if scheme.form == "qdq":
        _dequantize_blocks(model, layer, blocks)
    else:
        _use_matmulnbits(model, layer, blocks, accuracy_level=scheme.accuracy_level)


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
            K=_inputs(layer),
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
        tensors[f"{name}.zeros"] = _packed(blocks.zeros, blocks.grid.bits)
    to_tensor = extras.require("onnx").numpy_helper.from_array
    model.graph.initializer.extend(to_tensor(array, key) for key, array in tensors.items())
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(extras.require("onnx").helper.make_opsetid(MICROSOFT, 1))
    return list(tensors)


def _kernel_width(blocks: Blocks) -> int:
    """Block size for ONNX Runtime's operators, which take powers of two alone."""
    return max(_SMALLEST_BLOCK, 1 << (blocks.width - 1).bit_length())


def _padded_codes(blocks: Blocks) -> Array:
    """Codes as MatMulNBits reads them: uint8 ``[outputs, blocks, block size * bits / 8]``."""
    outputs, inputs = blocks.codes.shape
    count = blocks.scales.shape[1]
    padded = np.pad(blocks.codes, ((0, 0), (0, count * _kernel_width(blocks) - inputs)))
    return _packed(padded, blocks.grid.bits).reshape(outputs, count, -1)


def _packed(codes: Array, bits: int) -> Array:
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
    flat = oriented if grid.bits == 8 else _packed(oriented.ravel(), grid.bits)
    return onnx.TensorProto(
        name=name,
        data_type=onnx.TensorProto.DataType.Value(kind),
        dims=oriented.shape,
        raw_data=flat.tobytes(),
    )


def block_tables(model: Any, scheme: WeightOnly) -> list[BlockedWeight]:
    """Store the tables of ``model`` in blocks of the grid of ``scheme``, in place.

    A Gather of rows becomes GatherBlockQuantized of ONNX Runtime, which makes floats of the rows
    that it picks alone.
    """
    told = []
    for name, gathers in list(_tables(model, scheme.grid)):
        table = read_array(model, name)
        blocks = _without_data(table, scheme)
        packed = _add_packed(model, name, blocks, codes=_packed(blocks.codes, scheme.grid.bits))
        for gather in gathers:
            _replace(model, gather, [_gather_blocks(gather, packed, blocks)])
        onnxio.remove_initializer(model, name)
        sqnr = _weight_sqnr(table, blocks)
        told.append(BlockedWeight(name=name, operator="Gather", shape=table.shape, sqnr_db=sqnr))
    return told


def has_tables(model: Any) -> bool:
    """Whether :func:`block_tables` with the default grid finds anything in ``model``."""
    return next(_tables(model, BlockGrid()), None) is not None


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


def _tables(model: Any, grid: BlockGrid) -> Iterator[tuple[str, list[Any]]]:
    """Float matrices that nothing but Gathers of rows read, with those Gathers."""
    constants = onnxio.initializers(model)
    elsewhere = read_in_subgraphs(model) | {value.name for value in model.graph.output}
    float32 = extras.require("onnx").TensorProto.FLOAT
    for name, readers in onnxio.consumers(model).items():
        tensor = constants.get(name)
        if tensor is None or tensor.data_type != float32 or len(tensor.dims) != 2:
            continue
        rows, columns = tensor.dims
        fits = columns >= _SMALLEST_BLOCK and columns * grid.bits % 8 == 0
        if not fits or rows * columns < _MINIMUM_VALUES or name in elsewhere:
            continue
        if all(_gathers_rows(node, name) for node in readers):
            yield name, readers


def _gathers_rows(node: Any, table: str) -> bool:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == table and axis in {0, -2}


def _replace(model: Any, node: Any, nodes: list[Any]) -> None:
    position = next(i for i, other in enumerate(model.graph.node) if other is node or other == node)
    del model.graph.node[position]
    for offset, new in enumerate(nodes):
        model.graph.node.insert(position + offset, new)
