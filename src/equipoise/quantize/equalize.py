"""Cross-layer equalisation: the same function, with channels that share one grid better.

Where a tensor goes from one layer to another through operators for which ``f(x / s) = f(x) / s``,
each channel can be divided by a factor of its own in the first layer and multiplied by it in the
second (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
arXiv 1906.04721, section 4.1). All tensors that such operators, residual sums included, tie to each
other form a *stream*: one factor per channel, divided out by every layer that writes into it and
multiplied in by every layer that reads from it. A stream of two layers is the pair of the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import onnxio
from equipoise.quantize.bias import bias_fits, own_bias
from equipoise.quantize.layers import Layer, find_layers, read_array, write_array
from equipoise.quantize.weights import read_in_subgraphs
from equipoise.spec import Array

_ELEMENTWISE: Final = frozenset({"Dropout", "Identity", "LeakyRelu", "PRelu", "Relu"})
_POOLS: Final = frozenset({"AveragePool", "MaxPool"})
_GLOBAL_POOLS: Final = frozenset({"GlobalAveragePool", "GlobalMaxPool"})
_REDUCTIONS: Final = frozenset({"ReduceMax", "ReduceMean", "ReduceSum"})
_GATES: Final = frozenset({"HardSigmoid", "Sigmoid"})


@dataclass(frozen=True, kw_only=True)
class EqualizeSettings:
    """How far channels are made equal.

    Attributes:
        sweeps: Most rounds over all streams.
        tolerance: Largest logarithm of a factor in a round that counts as none.
        limit: Largest factor of a channel, and its inverse the least. A channel whose weights are
            next to zero lives from its bias, and a larger factor would blow that up.
    """

    sweeps: int = 20
    tolerance: float = 0.01
    limit: float = 64.0


@dataclass(frozen=True, kw_only=True)
class EqualizedStream:
    """Layers whose common channels were rescaled.

    Attributes:
        writers: Names of the layers whose outputs were divided.
        readers: Names of the layers whose inputs were multiplied.
        channels: Number of channels.
        largest_factor: Largest factor or inverse of one.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: int
    largest_factor: float


@dataclass(frozen=True, kw_only=True)
class SkippedStream:
    """Layers between which nothing was rescaled, and why."""

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Equalization:
    """What was done.

    Attributes:
        streams: What was rescaled.
        skipped: What was not, though a layer writes it and a layer reads it.
        sweeps: Rounds until nothing moved.
    """

    streams: tuple[EqualizedStream, ...]
    skipped: tuple[SkippedStream, ...]
    sweeps: int


@dataclass(frozen=True, kw_only=True)
class EqualizeConfig:
    """What to equalise: a float ONNX file."""

    model: Path
    settings: EqualizeSettings = field(default_factory=EqualizeSettings)


@dataclass(frozen=True, kw_only=True)
class EqualizeRecord:
    """The file, and what was done to it."""

    file: str
    done: Equalization


def equalize_stage(config: EqualizeConfig, *, output: Path) -> EqualizeRecord:
    """Write an equalised model to ``output``.

    Raises:
        SourceError: The model is no ONNX file.
    """
    model = onnxio.load_model(config.model)
    onnxio.name_nodes(model)
    done = equalize(model, config.settings)
    onnxio.save_model(model, output / "model.onnx")
    return EqualizeRecord(file="model.onnx", done=done)


def equalize(model: Any, settings: EqualizeSettings | None = None) -> Equalization:
    """Rescale the channels between layers, in place; the model computes what it computed.

    The weights of a channel before and after it get equal ranges. Ranges of activations that were
    calibrated before are out of date afterwards.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes.
        settings: How far.

    Returns:
        What was rescaled, what was not and why.
    """
    found = [stream for stream in _find_streams(model) if stream.writers and stream.readers]
    free = [stream for stream in found if not stream.reason]
    work = _Work(model, free, settings=settings or EqualizeSettings())
    sweeps = work.settle()
    _apply(model, free, work.factors)
    return Equalization(
        streams=tuple(_told(stream, work.factors[stream.key]) for stream in free),
        skipped=tuple(_told_skipped(stream) for stream in found if stream.reason),
        sweeps=sweeps,
    )


def _told(stream: _Stream, factors: Array) -> EqualizedStream:
    return EqualizedStream(
        writers=tuple(layer.name for layer in stream.writers),
        readers=tuple(layer.name for layer in stream.readers),
        channels=stream.channels,
        largest_factor=float(np.exp(np.abs(np.log(factors)).max())),
    )


def _told_skipped(stream: _Stream) -> SkippedStream:
    return SkippedStream(
        writers=tuple(layer.name for layer in stream.writers),
        readers=tuple(layer.name for layer in stream.readers),
        reason=stream.reason,
    )


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Where a tensor has its channels.

    Attributes:
        channels: How many.
        rank: Rank of a tensor with channels at axis 1; 0 for channels along the last axis.
        pooled: All axes after the channels have the size 1.
        flat: Space lies behind the channels in the last axis, so its size is a multiple.
    """

    channels: int
    rank: int = 0
    pooled: bool = False
    flat: bool = False


@dataclass(kw_only=True)
class _Stream:
    """Tensors tied to each other, and the layers at both ends."""

    key: str
    channels: int = 0
    writers: list[Layer] = field(default_factory=list)
    readers: list[Layer] = field(default_factory=list)
    reason: str = ""


def _find_streams(model: Any) -> list[_Stream]:
    return _Search(model).streams()


class _Search:
    """Joins the tensors that have to be scaled alike, in the order of the graph."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._constants = onnxio.initializers(model)
        self._layers = {layer.name: layer for layer in find_layers(model)}
        self._results = {layer.result for layer in self._layers.values()}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._parent: dict[str, str] = {}
        self._forms: dict[str, _Form] = {}
        self._reasons: dict[str, str] = {}

    def streams(self) -> list[_Stream]:
        """All groups of tied tensors, those that must stay as they are included."""
        for node in self._model.graph.node:
            self._visit(node)
        for value in (*self._model.graph.input, *self._model.graph.output):
            self._keep(value.name, "it is an input or output of the model")
        for name in read_in_subgraphs(self._model):
            self._keep(name, "a subgraph reads it")
        return self._collected()

    def _visit(self, node: Any) -> None:
        if node.name in self._layers:
            self._visit_layer(self._layers[node.name])
        elif node.output[0] in self._results:
            return  # the Add of a bias
        elif node.op_type == "Add" and self._joins(node.input):
            self._tie([*node.input, node.output[0]], self._forms[node.input[0]])
        elif node.op_type == "Mul" and (signal := self._gated(node)):
            self._pass(node, signal, form=replace(self._forms[signal], pooled=False))
        elif (form := self._after(node)) is not None:
            self._pass(node, node.input[0], form=form)
        else:
            self._keep_all(node, "lets no factors through")

    def _pass(self, node: Any, signal: str, *, form: _Form) -> None:
        """``node`` lets the factors of ``signal`` through, not those of its other inputs."""
        self._tie([signal, node.output[0]], form)
        for name in node.input:
            if name != signal:
                self._keep(name, f"{node.op_type} {node.name} reads it as a parameter")

    def _visit_layer(self, layer: Layer) -> None:
        form = self._forms.get(layer.input)
        if form is not None and not _reads(layer, form):
            self._keep(layer.input, f"{layer.name} reads it across its channels")
        rank = len(layer.shape) if layer.operator == "Conv" else 0
        made = _Form(channels=layer.channels, rank=rank)
        self._forms[layer.output] = made
        self._tie([layer.output, layer.result], made)
        if not bias_fits(layer, self._constants):
            self._keep(layer.output, f"the bias of {layer.name} is not one number per channel")

    def _joins(self, names: Iterable[str]) -> bool:
        """Whether the operands of an Add have channels in the same place."""
        forms = {self._forms.get(name) for name in names}
        return len(forms) == 1 and None not in forms

    def _gated(self, node: Any) -> str:
        """The operand of a Mul that is not its gate; empty when there is no such."""
        gates = [getattr(self._producers.get(n), "op_type", "") in _GATES for n in node.input]
        signals = [n for n, gate in zip(node.input, gates, strict=True) if not gate]
        return signals[0] if len(signals) == 1 and signals[0] in self._forms else ""

    def _after(self, node: Any) -> _Form | None:
        """The form of the output of an operator that lets factors through; None for any other."""
        form = self._forms.get(node.input[0]) if node.input else None
        if form is None or any(node.output[1:]) or node.domain not in {"", "ai.onnx"}:
            return None
        if node.op_type in _ELEMENTWISE:
            return form if node.input[0] not in node.input[1:] else None
        return self._after_space(node, form) if form.rank else None

    def _after_space(self, node: Any, form: _Form) -> _Form | None:
        """The same for operators over the axes behind the channels."""
        if node.op_type in _POOLS:
            return form
        if node.op_type in _GLOBAL_POOLS:
            return replace(form, pooled=True)
        if node.op_type in _REDUCTIONS:
            return self._after_reduction(node, form)
        if node.op_type == "Flatten" and onnxio.attribute(node, "axis", 1) == 1:
            return replace(form, rank=0, flat=True)
        return self._after_reshape(node, form) if node.op_type == "Reshape" else None

    def _after_reduction(self, node: Any, form: _Form) -> _Form | None:
        axes = onnxio.attribute(node, "axes", None)
        if axes is None and len(node.input) > 1 and node.input[1] in self._constants:
            axes = read_array(self._model, node.input[1]).tolist()
        if not axes or {axis % form.rank for axis in axes} != set(range(2, form.rank)):
            return None
        kept = onnxio.attribute(node, "keepdims", 1)
        return replace(form, pooled=True, rank=form.rank if kept else 0)

    def _after_reshape(self, node: Any, form: _Form) -> _Form | None:
        """A reshape to two axes that keeps the batch apart."""
        if node.input[1] not in self._constants or onnxio.attribute(node, "allowzero", 0):
            return None
        shape = read_array(self._model, node.input[1]).tolist()
        kept = len(shape) == 2 and (shape[0] == 0 or (shape == [-1, form.channels] and form.pooled))
        return replace(form, rank=0, flat=True) if kept else None

    def _tie(self, names: Iterable[str], form: _Form) -> None:
        first, *others = names
        for name in others:
            self._forms.setdefault(name, form)
            self._parent[self._root(name)] = self._root(first)
        self._parent.setdefault(first, first)

    def _root(self, name: str) -> str:
        while (parent := self._parent.setdefault(name, name)) != name:
            name = parent
        return name

    def _keep_all(self, node: Any, why: str) -> None:
        for name in (*node.input, *node.output):
            self._keep(name, f"{node.op_type} {node.name} {why}")

    def _keep(self, name: str, reason: str) -> None:
        self._reasons.setdefault(name, reason)

    def _collected(self) -> list[_Stream]:
        found: dict[str, _Stream] = {}
        for name, form in self._forms.items():
            root = self._root(name)
            stream = found.setdefault(root, _Stream(key=root, channels=form.channels))
            stream.reason = stream.reason or self._reasons.get(name, "")
        for layer in self._layers.values():
            found[self._root(layer.output)].writers.append(layer)
            if layer.input in self._forms:
                found[self._root(layer.input)].readers.append(layer)
        return list(found.values())


def _reads(layer: Layer, form: _Form) -> bool:
    """Whether each channel of ``form`` is one input of ``layer``, or some in a row."""
    if layer.operator == "Conv":
        return form.rank == len(layer.shape)
    inputs = layer.shape[1 - layer.channel_axis]
    fits = inputs % form.channels == 0 if form.flat else inputs == form.channels
    return fits and not form.rank


class _Work:
    """Factors of all streams, found by turns: a layer's weights belong to two of them."""

    def __init__(self, model: Any, streams: list[_Stream], *, settings: EqualizeSettings) -> None:
        self._model, self._streams, self._settings = model, streams, settings
        self.factors = {stream.key: np.ones(stream.channels) for stream in streams}
        self._magnitudes: dict[str, Array] = {}
        reads = {layer.name: stream.channels for stream in streams for layer in stream.readers}
        for layer in (layer for stream in streams for layer in (*stream.readers, *stream.writers)):
            self._magnitudes[layer.name] = self._read(layer, reads.get(layer.name))

    def _read(self, layer: Layer, channels: int | None) -> Array:
        """Largest weight between each pair of channels, ``[groups, outputs, input channels]``."""
        rows = np.abs(layer.rows(read_array(self._model, layer.weight)))
        inputs = rows.shape[2] if channels is None else channels // layer.groups
        largest: Array = rows.reshape(*rows.shape[:2], inputs, -1).max(axis=3)
        return largest.astype(np.float64)

    def settle(self) -> int:
        """Sweep until no factor moves; return the number of sweeps."""
        for sweep in range(1, self._settings.sweeps + 1):
            moves = [self._move(stream) for stream in self._streams]
            if max(moves, default=0.0) <= self._settings.tolerance:
                return sweep
        return self._settings.sweeps

    def _move(self, stream: _Stream) -> float:
        """Change the factors of one stream; return the largest logarithm of a change."""
        limit = self._settings.limit
        wanted = self.factors[stream.key] * self._balance(stream)
        move = np.clip(wanted, 1 / limit, limit) / self.factors[stream.key]
        self.factors[stream.key] *= move
        for layer in stream.writers:
            magnitudes = self._magnitudes[layer.name]
            magnitudes /= move.reshape(layer.groups, -1, 1)
        for layer in stream.readers:
            magnitudes = self._magnitudes[layer.name]
            magnitudes *= move.reshape(layer.groups, 1, -1)
        return float(np.abs(np.log(move)).max())

    def _balance(self, stream: _Stream) -> Array:
        """``sqrt(r1 / r2)`` of the ranges before and after (equation 11 of the paper)."""
        before = [self._magnitudes[layer.name].max(axis=2).ravel() for layer in stream.writers]
        after = [self._magnitudes[layer.name].max(axis=1).ravel() for layer in stream.readers]
        left, right = np.max(before, axis=0), np.max(after, axis=0)
        alive = (left > 0) & (right > 0)
        balance: Array = np.sqrt(np.where(alive, left, 1.0) / np.where(alive, right, 1.0))
        return balance


def _apply(model: Any, streams: Iterable[_Stream], factors: Mapping[str, Array]) -> None:
    """Scale weights and biases; each weight once, whatever streams it belongs to."""
    outputs: dict[str, Array] = {}
    inputs: dict[str, Array] = {}
    layers: dict[str, Layer] = {}
    for stream in streams:
        layers |= {layer.name: layer for layer in (*stream.writers, *stream.readers)}
        outputs |= {layer.name: factors[stream.key] for layer in stream.writers}
        inputs |= {layer.name: factors[stream.key] for layer in stream.readers}
    for name, layer in layers.items():
        _scale(model, layer, divisor=outputs.get(name), factor=inputs.get(name))


def _scale(model: Any, layer: Layer, *, divisor: Array | None, factor: Array | None) -> None:
    rows = layer.rows(read_array(model, layer.weight)).astype(np.float64)
    if factor is not None:
        grouped = rows.reshape(*rows.shape[:2], len(factor) // layer.groups, -1)
        rows = (grouped * factor.reshape(layer.groups, 1, -1, 1)).reshape(rows.shape)
    if divisor is not None:
        rows = rows / divisor.reshape(layer.groups, -1, 1)
        _divide_bias(model, layer, divisor)
    write_array(model, layer.weight, layer.stored(rows.astype(np.float32)))


def _divide_bias(model: Any, layer: Layer, divisor: Array) -> None:
    if layer.bias:
        name = own_bias(model, layer)
        write_array(model, name, (read_array(model, name) / divisor).astype(np.float32))
