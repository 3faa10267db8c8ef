"""Numbers in a model that no computation can come out of: onnx.checker and runtimes take them all.

What is refused:

- NaN anywhere: in a weight, a constant or an attribute.
- Infinity in what a product, a convolution, a recurrence or a normalisation reads: as it is,
  through nodes that only move or convert it, or made by a conversion to a type that ends below it.
- A scale of quantisation that is infinite, zero, negative, or too small for a normal number of its
  type, since devices take those for zero. The scales of types of four bits and less may be zero or
  negative: quantisers of language models write such, and nobody divides by them.
- A zero point that has another shape than its scale or another type than the integers, or that is
  not zero where the operator's definition wants zero.

Infinity anywhere else is let through: attention masks are added or chosen, bounds of Clip may be
open, and a maximum begins at -inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.errors import NonFiniteError, SourceError
from equipoise.lint.external import Place, Scope
from equipoise.lint.tensors import Constant, called
from equipoise.spec import Array

_CHUNK_BYTES: Final = 1 << 24
_HINT: Final = (
    "Training diverged, a conversion overflowed or the file is damaged; take an earlier checkpoint"
    " or export again."
)
_WEIGHED: Final[Mapping[str, Sequence[int]]] = {
    "MatMul": (0, 1), "FusedMatMul": (0, 1), "Gemm": (0, 1, 2), "FusedGemm": (0, 1, 2),
    "Conv": (0, 1, 2), "FusedConv": (0, 1, 2), "ConvTranspose": (0, 1, 2),
    "DeformConv": (0, 1, 2, 3), "Einsum": range(16), "LSTM": range(8), "GRU": range(6),
    "RNN": range(6), "BatchNormalization": (1, 2, 3, 4), "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2), "GroupNormalization": (1, 2), "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,), "SkipLayerNormalization": (2, 3, 4),
    "SkipSimplifiedLayerNormalization": (2, 3), "EmbedLayerNormalization": (2, 3, 4, 5, 6),
    "MatMulNBits": (2,), "PRelu": (1,), "BiasGelu": (1,),
}  # fmt: skip
"""Operator -> inputs that are multiplied or normalised with: infinity there is NaN in the end."""

_CARRIERS: Final = frozenset({
    "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "CastLike",
    "Concat", "Slice", "Split", "Expand", "QuantizeLinear", "DequantizeLinear",
})  # fmt: skip
_SCALES: Final[Mapping[str, Sequence[int]]] = {
    "QuantizeLinear": (1,), "DequantizeLinear": (1,), "QLinearConv": (1, 4, 6),
    "QLinearMatMul": (1, 4, 6), "QGemm": (1, 4, 7), "QLinearAdd": (1, 4, 6),
    "QLinearMul": (1, 4, 6), "QLinearSigmoid": (1, 3), "QLinearLeakyRelu": (1, 3),
    "QLinearSoftmax": (1, 3), "QLinearAveragePool": (1, 3), "QLinearGlobalAveragePool": (1, 3),
    "DynamicQuantizeMatMul": (2,), "MatMulIntegerToFloat": (2, 3),
}  # fmt: skip
"""Operator -> inputs that are scales."""

_FLOATS: Final[Mapping[int, tuple[str, int, int]]] = {
    1: ("<u4", 0x7F800000, 0x007FFFFF),  # FLOAT
    10: ("<u2", 0x7C00, 0x03FF),  # FLOAT16
    11: ("<u8", 0x7FF0000000000000, 0x000FFFFFFFFFFFFF),  # DOUBLE
    16: ("<u2", 0x7F80, 0x007F),  # BFLOAT16
    19: ("<u1", 0x7C, 0x03),  # FLOAT8E5M2
}
"""Type -> as bits; those of the exponent, all of which are set in infinity and NaN; of the rest."""

_NAN_BITS: Final[Mapping[int, tuple[int, int]]] = {
    17: (0x7F, 0x7F),  # FLOAT8E4M3FN
    18: (0xFF, 0x80),  # FLOAT8E4M3FNUZ
    20: (0xFF, 0x80),  # FLOAT8E5M2FNUZ
    24: (0xFF, 0xFF),  # FLOAT8E8M0
}
"""Type of one byte without infinity -> mask, and what NaN is under it."""

_COMPLEX: Final[Mapping[int, int]] = {14: 1, 15: 11}
"""Complex type -> type of its parts."""

_LARGEST: Final[Mapping[int, float]] = {10: 65504.0, 16: 3.3895313892515355e38}
"""Type -> its largest number."""

_LEAST_NORMAL: Final[Mapping[int, float]] = {
    1: float(np.finfo(np.float32).tiny), 11: float(np.finfo(np.float64).tiny), 16: 2.0**-126,
}  # fmt: skip
"""Type -> its least normal number; scales in float16 are often below that one's."""

_ZERO_ONLY: Final = frozenset({6, 17, 18, 19, 20})  # INT32 and the types of eight-bit floats
_SMALL_INTEGERS: Final = frozenset({21, 22, 25, 26})  # UINT4, INT4, UINT2, INT2


@dataclass(kw_only=True)
class _Bad:
    """Numbers of a constant that cannot be computed with.

    Attributes:
        count: How many.
        size: Of how many.
        first: Index of the first, among the values in a row.
    """

    count: int = 0
    size: int = 0
    first: int = 0

    def add(self, hits: Array) -> None:
        """Go on with the next values; ``hits`` says which of them are bad."""
        if not self.count and hits.any():
            self.first = self.size + int(hits.argmax())
        self.count += int(hits.sum())
        self.size += hits.size

    def said(self, constant: Constant, how: str) -> str:
        """``2 of 12 numbers of the weight 'w' are NaN, the first at [0, 3]``."""
        shape = tuple(constant.tensor.dims)
        inside = math.prod(shape) > self.first  # but in a sparse tensor
        index = [int(i) for i in np.unravel_index(self.first, shape)] if inside else [self.first]
        what = f"{self.count} of {self.size} numbers of the {constant.what:.300}"
        return f"{what} {how}, the first at {index}"


def check_numbers(path: Path, scope: Scope) -> None:
    """Check every number of a part of the model at ``path``; each is read once.

    Raises:
        NonFiniteError: Names the tensor, how many of its numbers are bad, and the first.
        SourceError: A zero point that does not fit its scale; names the node.
    """
    held = {pair[0].name: pair for pair in scope.held if pair[0].name}
    infinite: dict[str, str] = {}
    for constant, place in scope.held:
        _check_nan(path, constant, place, infinite)
    for graph in scope.graphs:
        for node in graph.node:
            _check_node(path, node, held=held, infinite=infinite)


def _check_nan(
    path: Path, constant: Constant, place: Place | None, infinite: dict[str, str]
) -> None:
    """Refuse NaN; remember infinity under the name of the constant."""
    nans, infinities = _Bad(), _Bad()
    for values in _bits(constant.tensor, place):
        strange = _strange(constant.tensor.data_type, values)
        nan = strange & _is_nan(constant.tensor.data_type, values) if strange.any() else strange
        nans.add(nan)
        infinities.add(strange & ~nan)
    if nans.count:
        raise NonFiniteError(f"{path}: {nans.said(constant, 'are NaN')}", hint=_HINT)
    if infinities.count:
        infinite[constant.name] = infinities.said(constant, "are infinite")


def _strange(kind: int, values: Array) -> Array:
    """Where NaN or infinity are."""
    kind = _COMPLEX.get(kind, kind)
    if kind in _NAN_BITS:
        return _is_nan(kind, values)
    strange: Array
    if kind in {1, 11}:
        strange = ~np.isfinite(values.view(values.dtype.str.replace("u", "f")))
        return strange
    exponent = _FLOATS[kind][1]
    strange = (values & exponent) == exponent
    return strange


def _is_nan(kind: int, values: Array) -> Array:
    kind = _COMPLEX.get(kind, kind)
    nan: Array
    if kind in _NAN_BITS:
        mask, expected = _NAN_BITS[kind]
        nan = (values & mask) == expected
    else:
        exponent, rest = _FLOATS[kind][1:]
        nan = ((values & exponent) == exponent) & ((values & rest) != 0)
    return nan


def _bits(tensor: Any, place: Place | None) -> Iterator[Array]:
    """The values of ``tensor`` as unsigned integers, in pieces; nothing of other types."""
    kind = _COMPLEX.get(tensor.data_type, tensor.data_type)
    if kind not in _FLOATS and kind not in _NAN_BITS:
        return
    dtype = np.dtype(_FLOATS[kind][0] if kind in _FLOATS else "u1")
    if place is not None:
        yield from _from_file(place, dtype)
    elif tensor.raw_data:
        raw = tensor.raw_data
        yield np.frombuffer(raw, dtype=dtype, count=len(raw) // dtype.itemsize)
    else:
        floats: Any = tensor.float_data if kind == 1 else tensor.double_data
        if kind in {1, 11}:
            yield np.array(floats, dtype=f"<f{dtype.itemsize}").view(dtype)
        else:
            yield np.array(tensor.int32_data, dtype=np.int64).astype(dtype)


def _from_file(place: Place, dtype: np.dtype[Any]) -> Iterator[Array]:
    """Pieces, read and not mapped: pages of a map count as memory of this process."""
    step = _CHUNK_BYTES // dtype.itemsize
    left, offset = place.length // dtype.itemsize, place.offset
    while left > 0:
        piece = np.fromfile(place.file, dtype=dtype, count=min(step, left), offset=offset)
        if not piece.size:
            raise SourceError(f"{place.file} became shorter while it was read")
        yield piece
        left, offset = left - piece.size, offset + piece.nbytes


_Held = Mapping[str, tuple[Constant, Place | None]]


def _check_node(path: Path, node: Any, *, held: _Held, infinite: dict[str, str]) -> None:
    """One node, after those before it."""
    if node.attribute:
        _check_attributes(path, node, infinite)
    if node.op_type in _SCALES:
        _check_scales(path, node, held)
    if node.op_type == "Cast" and node.input and node.input[0] in held:
        _check_cast(node, held[node.input[0]], infinite)
    if not infinite:
        return
    for index in _WEIGHED.get(node.op_type, ()):
        if index < len(node.input) and node.input[index] in infinite:
            said = infinite[node.input[index]]
            raise NonFiniteError(f"{path}: {said}; {called(node)} reads them", hint=_HINT)
    if node.op_type in _CARRIERS:
        carried = next((infinite[name] for name in node.input if name in infinite), None)
        if carried is not None:
            infinite.update(dict.fromkeys(node.output, carried))


def _check_attributes(path: Path, node: Any, infinite: dict[str, str]) -> None:
    for attribute in node.attribute:
        values = [attribute.f] if attribute.type == 1 else attribute.floats  # FLOAT
        if not values or all(map(math.isfinite, values)):
            continue
        said = f"{attribute.name} of {called(node)}"
        nans = [index for index, value in enumerate(values) if math.isnan(value)]
        if nans:
            counts = f"{len(nans)} of {len(values)} numbers of the {said}"
            raise NonFiniteError(f"{path}: {counts} are NaN, the first at [{nans[0]}]", hint=_HINT)
        if node.op_type == "Constant":
            infinite[node.output[0]] = f"numbers of the {said} are infinite"


def _check_cast(
    node: Any, constant: tuple[Constant, Place | None], infinite: dict[str, str]
) -> None:
    """Numbers that a conversion of a constant turns into infinity."""
    target = next((a.i for a in node.attribute if a.name == "to"), 0)
    kind = constant[0].tensor.data_type
    if target not in _LARGEST or kind not in {1, 11}:  # FLOAT, DOUBLE
        return
    bad = _Bad()
    for bits in _bits(constant[0].tensor, constant[1]):
        bad.add(np.abs(bits.view(bits.dtype.str.replace("u", "f"))) > _LARGEST[target])
    if bad.count:
        how = f"are too large for the type that {called(node)} makes"
        infinite[node.output[0]] = bad.said(constant[0], how)


def _check_scales(path: Path, node: Any, held: _Held) -> None:
    for index in _SCALES[node.op_type]:
        name = node.input[index] if index < len(node.input) else ""
        if name in held:
            _check_scale(path, node, held[name], divides=not _of_few_bits(node, held))
    if node.op_type in {"QuantizeLinear", "DequantizeLinear"} and len(node.input) > 2:
        _check_zero_point(path, node, held)


def _of_few_bits(node: Any, held: _Held) -> bool:
    """Whether it unpacks constants of four bits or less, whose scales may be zero or negative."""
    data = held.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    return data is not None and data[0].tensor.data_type in _SMALL_INTEGERS


def _check_scale(
    path: Path, node: Any, found: tuple[Constant, Place | None], *, divides: bool
) -> None:
    constant, place = found
    scale, kind = _values(constant.tensor, place), constant.tensor.data_type
    least = _LEAST_NORMAL.get(kind, 0.0)
    wrong = ~np.isfinite(scale)
    if divides:
        wrong |= (scale <= 0) | (scale < least)
    if not wrong.any():
        return
    bad = _Bad()
    bad.add(wrong)
    value = float(scale[bad.first])
    raise NonFiniteError(
        f"{path}: {bad.said(constant, 'are no scales')}, which is {value:.6g}: {called(node)} needs"
        f" {constant.name!r:.200} positive, finite and no less than {least:.3g}",
        hint="Quantise the model again with other calibration data or another range.",
    )


def _values(tensor: Any, place: Place | None) -> Array:
    """Values of a float tensor, in a row, as float64."""
    pieces = list(_bits(tensor, place))
    if not pieces:
        return np.ones(0)
    bits = np.concatenate(pieces)
    dtype: Any = extras.require("onnx").helper.tensor_dtype_to_np_dtype(tensor.data_type)
    values: Array = bits.view(dtype).astype(np.float64)
    return values


def _check_zero_point(path: Path, node: Any, held: _Held) -> None:
    scale, zero = (held.get(node.input[index]) for index in (1, 2))
    if zero is None:
        return
    data = held.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    problem = _zero_problem(zero, scale=scale, data=data)
    if problem:
        name = node.input[2]
        raise SourceError(
            f"{path}: the zero point {name!r:.200} of {called(node)} {problem}",
            hint="Quantise the model again.",
        )


def _zero_problem(
    zero: tuple[Constant, Place | None],
    *,
    scale: tuple[Constant, Place | None] | None,
    data: tuple[Constant, Place | None] | None,
) -> str:
    tensor = zero[0].tensor
    if scale is not None and math.prod(scale[0].tensor.dims) != math.prod(tensor.dims):
        return f"has the shape {list(tensor.dims)}, its scale {list(scale[0].tensor.dims)}"
    if data is not None and data[0].tensor.data_type != tensor.data_type:
        return "is of another type than the integers"
    if tensor.data_type in _ZERO_ONLY and zero[1] is None and _any_set(tensor):
        return "has to be zero for this type"
    return ""


def _any_set(tensor: Any) -> bool:
    """Whether a tensor of integers or small floats holds anything but zero."""
    return any(tensor.raw_data) or any(tensor.int32_data)
