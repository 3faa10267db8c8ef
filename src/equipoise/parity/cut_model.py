"""Models of pieces: all side by side, each fed with the values of the reference.

The error of a piece is then its own and none is inherited. A piece can be built in three forms.
``exact`` computes what the candidate computes. ``noisy`` adds to everything that the piece reads
and holds as much noise as its arithmetic rounds away: a unit in the last place to floats, up to
half a step to what lies on a grid. ``still`` is the same without that noise. What lies between the
last two is what rounding explains, as the piece itself passes it on; saturation is no rounding, and
shows in the first alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from equipoise import extras, onnxio
from equipoise.parity.cut import FLOATS, NOISE, SMALL_INTEGERS, CutGraph
from equipoise.spec import Array

Form = Literal["exact", "still", "noisy"]

GIVEN: Final = "#given"
MADE: Final = "#made"
OUT: Final = "#out"
_CLEAN: Final = "#clean"

_HALVES: Final = frozenset({10, 16})

_FIXED_CONSTANTS: Final = frozenset(
    {
        "DequantizeLinear", "NonMaxSuppression", "OneHot", "QuantizeLinear", "Range", "Resize",
        "TopK", "Upsample",
    }
)  # fmt: skip
"""Operators whose float constants are scales or counts; noise there is another operation."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How pieces are cut.

    Attributes:
        form: See the module.
        through: Shared values that are computed and not given.
        bypass: Indices of DequantizeLinear nodes that hand on what their QuantizeLinear reads.
    """

    form: Form = "exact"
    through: Collection[str] = ()
    bypass: Collection[int] = ()


_PLAIN: Final = Cut()


def cut_model(
    graph: CutGraph, values: Sequence[str], *, ranks: Mapping[str, int], cut: Cut = _PLAIN
) -> Any:
    """A model that makes ``values`` from shared values.

    Args:
        graph: The candidate.
        values: Values of the candidate that nodes make; outputs ``<value>#out``, half precision as
            float32.
        ranks: Value of the reference -> number of its dimensions.
        cut: How.

    Returns:
        ``onnx.ModelProto`` with an input ``<name>#given`` for each value of the reference that it
        reads.
    """
    return _Writer(graph, ranks=ranks, cut=cut).write(values)


class _Writer:
    def __init__(self, graph: CutGraph, *, ranks: Mapping[str, int], cut: Cut) -> None:
        onnx = extras.require("onnx")
        self._graph, self._ranks, self._form = graph, ranks, cut.form
        self._through, self._bypass = cut.through, cut.bypass
        self._node = onnx.helper.make_node
        self._model = onnx.ModelProto(ir_version=graph.candidate.ir_version)
        self._model.opset_import.extend(graph.candidate.opset_import)
        self._model.functions.extend(graph.candidate.functions)
        self._model.graph.name = "pieces"
        self._written: list[Any] = []

    def write(self, values: Sequence[str]) -> Any:
        nodes, reads, constants = self._graph.behind(values, through=self._through)
        rounded = self._rounded(nodes)
        for name in reads:
            self._give(name, dithered=name not in rounded)
        for name in constants:
            self._constant(name)
        for index in nodes:
            self._copy(index)
        for value in values:
            self._output(value)
        self._model.graph.node.extend(self._written)
        return self._model

    def _rounded(self, nodes: Sequence[int]) -> set[str]:
        """Shared values that a QuantizeLinear alone reads here: their noise is that of the grid."""
        reading: dict[str, set[str]] = {}
        for index in nodes:
            node = self._graph.node(index)
            for name in node.input:
                reading.setdefault(name, set()).add(node.op_type)
        return {name for name, operators in reading.items() if operators == {"QuantizeLinear"}}

    def _give(self, name: str, *, dithered: bool) -> None:
        """An input for the value of the reference, and ``name`` made of it."""
        onnx = extras.require("onnx")
        meant = self._graph.shared[name]
        kind, given = self._graph.reference_types[meant], f"{meant}{GIVEN}"
        wanted = self._graph.types.get(name) or kind
        if given not in {value.name for value in self._model.graph.input}:
            dims = [None] * self._ranks[meant]
            info = onnx.helper.make_tensor_value_info(given, kind, dims)
            self._model.graph.input.append(info)
        source = given
        if dithered and self._form == "noisy" and kind in FLOATS:
            source = f"{name}{_CLEAN}"
            self._dither(given, source, kind=kind, amount=NOISE[FLOATS.get(wanted, "float32")])
        cast = {"to": wanted} if wanted != kind else {}
        self._written.append(self._node("Cast" if cast else "Identity", [source], [name], **cast))

    def _constant(self, name: str) -> None:
        tensor = self._graph.constants[name]
        readers = {self._graph.node(i).op_type for i in self._graph.readers[name]}
        kind = FLOATS.get(tensor.data_type)
        still = self._form != "noisy" or kind is None or readers & _FIXED_CONSTANTS
        self._model.graph.initializer.append(tensor)
        if not still and kind is not None:
            self._model.graph.initializer[-1].name = f"{name}{_CLEAN}"
            amount = NOISE[kind]
            self._dither(f"{name}{_CLEAN}", name, kind=tensor.data_type, amount=amount)

    def _dither(self, source: str, result: str, *, kind: int, amount: float) -> None:
        """``result = source * (1 + u)`` with u uniform within ``amount``, in float32."""
        noise, moved = f"{result}#noise", f"{result}#moved"
        self._random(source, noise, amount=amount)
        single = self._cast(source, f"{result}#single", kind=kind, to=1)
        self._written += [
            self._node("Mul", [single, noise], [moved]),
            self._node("Add", [single, moved], [f"{result}#sum"]),
            self._node("Cast", [f"{result}#sum"], [result], to=kind),
        ]

    def _random(self, like: str, result: str, *, amount: float) -> None:
        seed = float(len(self._written) + 1)
        spread = {"low": -amount, "high": amount, "dtype": 1, "seed": seed}
        self._written.append(self._node("RandomUniformLike", [like], [result], **spread))

    def _cast(self, source: str, result: str, *, kind: int, to: int) -> str:
        if kind == to:
            return source
        self._written.append(self._node("Cast", [source], [result], to=to))
        return result

    def _copy(self, index: int) -> None:
        """A node, its shared outputs renamed; a DequantizeLinear as the form wants it."""
        node = extras.require("onnx").NodeProto()
        node.CopyFrom(self._graph.node(index))
        for place, name in enumerate(node.output):
            if name in self._graph.shared and name not in self._through:
                node.output[place] = f"{name}{MADE}"
        if node.op_type == "DequantizeLinear":
            self._dequantize(index, node)
        elif self._form == "noisy" and self._restores(node):
            self._restore(node)
        else:
            self._written.append(node)

    def _restores(self, node: Any) -> bool:
        """Whether a Cast makes floats of stored integers, each of which stands for a step."""
        source = node.input[0] if node.op_type == "Cast" else ""
        tensor = self._graph.constants.get(source)
        kind = self._graph.types.get(source) or (tensor.data_type if tensor is not None else 0)
        return kind in SMALL_INTEGERS and onnxio.attribute(node, "to", 0) in FLOATS

    def _restore(self, node: Any) -> None:
        result, kind = node.output[0], onnxio.attribute(node, "to", 1)
        node.output[0] = f"{result}{_CLEAN}"
        self._written.append(node)
        self._random(node.output[0], f"{result}#noise", amount=0.5)
        single = self._cast(node.output[0], f"{result}#single", kind=kind, to=1)
        self._written += [
            self._node("Add", [single, f"{result}#noise"], [f"{result}#sum"]),
            self._node("Cast", [f"{result}#sum"], [result], to=kind),
        ]

    def _dequantize(self, index: int, node: Any) -> None:
        """A DequantizeLinear, without its QuantizeLinear and with noise as the form wants it."""
        quantizer, result = self._graph.quantizer(node), node.output[0]
        source = f"{result}{_CLEAN}" if self._form == "noisy" else result
        handed_on = self._form != "exact" or index in self._bypass
        if quantizer is not None and handed_on:
            self._written.append(self._node("Identity", [quantizer.input[0]], [source]))
        else:
            node.output[0] = source
            self._written.append(node)
        if source != result:
            self._half_step(node, source, result)

    def _half_step(self, node: Any, source: str, result: str) -> None:
        """``result = source`` plus uniform noise of up to half a step of the grid of ``node``."""
        parts = self._graph.grid(node)
        if parts is None:
            self._written.append(self._node("Identity", [source], [result]))
            return
        step = self._step(node, parts[:2], name=f"{result}#step")
        kind = int(self._graph.constants[node.input[1]].data_type)
        self._random(source, f"{result}#noise", amount=0.5)
        single = self._cast(source, f"{result}#single", kind=kind, to=1)
        self._written += [
            self._node("Mul", [f"{result}#noise", step], [f"{result}#moved"]),
            self._node("Add", [single, f"{result}#moved"], [f"{result}#sum"]),
            self._node("Cast", [f"{result}#sum"], [result], to=kind),
        ]

    def _step(self, node: Any, parts: tuple[Array, Array], *, name: str) -> str:
        """The scale as a constant that broadcasts against what ``node`` gives.

        Stored zeros take no noise: channels that go another way in float are all zero.
        """
        onnx = extras.require("onnx")
        block, axis = onnxio.attribute(node, "block_size", 0), onnxio.attribute(node, "axis", 1)
        stored = self._graph.constants.get(node.input[0])
        if stored is None:
            step = _along(parts[0], rank=self._rank(node), axis=axis)
        else:
            values = onnx.numpy_helper.to_array(stored)
            step, zero = (_spread(p, values.shape, axis=axis, block=block) for p in parts)
            step = step * (values != zero)
        tensor = onnx.numpy_helper.from_array(np.asarray(step, dtype=np.float32), name)
        self._model.graph.initializer.append(tensor)
        return name

    def _rank(self, node: Any) -> int:
        quantizer = self._graph.quantizer(node)
        meant = self._graph.shared.get(quantizer.input[0] if quantizer is not None else "", "")
        return self._ranks.get(meant, 4)

    def _output(self, value: str) -> None:
        onnx = extras.require("onnx")
        computed = value not in self._graph.shared or value in self._through
        made, result = value if computed else f"{value}{MADE}", f"{value}{OUT}"
        to = {"to": 1} if self._graph.types.get(value, 0) in _HALVES else {}
        self._written.append(self._node("Cast" if to else "Identity", [made], [result], **to))
        kind = 1 if to else self._graph.types.get(value, 0)
        info = onnx.helper.make_tensor_value_info(result, kind, None)
        # Behind a vendor's operator types are not known here; ONNX Runtime finds them.
        self._model.graph.output.append(info if kind else onnx.ValueInfoProto(name=result))


def _along(part: Array, *, rank: int, axis: int) -> Array:
    """A parameter per tensor or per channel, in a form that broadcasts along ``axis``."""
    if part.size == 1:
        return part.reshape(())
    return part.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def _spread(part: Array, shape: tuple[int, ...], *, axis: int, block: int) -> Array:
    """As :func:`_along`, or a parameter for each block of ``block`` integers."""
    if not block:
        return _along(part, rank=len(shape), axis=axis)
    repeated: Array = np.repeat(part, block, axis=axis)
    return np.take(repeated, np.arange(shape[axis]), axis=axis)
