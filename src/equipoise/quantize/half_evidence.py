"""What half precision would do to the tensors and sums of a float model, measured on real samples.

A tensor is judged by its range and by what rounding leaves of its signal. A node that sums many
terms is judged by summing real terms in half precision, one after the other: the worst order, and
the only one that no runtime can undercut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import numpy as np

from equipoise import extras, onnxio
from equipoise.quantize.layers import Layer, find_layers, read_array
from equipoise.quantize.observe import observing
from equipoise.spec import Array, Feeds

HalfName = Literal["float16", "bfloat16"]

_VALUES_ROUNDED: Final = 65_536
"""Values of a tensor and sample whose rounding is measured, evenly spread; ranges are exact."""

_SUMS_TRIED: Final = 64
_TENSORS_AT_ONCE: Final = 128


@dataclass(frozen=True, kw_only=True)
class HalfType:
    """A half-precision type.

    Attributes:
        name: ``float16`` or ``bfloat16``.
        element: Its number in ``TensorProto.DataType``.
        dtype: Its NumPy dtype.
        largest: Its largest finite value.
    """

    name: HalfName
    element: int
    dtype: Any
    largest: float

    def rounded(self, values: Array) -> Array:
        """``values`` in this type and back in float32; infinite beyond its range."""
        with np.errstate(over="ignore", invalid="ignore"):
            nearest: Array = values.astype(self.dtype).astype(np.float32)
        return nearest


def half_type(name: HalfName) -> HalfType:
    """The type called ``name``."""
    types: Any = extras.require("ml_dtypes")
    element = int(extras.require("onnx").TensorProto.DataType.Value(name.upper()))
    dtype = np.dtype(getattr(types, name) if name == "bfloat16" else name)
    largest = float(types.finfo(dtype).max)
    return HalfType(name=name, element=element, dtype=dtype, largest=largest)


class Fidelity:
    """Largest magnitude of some values, and the power of signal and error, so far."""

    def __init__(self) -> None:
        self.largest, self.overflowed = 0.0, False
        self._signal = self._noise = 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal over error in dB; infinite when there is no error."""
        if self._noise == 0.0:
            return math.inf
        return 10 * math.log10(max(self._signal, np.finfo(float).tiny) / self._noise)

    def add(self, exact: Array, rounded: Array) -> None:
        """Add values and what became of them; those that are not finite before do not count."""
        held = np.isfinite(exact) & np.isfinite(rounded)
        self.overflowed |= bool((np.isfinite(exact) & ~np.isfinite(rounded)).any())
        wanted, got = exact[held].astype(np.float64), rounded[held].astype(np.float64)
        self._signal += float(np.square(wanted).sum())
        self._noise += float(np.square(wanted - got).sum())

    def store(self, values: Array, half: HalfType) -> None:
        """Add a tensor as it would be stored in half precision."""
        flat = values.ravel()
        finite = flat[np.isfinite(flat)]
        if finite.size:
            self.largest = max(self.largest, float(np.abs(finite).max()))
        spread = finite[:: 1 + finite.size // _VALUES_ROUNDED]
        self.add(spread, half.rounded(spread))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured.

    Attributes:
        tensors: Name of a float tensor -> it in half precision.
        sums: Name of a node -> the sums inside it in half precision.
        terms: Name of a node -> terms of its longest sum.
    """

    tensors: dict[str, Fidelity]
    sums: dict[str, Fidelity]
    terms: dict[str, int]


def gather_evidence(
    model: Any, names: Iterable[str], *, rows: Iterable[Feeds], half: HalfType, products: bool
) -> Evidence:
    """Run ``model`` on ``rows`` and measure.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes.
        names: Float inputs, intermediate values and outputs to measure.
        rows: Calibration inputs, iterated once for every 128 names.
        half: The type.
        products: Whether products with constant weights sum in half precision too.
    """
    evidence = Evidence(tensors={}, sums={}, terms={})
    for name, tensor in onnxio.initializers(model).items():
        if tensor.data_type == extras.require("onnx").TensorProto.FLOAT:
            evidence.tensors.setdefault(name, Fidelity()).store(read_array(model, name), half)
    summers = _summers(model, products=products)
    wanted = list(dict.fromkeys(names))
    for start in range(0, len(wanted), _TENSORS_AT_ONCE):
        group = wanted[start : start + _TENSORS_AT_ONCE]
        with observing(model, group) as observe:
            for feeds in rows:
                for name, array in observe(feeds).items():
                    evidence.tensors.setdefault(name, Fidelity()).store(array, half)
                    for node, terms_of in summers.get(name, []):
                        for terms in terms_of(array):
                            _add_sum(evidence, node, terms, half)
    return evidence


_Terms = Callable[[Array], Iterable[Array]]


def _summers(model: Any, *, products: bool) -> dict[str, list[tuple[str, _Terms]]]:
    """Tensor -> name of each node that sums it, with the function that gives the terms."""
    constants = onnxio.initializers(model)
    found: dict[str, list[tuple[str, _Terms]]] = {}
    for node in model.graph.node:
        if node.op_type in _SUMMING and node.input:
            terms = partial(_sums, node, constants)
            found.setdefault(node.input[0], []).append((node.name, terms))
    for layer in find_layers(model) if products else ():
        weights = layer.rows(read_array(model, layer.weight))
        found.setdefault(layer.input, []).append((layer.name, partial(_products, layer, weights)))
    return found


def _add_sum(evidence: Evidence, node: str, terms: Array, half: HalfType) -> None:
    """Add sums over the last axis of ``terms``, done in half precision one term after the other."""
    rows = terms.reshape(-1, terms.shape[-1])
    rows = rows[:: 1 + len(rows) // _SUMS_TRIED]
    if not rows.size:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        running = np.add.accumulate(rows.astype(half.dtype), axis=-1)[:, -1].astype(np.float32)
    exact = rows.sum(axis=-1, dtype=np.float64)
    evidence.sums.setdefault(node, Fidelity()).add(exact, running)
    evidence.terms[node] = max(evidence.terms.get(node, 0), rows.shape[-1])


def _products(layer: Layer, weights: Array, activation: Array) -> Iterator[Array]:
    """Terms of some sums of a layer: ``[positions, outputs, inputs]``."""
    side = math.isqrt(_SUMS_TRIED)
    patches = layer.patches(activation)[0]
    some = patches[:: 1 + len(patches) // side]
    yield some[:, None] * weights[0, :: 1 + len(weights[0]) // side][None]


_PLAIN_SUMS: Final = frozenset({"ReduceSum", "ReduceMean", "ReduceL1"})
_SQUARE_SUMS: Final = frozenset({"ReduceSumSquare", "ReduceL2", "LpNormalization"})
_CENTRED: Final = frozenset(
    {
        "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization",
        "InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization",
    }
)  # fmt: skip
_EXPONENTIAL_SUMS: Final = frozenset({"Softmax", "LogSoftmax", "ReduceLogSumExp"})
_SPATIAL: Final = frozenset({"GlobalAveragePool", "InstanceNormalization", "GroupNormalization"})
_SUMMING: Final = (
    _PLAIN_SUMS | _SQUARE_SUMS | _CENTRED | _EXPONENTIAL_SUMS | frozenset({"GlobalAveragePool"})
)


def _sums(node: Any, constants: Mapping[str, Any], array: Array) -> Iterator[Array]:
    """Terms of the sums that ``node`` takes over its first input; each sum along the last axis."""
    rows = _last(array, _axes(node, constants, array.ndim))
    operator = node.op_type
    if operator in _SQUARE_SUMS or "RMS" in operator or "Simplified" in operator:
        yield np.square(rows)
    elif operator in _CENTRED:
        yield rows
        yield np.square(rows - rows.mean(axis=-1, keepdims=True))
    elif operator in _EXPONENTIAL_SUMS:
        with np.errstate(invalid="ignore"):
            yield np.exp(rows - rows.max(axis=-1, keepdims=True))
    else:
        yield rows


def _last(array: Array, axes: Iterable[int]) -> Array:
    """``array`` with ``axes`` joined into the last one."""
    summed = sorted({axis % array.ndim for axis in axes})
    kept = array.ndim - len(summed)
    moved = np.moveaxis(array, summed, range(kept, array.ndim))
    rows: Array = moved.reshape(*moved.shape[:kept], math.prod(moved.shape[kept:]))
    return rows.astype(np.float32, copy=False)


def _axes(node: Any, constants: Mapping[str, Any], rank: int) -> Iterable[int]:
    """Axes that a node sums over: by its attributes, or by a constant input from opset 18 on."""
    onnx = extras.require("onnx")
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in _SPATIAL:
        return range(min(2, rank - 1), rank)
    if node.op_type in _CENTRED:
        return range(int(given.get("axis", -1)) % rank, rank)
    if node.op_type.startswith("Reduce"):
        if len(node.input) > 1 and node.input[1] in constants:
            axes: list[int] = onnx.numpy_helper.to_array(constants[node.input[1]]).ravel().tolist()
            return axes or range(rank)
        return [int(axis) for axis in given.get("axes", range(rank))]
    return [int(given.get("axis", -1))]
