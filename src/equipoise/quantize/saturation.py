"""What 16-bit sums do to int8 layers on AVX2 without VNNI, computed on any machine.

There, the product of unsigned activations and signed weights adds two neighbouring products in
int16 before it widens them (the instruction vpmaddubsw), and a sum beyond int16 is cut off.
Neighbours are the inputs ``2i`` and ``2i + 1`` of the dot product in the order in which ONNX
Runtime's kernels walk it: as stored for products; kernel position by position, channels innermost,
for convolutions. The activations count as stored, zero point included; signed ones are shifted by
128 first, as the runtime does there. Convolutions with one channel in and out per group have a
kernel of their own that widens first, and unsigned weights have another product: neither saturates.

An exact sum plus what was cut off is the saturated sum, and only pairs of large weights can be cut
off at all. So the cost is that of those few pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, onnxio
from equipoise.quantize.layers import LAYERS, Layer
from equipoise.quantize.observe import observing
from equipoise.quantize.pairs import QUANTIZE, Wiring, dequantize_parts, restore_weight, wiring
from equipoise.runtimes.onnxruntime.session import open_inference_session, session_options
from equipoise.runtimes.protocol import SessionSettings
from equipoise.spec import Array, Feeds

_INT16: Final = np.iinfo(np.int16)
_CHUNK_VALUES: Final = 1 << 22
_SHIFT: Final = 128
_POSITIONS: Final = 512
_SLACK: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class LayerSaturation:
    """What saturation does to one layer.

    Attributes:
        name: Node.
        operator: Its type.
        pairs: Pair sums looked at.
        share: Share of them that does not fit int16.
        sqnr_db: 10 log10 of (sum of squared outputs of the layer / sum of squared differences that
            saturation makes to them); None when no sum is cut off.
    """

    name: str
    operator: str
    pairs: int
    share: float
    sqnr_db: float | None


@dataclass(frozen=True, kw_only=True)
class IntegerLayer:
    """A layer of a QDQ graph that runs as a product of u8 and s8 and can saturate.

    Attributes:
        layer: The node; its weight is the stored integer tensor.
        activation: Tensor of the stored activations.
        zero_point: Zero point of the activations as unsigned numbers, 0 to 255.
        shift: 128 for signed activations, else 0.
        rows: int8 ``[groups, outputs, inputs]``, inputs in the order of the kernels.
        scale: float32 ``[groups, outputs]``: what one unit of the integer sum is worth.
    """

    layer: Layer
    activation: str
    zero_point: int
    shift: int
    rows: Array
    scale: Array

    def patches(self, stored: Array) -> Array:
        """uint8 ``[groups, positions, inputs]``: what each dot product reads, in its order."""
        unsigned = (stored.astype(np.int16) + self.shift).astype(np.uint8)
        # Padding is the zero point. Modulo 256 it can be taken away and given back.
        centred = unsigned - np.uint8(self.zero_point)
        read = self.layer.patches(centred) + np.uint8(self.zero_point)
        return _kernel_order(read, self.layer)


@dataclass(frozen=True, kw_only=True)
class CutOff:
    """What int16 cuts off the dot products of a layer.

    Attributes:
        excess: int64 ``[groups, positions, outputs]``: saturated minus exact sum.
        pairs: Pair sums in all.
        overflows: Pair sums beyond int16.
    """

    excess: Array
    pairs: int
    overflows: int


def integer_layers(quantized: Any) -> tuple[IntegerLayer, ...]:
    """The layers that can saturate, in graph order.

    Args:
        quantized: ``onnx.ModelProto`` with Q/DQ pairs and named nodes.
    """
    wires = wiring(quantized)
    found = (_integer_layer(node, wires) for node in quantized.graph.node)
    return tuple(layer for layer in found if layer is not None)


def saturation(
    quantized: Any, rows: Iterable[Feeds], *, positions: int = _POSITIONS, threads: int = 1
) -> tuple[LayerSaturation, ...]:
    """Measure, layer by layer, what saturation would do; every layer gets exact inputs.

    Memory is that of one sample plus ``positions`` rows of the widest layer.

    Args:
        quantized: ``onnx.ModelProto`` with Q/DQ pairs and named nodes; it is not changed.
        rows: Calibration samples.
        positions: Output positions per sample and layer, evenly spaced.
        threads: Threads per operator.

    Raises:
        InputError: A sample does not fit the model.
    """
    layers = integer_layers(quantized)
    if not layers:
        return ()
    model = _exact(quantized, layers)
    tallies = [_Tally(layer) for layer in layers]
    names = [name for item in layers for name in (item.activation, item.layer.output)]
    with observing(model, names, threads=threads) as observe:
        for feeds in rows:
            values = observe(feeds)
            for tally in tallies:
                tally.add(values, positions=positions)
    return tuple(tally.result() for tally in tallies)


@contextmanager
def simulating(
    quantized: Any, *, saturate: bool, threads: int = 1
) -> Iterator[Callable[[Feeds], dict[str, Array]]]:
    """Open ``quantized`` so that it runs as on AVX2 without VNNI, whatever this machine is.

    Each layer is corrected by what int16 cuts off given the inputs that the corrected layers before
    it make, so a run takes as many passes of the model as layers can saturate.

    Args:
        quantized: ``onnx.ModelProto`` with Q/DQ pairs and named nodes; it is not changed.
        saturate: False corrects nothing: exact integers, whatever this machine is.
        threads: Threads per operator.

    Yields:
        A function from the feeds of a run to the outputs of the model by name.
    """
    layers = integer_layers(quantized)
    outputs = [value.name for value in quantized.graph.output]
    with fs.scratch_directory() as folder:
        onnxio.save_model(_correctable(quantized, layers), folder / "simulated.onnx")
        options = session_options(SessionSettings(threads=threads))
        session = open_inference_session(folder / "simulated.onnx", options=options)

        def run(feeds: Feeds) -> dict[str, Array]:
            given = {**feeds, **{_delta(item.layer): _NOTHING for item in layers}}
            for item in layers if saturate else ():
                stored, exact = session.run([item.activation, item.layer.output], given)
                given[_delta(item.layer)] = _correction(item, stored, shape=exact.shape)
            return dict(zip(outputs, session.run(outputs, given), strict=True))

        yield run


def cut_off(patches: Array, rows: Array) -> CutOff:
    """What int16 pair sums cut off.

    Args:
        patches: uint8 ``[groups, positions, inputs]``.
        rows: int8 ``[groups, outputs, inputs]``.
    """
    width = -(-rows.shape[-1] // 2) * 2
    groups, positions, outputs = rows.shape[0], patches.shape[1], rows.shape[1]
    excess = np.zeros((groups, positions, outputs), dtype=np.int64)
    overflows = 0
    for group in range(groups):
        read = _paired(patches[group], width)
        held = _paired(rows[group], width)
        overflows += _cut_group(read, held, excess=excess[group])
    return CutOff(
        excess=excess, pairs=groups * positions * outputs * width // 2, overflows=overflows
    )


def _paired(array: Array, width: int) -> Array:
    """int32 ``[items, pairs, 2]`` of ``[items, inputs]``; an odd last input gets a zero."""
    padded = np.zeros((len(array), width), dtype=np.int32)
    padded[:, : array.shape[1]] = array
    return padded.reshape(len(array), -1, 2)


def _cut_group(read: Array, held: Array, *, excess: Array) -> int:
    """Add what is cut off to ``excess`` [positions, outputs]; return the number of overflows."""
    outputs, pairs = np.nonzero(_can_overflow(read, held))
    step = max(1, _CHUNK_VALUES // max(1, len(read)))
    overflows = 0
    for start in range(0, len(outputs), step):
        output, pair = outputs[start : start + step], pairs[start : start + step]
        sums = read[:, pair, 0] * held[output, pair, 0] + read[:, pair, 1] * held[output, pair, 1]
        cut = np.clip(sums, _INT16.min, _INT16.max) - sums
        overflows += int(np.count_nonzero(cut))
        firsts = np.flatnonzero(np.diff(output, prepend=-1))
        excess[:, output[firsts]] += np.add.reduceat(cut, firsts, axis=1)
    return overflows


def _can_overflow(read: Array, held: Array) -> Array:
    """Per ``[outputs, pairs]``, whether a pair sum can leave int16 within the values read."""
    if not len(read):
        return np.zeros(held.shape[:2], dtype=bool)
    low, high = read.min(0), read.max(0)
    up, down = np.maximum(held, 0), np.minimum(held, 0)
    most = (up * high + down * low).sum(-1)
    least = (up * low + down * high).sum(-1)
    overflows: Array = (most > _INT16.max) | (least < _INT16.min)
    return overflows


class _Tally:
    """Saturation of one layer over samples."""

    def __init__(self, item: IntegerLayer) -> None:
        self._item = item
        self._pairs = self._overflows = 0
        self._signal = self._noise = 0.0

    def add(self, values: Mapping[str, Array], *, positions: int) -> None:
        """Add a sample: the stored activations and the exact output of the layer."""
        layer = self._item.layer
        patches = self._item.patches(values[self._item.activation])
        output = layer.flat_output(values[layer.output])
        chosen = _spaced(patches.shape[1], positions)
        cut = cut_off(patches[:, chosen], self._item.rows)
        noise = cut.excess * self._item.scale[:, None].astype(np.float64)
        self._pairs += cut.pairs
        self._overflows += cut.overflows
        self._signal += float(np.square(output[chosen], dtype=np.float64).sum())
        self._noise += float(np.square(noise).sum())

    def result(self) -> LayerSaturation:
        ratio = self._signal / self._noise if self._noise else 0.0
        return LayerSaturation(
            name=self._item.layer.name,
            operator=self._item.layer.operator,
            pairs=self._pairs,
            share=self._overflows / max(self._pairs, 1),
            sqnr_db=10 * math.log10(ratio) if ratio else None,
        )


def _spaced(count: int, most: int) -> Array:
    """Up to ``most`` of ``count`` positions, evenly spaced and without repetition."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).astype(np.int64))


def _integer_layer(node: Any, wires: Wiring) -> IntegerLayer | None:
    if node.op_type not in LAYERS or len(node.input) < 2:
        return None
    weight, activation = wires.weight(node.input[1]), wires.dequantizer(node.input[0])
    if weight is None or activation is None or activation.input[0] in wires.constants:
        return None
    stored, scale, _ = dequantize_parts(weight, wires.constants)
    layer = Layer(
        node=node, weight=weight.input[0], shape=stored.shape, bias="", result=node.output[0]
    )
    grid = _activation_grid(activation, wires)
    if grid is None or stored.dtype != np.int8 or not _multiplies_in_pairs(layer, wires):
        return None
    step, zero_point, shift = grid
    scales = np.broadcast_to(scale, stored.shape).astype(np.float32)
    return IntegerLayer(
        layer=layer,
        activation=str(activation.input[0]),
        zero_point=zero_point + shift,
        shift=shift,
        rows=_kernel_order(layer.rows(stored), layer),
        scale=layer.rows(scales)[..., 0] * np.float32(step),
    )


def _activation_grid(dequantizer: Any, wires: Wiring) -> tuple[float, int, int] | None:
    """Scale, zero point and shift of 8-bit activations; None for other types and grids."""
    to_array = extras.require("onnx").numpy_helper.to_array
    if any(name and name not in wires.constants for name in dequantizer.input[1:]):
        return None
    step, *zeros = (to_array(wires.constants[name]) for name in dequantizer.input[1:] if name)
    zero = zeros[0] if zeros else np.zeros((), dtype=np.uint8)
    if step.size != 1 or zero.dtype not in {np.dtype(np.uint8), np.dtype(np.int8)}:
        return None
    shift = _SHIFT if zero.dtype == np.int8 else 0
    return float(step.item()), int(zero.item()), shift


def _multiplies_in_pairs(layer: Layer, wires: Wiring) -> bool:
    """Whether ONNX Runtime runs ``layer`` in integers, by the product that can saturate."""
    if layer.operator == "MatMul":
        return len(layer.shape) == 2
    attributes = {a.name: a for a in layer.node.attribute}
    bias = layer.node.input[2] if len(layer.node.input) > 2 else ""
    quantized_bias = not bias or wires.dequantizer(bias) is not None
    if layer.operator == "Gemm":
        plain = "transA" not in attributes or not attributes["transA"].i
        scaled = "alpha" in attributes and attributes["alpha"].f != 1
        return plain and not scaled and (quantized_bias or _is_rounded(layer.output, wires))
    depthwise = layer.groups > 1 and layer.groups == layer.channels and layer.shape[1] == 1
    return not depthwise and _is_rounded(layer.output, wires)


def _is_rounded(name: str, wires: Wiring) -> bool:
    """Whether ``name`` goes into a QuantizeLinear alone, past a Relu or Clip that this implies."""
    readers = wires.readers.get(name, [])
    if len(readers) != 1:
        return bool(readers) and all(reader.op_type == QUANTIZE for reader in readers)
    reader = readers[0]
    if reader.op_type not in {"Relu", "Clip"}:
        return bool(reader.op_type == QUANTIZE)
    after = wires.readers.get(reader.output[0], [])
    return len(after) == 1 and after[0].op_type == QUANTIZE and _implies(after[0], reader, wires)


def _implies(quantizer: Any, activation: Any, wires: Wiring) -> bool:
    """Whether the grid of ``quantizer`` lies within the bounds of a Relu or Clip before it."""
    grid = _activation_grid(quantizer, wires)
    if grid is None:
        return False
    step, zero_point, shift = grid
    bounds = [
        float(extras.require("onnx").numpy_helper.to_array(wires.constants[name]))
        for name in activation.input[1:]
        if name in wires.constants
    ]
    low, high = (*bounds, math.inf)[:2] if bounds else (0.0, math.inf)
    least, most = (step * (limit - zero_point - shift) for limit in (0, 255))
    return least >= low - _SLACK and most <= high + _SLACK


def _kernel_order(array: Array, layer: Layer) -> Array:
    """``[..., channels * kernel]`` as ``[..., kernel * channels]`` for a convolution."""
    if layer.operator != "Conv":
        return array
    kernel = int(np.prod(layer.shape[2:]))
    return array.reshape(*array.shape[:-1], -1, kernel).swapaxes(-1, -2).reshape(array.shape)


def _exact(quantized: Any, layers: Iterable[IntegerLayer]) -> Any:
    """``quantized`` with the weights of ``layers`` as floats that lie on their integer grids.

    A layer whose output is given out or corrected stays in float then, so that nothing saturates.
    Else ONNX Runtime would round those weights once more, to a grid of its own.
    """
    model = extras.require("onnx").ModelProto()
    model.CopyFrom(quantized)
    wires = wiring(model)
    chosen = {item.layer.name for item in layers}
    for node in model.graph.node:
        if node.name in chosen:
            node.input[1] = restore_weight(model, wires.weight(node.input[1]))
    return model


_NOTHING: Final = np.zeros(1, dtype=np.float32)


def _delta(layer: Layer) -> str:
    return f"{layer.output}.cut_off"


def _correctable(quantized: Any, layers: Iterable[IntegerLayer]) -> Any:
    """A model with an input per layer that is added to its output, and what corrections need."""
    layers = tuple(layers)
    model = _exact(quantized, layers)
    for item in layers:
        _add_correction(model, item.layer)
    _give_out(model, [name for item in layers for name in (item.activation, item.layer.output)])
    return model


def _add_correction(model: Any, layer: Layer) -> None:
    """Let an input of the graph be added to what ``layer`` gives."""
    helper = extras.require("onnx").helper
    position, node = next(
        (i, n) for i, n in enumerate(model.graph.node) if layer.output in n.output
    )
    exact = f"{layer.output}.exact"
    node.output[list(node.output).index(layer.output)] = exact
    add = helper.make_node("Add", [exact, _delta(layer)], [layer.output], name=_delta(layer))
    model.graph.node.insert(position + 1, add)
    float32 = extras.require("onnx").TensorProto.FLOAT
    model.graph.input.append(helper.make_tensor_value_info(_delta(layer), float32, None))


def _give_out(model: Any, names: Iterable[str]) -> None:
    onnx = extras.require("onnx")
    types = onnxio.value_types(model)
    present = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, types[name], None)
        for name in dict.fromkeys(names)
        if name not in present
    )


def _correction(item: IntegerLayer, stored: Array, *, shape: tuple[int, ...]) -> Array:
    """What int16 cuts off the output of a layer, in its units and its shape."""
    cut = cut_off(item.patches(stored), item.rows).excess * item.scale[:, None]
    channels = np.moveaxis(cut, 0, 1).reshape(cut.shape[1], -1).astype(np.float32)
    if item.layer.operator != "Conv":
        return channels.reshape(shape)
    batch, outputs, *space = shape
    return np.moveaxis(channels.reshape(batch, *space, outputs), -1, 1)
