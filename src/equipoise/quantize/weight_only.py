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
from equipoise.quantize.blocked_form import (
    SMALLEST_BLOCK,
    Form,
    rewrite_gathers,
    rewrite_product,
)
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

_BLOCKS_OPSET: Final = 21
"""Blocks and 4-bit types came to DequantizeLinear with this opset, and with IR version 10."""

_BLOCKS_IR: Final = 10
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
    form: Form = "matmulnbits"
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
        rewrite_product(
            model,
            layer,
            chosen[layer.weight],
            form=scheme.form,
            accuracy_level=scheme.accuracy_level,
        )
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
        size = 8 * layer.inputs**2
        if group and layer.input not in held and sum(held.values()) + size > limit_bytes:
            yield group
            group, held = [], {}
        group.append(layer)
        held[layer.input] = size
    if group:
        yield group


def _hessians(model: Any, group: Sequence[Layer], rows: Iterable[Feeds]) -> dict[str, Array]:
    """Input of a layer -> sum of ``x x^T`` over all its positions in all rows, float64."""
    by_input = {layer.input: layer for layer in group}
    sums = {name: np.zeros((layer.inputs,) * 2) for name, layer in by_input.items()}
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
        and layer.inputs >= SMALLEST_BLOCK
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
    if math.prod(tensor.dims) < _MINIMUM_VALUES or min(tensor.dims) < SMALLEST_BLOCK:
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


def block_tables(model: Any, scheme: WeightOnly) -> list[BlockedWeight]:
    """Store the tables of ``model`` in blocks of the grid of ``scheme``, in place.

    A Gather of rows becomes GatherBlockQuantized of ONNX Runtime, which makes floats of the rows
    that it picks alone.
    """
    told = []
    for name, gathers in list(_tables(model, scheme.grid)):
        table = read_array(model, name)
        blocks = _without_data(table, scheme)
        rewrite_gathers(model, name, blocks, gathers=gathers)
        onnxio.remove_initializer(model, name)
        sqnr = _weight_sqnr(table, blocks)
        told.append(BlockedWeight(name=name, operator="Gather", shape=table.shape, sqnr_db=sqnr))
    return told


def has_tables(model: Any) -> bool:
    """Whether :func:`block_tables` with the default grid finds anything in ``model``."""
    return next(_tables(model, BlockGrid()), None) is not None


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
        fits = columns >= SMALLEST_BLOCK and columns * grid.bits % 8 == 0
        if not fits or rows * columns < _MINIMUM_VALUES or name in elsewhere:
            continue
        if all(_gathers_rows(node, name) for node in readers):
            yield name, readers


def _gathers_rows(node: Any, table: str) -> bool:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == table and axis in {0, -2}
