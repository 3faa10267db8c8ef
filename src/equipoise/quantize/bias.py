"""Bias correction: what quantisation adds to the mean of each output channel is taken off again.

Rounding errors of the weights of one channel do not cancel: on inputs whose mean is not zero, as
after a Relu, they shift its output (Nagel et al., arXiv 1906.04721, section 4.2). The shift is one
number per channel, and the bias takes it back for nothing. It follows from the mean input of the
layer (:func:`expected_shifts`), or is observed on the quantised model (:func:`correct_biases`) with
all that came of rounding the layers before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise import onnxio
from equipoise.data.store import Rows
from equipoise.errors import DataError
from equipoise.quantize.layers import Layer, find_layers, read_array, write_array
from equipoise.quantize.observe import Feeds, observing
from equipoise.quantize.qdq import IntegerWeight
from equipoise.quantize.weights import read_in_subgraphs
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class BiasSettings:
    """How the shifts are observed.

    Attributes:
        samples: Most samples that count.
        passes: Most passes over the samples. Each corrects the layers that read one activation,
            behind all that is corrected already: correcting a layer together with those before it
            would take off twice what comes from them. The last layers are always among them.
        threads: Threads per operator.
    """

    samples: int = 32
    passes: int = 8
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class UncorrectedLayer:
    """A layer whose shift stays, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """What was done.

    Attributes:
        corrected: Names of the layers whose bias was changed.
        uncorrected: The others.
    """

    corrected: tuple[str, ...]
    uncorrected: tuple[UncorrectedLayer, ...]


class MeanPatch:
    """The mean of what a layer reads, over positions and samples.

    Args:
        layer: Whose patches.
        positions: Most positions of one sample, spread evenly; all when None.
    """

    def __init__(self, layer: Layer, *, positions: int | None = None) -> None:
        self._layer, self._most = layer, positions
        self._sum: Array = np.zeros(())
        self._positions = 0

    def add(self, activation: Array) -> None:
        """Add one sample: an input of the layer."""
        patches = self._layer.patches(activation, most=self._most)
        self._sum = self._sum + patches.sum(axis=1, dtype=np.float64)
        self._positions += patches.shape[1]

    def mean(self) -> Array:
        """float64 ``[groups, inputs]``.

        Raises:
            DataError: Nothing was added.
        """
        if not self._positions:
            raise DataError(f"no sample of what {self._layer.name!r} reads; at least one is needed")
        return self._sum / self._positions


def expected_shifts(
    model: Any, means: Mapping[str, Array], *, weights: Mapping[str, IntegerWeight]
) -> dict[str, Array]:
    """The shift of each layer from the rounding of its own weights: error times mean input.

    Args:
        model: Float ``onnx.ModelProto``.
        means: Layer name -> ``[groups, inputs]``, from :class:`MeanPatch`.
        weights: Initializer -> what it becomes.

    Returns:
        Layer name -> float64 ``[channels]``: the mean of the quantised output less the float one.
    """
    shifts = {}
    for layer in find_layers(model):
        if layer.name in means and layer.weight in weights:
            integer = weights[layer.weight]
            stored = read_array(model, layer.weight).astype(np.float64)
            error = layer.rows(integer.grid.dequantize(integer.values) - stored)
            shifts[layer.name] = np.einsum("goi,gi->go", error, means[layer.name]).ravel()
    return shifts


def subtract_shifts(model: Any, shifts: Mapping[str, Array]) -> BiasCorrection:
    """Take ``shifts`` off the biases of ``model``, in place; a Conv or Gemm without one gets one.

    A bias that others read too is left to them, and the layer gets one of its own.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes, before Q/DQ.
        shifts: Layer name -> ``[channels]``.
    """
    corrected, uncorrected = [], []
    constants = onnxio.initializers(model)
    for layer in (layer for layer in find_layers(model) if layer.name in shifts):
        reason = _obstacle(layer, constants)
        if reason:
            uncorrected.append(UncorrectedLayer(name=layer.name, reason=reason))
        else:
            _subtract(model, layer, shifts[layer.name])
            corrected.append(layer.name)
    return BiasCorrection(corrected=tuple(corrected), uncorrected=tuple(uncorrected))


def _obstacle(layer: Layer, constants: Mapping[str, Any]) -> str:
    """Why a shift cannot be taken off; empty when it can."""
    if not bias_fits(layer, constants):
        return "its bias is not one constant per channel"
    if layer.operator == "MatMul" and not layer.bias:
        return "no Add of a constant follows it"
    return ""


def bias_fits(layer: Layer, constants: Mapping[str, Any]) -> bool:
    """Whether a layer has a constant bias of one number per channel, or for all, or none."""
    if not layer.bias:
        return len(layer.node.input) < 3 or not layer.node.input[2]
    size = int(np.prod(constants[layer.bias].dims))
    return size == 1 or size == layer.channels == constants[layer.bias].dims[-1]


def own_bias(model: Any, layer: Layer) -> str:
    """Name of a bias ``float32 [channels]`` that ``layer`` alone reads, made if there is none.

    Args:
        model: ``onnx.ModelProto``, changed in place.
        layer: A layer whose bias fits: see :func:`bias_fits`. Not a MatMul without an Add.
    """
    reader = _bias_reader(model, layer)
    if not layer.bias:
        values = np.zeros(layer.channels, dtype=np.float32)
    else:
        stored = read_array(model, layer.bias)
        values = np.broadcast_to(stored.ravel(), (layer.channels,)).copy()
    name = layer.bias if layer.bias and _alone(model, layer.bias) else f"{layer.name}.own_bias"
    write_array(model, name, values)
    index = list(reader.input).index(layer.bias) if layer.bias else 2
    if index == len(reader.input):
        reader.input.append(name)
    else:
        reader.input[index] = name
    return name


def _bias_reader(model: Any, layer: Layer) -> Any:
    """The node that adds the bias, or would."""
    if layer.result == layer.output:
        return layer.node
    return next(node for node in model.graph.node if layer.result in node.output)


def _alone(model: Any, name: str) -> bool:
    """Whether one node of the main graph reads ``name``, and nothing else does."""
    elsewhere = read_in_subgraphs(model) | {value.name for value in model.graph.output}
    return len(onnxio.consumers(model)[name]) == 1 and name not in elsewhere


def _subtract(model: Any, layer: Layer, shift: Array) -> None:
    name = own_bias(model, layer)
    values = read_array(model, name).astype(np.float64) - shift
    write_array(model, name, values.astype(np.float32))


def correct_biases(
    model: Any,
    reference: Any,
    *,
    quantized_form: Callable[[Any], Any],
    rows: Rows | Sequence[Feeds],
    settings: BiasSettings,
) -> BiasCorrection:
    """Make the mean output of layers what it was before quantisation, in place.

    A pass per activation that layers read, in the order of the graph, evenly spread over it when
    there are more than ``settings.passes``.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes, before Q/DQ; its biases may be corrected
            already, for what is expected.
        reference: The float model with the biases that it was trained to.
        quantized_form: Gives the quantised form of a float model, which it leaves as it is. Layers
            keep the names of their nodes.
        rows: Calibration samples.
        settings: How the shifts are observed.
    """
    pieces = _pieces(find_layers(model), settings.passes)
    ends = ends_of(model, [layer for piece in pieces for layer in piece])
    wanted = mean_outputs(reference, ends, rows=rows, settings=settings)
    done = []
    for piece in pieces:
        observed = ends_of(model, piece)
        found = mean_outputs(quantized_form(model), observed, rows=rows, settings=settings)
        shifts = {name: mean - wanted[name] for name, mean in found.items()}
        done.append(subtract_shifts(model, shifts))
    return BiasCorrection(
        corrected=tuple(name for part in done for name in part.corrected),
        uncorrected=tuple(layer for part in done for layer in part.uncorrected),
    )


def _pieces(layers: Sequence[Layer], most: int) -> list[tuple[Layer, ...]]:
    """Neighbours that read one activation, evenly chosen from the end."""
    pieces = [tuple(group) for _, group in itertools.groupby(layers, key=lambda layer: layer.input)]
    count = min(most, len(pieces))
    return [pieces[len(pieces) * (i + 1) // count - 1] for i in range(count)]


def ends_of(model: Any, layers: Iterable[Layer]) -> dict[str, Layer]:
    """Name of the node that gives the output of a layer, bias included -> that layer."""
    return {_bias_reader(model, layer).name: layer for layer in layers}


def mean_outputs(
    model: Any,
    ends: Mapping[str, Layer],
    *,
    rows: Rows | Sequence[Feeds],
    settings: BiasSettings,
) -> dict[str, Array]:
    """Mean of each output channel over all positions of the samples, bias included.

    Args:
        model: Float or quantised ``onnx.ModelProto``.
        ends: Node -> the layer whose output it gives, from :func:`ends_of` the float model. Tensors
            may have other names in ``model``, as absorbing a Clip renames them.
        rows: Samples; an even share of them is run.
        settings: How many, and threads.

    Returns:
        Layer name -> float64 ``[channels]``, for the layers that ``model`` has.
    """
    outputs = {node.name: node.output[0] for node in model.graph.node if node.name in ends}
    sums = {ends[name].name: np.zeros(ends[name].channels) for name in outputs}
    counts = dict.fromkeys(sums, 0)
    step = max(1, -(-len(rows) // settings.samples))
    with observing(model, outputs.values(), threads=settings.threads) as observe:
        for index in range(0, len(rows), step):
            values = observe(rows[index])
            for name, layer in ((name, ends[name]) for name in outputs):
                flat = layer.flat_output(values[outputs[name]])
                sums[layer.name] += flat.sum(axis=0, dtype=np.float64)
                counts[layer.name] += len(flat)
    return {name: total / max(counts[name], 1) for name, total in sums.items()}
