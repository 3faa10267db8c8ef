"""The grids of a quantised graph, module by module, for training that feels their rounding.

The Q/DQ pairs of the static int8 file are read, so that what is trained is what will run. Remedies
that rewrite the graph, and roundings that depend on the weights as they were, are left out of a
file that is made for it: training takes their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, onnxio
from equipoise.data.store import Rows
from equipoise.errors import RecipeError, SourceError
from equipoise.provenance import module_paths
from equipoise.quantize.grids import INTEGERS
from equipoise.quantize.layers import LAYERS, Layer, find_layers, read_array
from equipoise.quantize.ranges import ChosenRanges, MinMax, data_sha256
from equipoise.quantize.schemes import StaticInt8
from equipoise.quantize.static import Calibrated, prepare_static, written
from equipoise.quantize.statistics import read_statistics
from equipoise.quantize.treatment import Remedies
from equipoise.sources.module_grids import (
    ActivationGrid,
    ModuleGrid,
    ModuleRanges,
    Skipped,
    WeightForm,
    write_module_ranges,
)
from equipoise.spec import Array
from equipoise.targets.profile import Int8Scheme

RANGES_FILE: Final = "ranges.json"
_PAIR: Final = frozenset({"DequantizeLinear", "QuantizeLinear"})
_WEIGHT: Final = ".weight"
_WRAPPER: Final = "inner."
_NARROW_MOST: Final = 63
_WHOLE: Final = 1e-4
"""A reach that is the largest weight's but for rounding."""


@dataclass(frozen=True, kw_only=True)
class ModuleRangesConfig:
    """What to read grids from.

    Attributes:
        model: Float ONNX file, as exported.
        scheme: How the target wants its integers.
        samples: Directory of calibration inputs.
        statistics: Directory that ``calibrate`` wrote; needed where ``quantized`` is not given.
        settings: How static int8 is to be made; what :func:`as_trained` says is left out.
        quantized: A static int8 file that was made from ``model``; None makes one.
        threads: Threads per operator.
    """

    model: Path
    scheme: Int8Scheme
    samples: Path
    statistics: Path | None = None
    settings: StaticInt8 = field(default_factory=StaticInt8)
    quantized: Path | None = None
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class ModuleRangesRecord:
    """What was found.

    Attributes:
        file: Name of the file with the ranges in the output directory.
        modules: Number of modules that compute in integers.
        skipped: Nodes whose rounding, or staying in float, no module can be told.
        notes: What a user should know, in words.
    """

    file: str
    modules: int
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


def module_ranges(config: ModuleRangesConfig, *, output: Path) -> ModuleRangesRecord:
    """Write the grids of each module of ``config.model`` under static int8.

    Raises:
        SourceError: A file is no ONNX file, or ``quantized`` was not made from ``model``.
        RecipeError: No module with weights computes in integers, or there are no statistics.
        DataError: The statistics cannot be read.
    """
    model = _prepared(config)
    quantized = _quantized(model, config)
    reader = _Reader(model, quantized, scheme=config.scheme)
    ranges = replace(reader.read(), model_sha256=fs.sha256_file(config.model))
    if not ranges.modules:
        reasons = "; ".join(sorted({one.reason for one in ranges.skipped})) or "it has no weights"
        raise RecipeError(
            f"no module of {config.model} computes in integers: {reasons}",
            hint="Fake quantisation needs convolutions or products with constant weights.",
        )
    write_module_ranges(output / RANGES_FILE, ranges)
    return ModuleRangesRecord(
        file=RANGES_FILE,
        modules=len(ranges.modules),
        skipped=ranges.skipped,
        notes=_notes(ranges),
    )


def as_trained(settings: StaticInt8) -> StaticInt8:
    """``settings`` without what rewrites a graph or rounds weights in view of each other.

    A model that was trained under fake quantisation has to be quantised with these.
    """
    none = Remedies(smoothing=False, outliers=False, clipping=False)
    return replace(settings, remedies=none, rounding=None, bias_correction=False)


def trained_ranges(ranges: ModuleRanges, *, model: Path, samples: Path) -> ChosenRanges:
    """The ranges that training used, for quantising the export of what was trained.

    Args:
        ranges: Read off the file before training, with the scales that training learned.
        model: Float ONNX file of the trained model, made by the same exporter.
        samples: Directory of calibration inputs.

    Raises:
        SourceError: ``model`` has not the activations that ``ranges`` are of.
    """
    graph = onnxio.load_model(model).graph
    names = {name for node in graph.node for name in node.output}
    names |= {value.name for value in graph.input}
    missing = sorted(set(ranges.activations) - names)
    if missing:
        raise SourceError(
            f"{model} has no activation {missing[0]!r}, and lacks {len(missing)} of the"
            f" {len(ranges.activations)} that were rounded in training",
            hint="Export what was trained with the exporter that the ranges were read with.",
        )
    bits = {INTEGERS[m.input.dtype][1].bit_length() for m in ranges.modules}
    return ChosenRanges(
        model_sha256=fs.sha256_file(model),
        data_sha256=data_sha256(samples),
        method=MinMax(),
        bits=16 if max(bits) > 8 else 8,
        symmetric=any(m.input.symmetric for m in ranges.modules),
        ranges=dict(ranges.activations),
    )


def _prepared(config: ModuleRangesConfig) -> Any:
    """The float model with the names that quantising gives its nodes."""
    model = onnxio.load_model(config.model)
    model = onnxio.raise_opset(model, config.scheme.least_opset)
    onnxio.name_nodes(model)
    return extras.require("onnx").shape_inference.infer_shapes(model)


def _quantized(model: Any, config: ModuleRangesConfig) -> Any:
    if config.quantized is not None:
        return onnxio.load_model(config.quantized)
    if config.statistics is None:
        raise RecipeError(
            "grids need calibrated statistics or a static int8 file, and neither is given",
            hint="Calibrate the model first.",
        )
    calibrated = Calibrated(
        statistics=read_statistics(config.statistics).tensors,
        rows=Rows(config.samples),
        threads=config.threads,
    )
    settings = as_trained(config.settings)
    prepared = prepare_static(
        onnxio.copied(model), calibrated, scheme=config.scheme, settings=settings
    )
    return written(prepared)


class _Reader:
    """Reads grids off one quantised graph, with the float graph that it was made from beside it."""

    def __init__(self, model: Any, quantized: Any, *, scheme: Int8Scheme) -> None:
        self._model, self._quantized, self._scheme = model, quantized, scheme
        self._nodes = {node.name: node for node in quantized.graph.node}
        self._made = {name: node for node in quantized.graph.node for name in node.output}
        self._readers = onnxio.consumers(quantized)
        self._constants = onnxio.initializers(quantized)
        self._float_made = {name: node for node in model.graph.node for name in node.output}
        self._float_constants = onnxio.initializers(model)

    def read(self) -> ModuleRanges:
        self._check_origin()
        paths = module_paths(self._model)
        places = {node.name: paths[i] for i, node in enumerate(self._model.graph.node)}
        layers = {layer.name: layer for layer in find_layers(self._model)}
        found: list[ModuleGrid] = []
        skipped: list[Skipped] = []
        for node in self._model.graph.node:
            if node.op_type not in LAYERS:
                continue
            layer = layers.get(node.name)
            reason = self._unreadable(node) if layer is None else self._reason(layer)
            if layer is None or reason:
                skipped.append(_skipped(node, reason))
            else:
                found.append(self._grid(layer, place=places[node.name]))
        modules, doubled = _told_apart(found)
        return ModuleRanges(
            modules=modules,
            activations=self._activations(),
            skipped=(*skipped, *doubled, *self._between()),
            model_sha256="",
        )

    def _check_origin(self) -> None:
        """Every layer of the float graph has to be there."""
        lacking = [n for n in self._model.graph.node if n.op_type in LAYERS]
        lacking = [node for node in lacking if node.name not in self._nodes]
        if lacking:
            raise SourceError(
                f"the quantised file has no node {lacking[0].name!r}, as the float file has",
                hint="Give the float file that the quantised one was made from.",
            )

    # Why a layer cannot be told to a module.

    def _unreadable(self, node: Any) -> str:
        if len(node.input) > 1 and node.input[1] not in self._float_constants:
            return "a product of two activations"
        return "its weight is shared, is no matrix, or is scaled"

    def _reason(self, layer: Layer) -> str:
        node = self._nodes[layer.name]
        weight = self._made.get(node.input[1])
        if self._pair_before(node.input[0]) is None or weight is None:
            return "it stays in float"
        if weight.op_type != "DequantizeLinear":
            return "its weight is not stored as integers"
        if np.size(self._parameters(self._pair_before(node.input[0]))[0]) > 1:
            return "its input has a grid per channel"
        return self._treated(layer, node)

    def _treated(self, layer: Layer, node: Any) -> str:
        """What was done about unlike channels leaves other weights than the module has."""
        raw = _activation_name(self._pair_before(node.input[0]))
        feeder = self._float_made.get(layer.input)
        smoothed = raw != layer.input or (
            feeder is not None
            and feeder.op_type == "LayerNormalization"
            and self._has_changed(feeder)
        )
        if smoothed:
            return "its weights took up factors of smoothed channels"
        apart = f"{layer.output}.integers" in node.output
        return "some of its channels are computed in float" if apart else ""

    def _has_changed(self, feeder: Any) -> bool:
        names = [n for n in feeder.input[1:] if n in self._float_constants]
        return any(
            name not in self._constants
            or not np.array_equal(read_array(self._model, name), read_array(self._quantized, name))
            for name in names
        )

    # Grids.

    def _grid(self, layer: Layer, *, place: str) -> ModuleGrid:
        node = self._nodes[layer.name]
        output, before_bias = self._output(layer, node)
        bias = self._made.get(node.input[2]) if len(node.input) > 2 else None
        named = _path_of_weight(layer.weight)
        return ModuleGrid(
            node=layer.name,
            module=named or place,
            place=place if named and place != named else "",
            input=self._activation(self._pair_before(node.input[0])),
            output=output,
            output_before_bias=before_bias,
            weight=self._weight(layer, self._made[node.input[1]]),
            integer_bias=bias is not None and bias.op_type == "DequantizeLinear",
            largest=tuple(_largest(self._model, layer).tolist()),
        )

    def _pair_before(self, name: str) -> Any:
        """The QuantizeLinear whose integers ``name`` comes back from; None for a float."""
        back = self._made.get(name)
        if back is None or back.op_type != "DequantizeLinear":
            return None
        pair = self._made.get(back.input[0])
        return pair if pair is not None and pair.op_type == "QuantizeLinear" else None

    def _output(self, layer: Layer, node: Any) -> tuple[ActivationGrid | None, bool]:
        """The grid that the output is rounded to before anyone reads it."""
        after = self._whole_pair(node.output[0])
        before_bias = after is not None and layer.result != layer.output
        if after is None and layer.result != layer.output:
            after = self._whole_pair(layer.result)
        return (None if after is None else self._activation(after)), before_bias

    def _whole_pair(self, name: str) -> Any:
        """The QuantizeLinear that alone reads ``name``; None where someone reads it in float."""
        given_out = {value.name for value in self._quantized.graph.output}
        readers = self._readers.get(name, [])
        alone = len(readers) == 1 and readers[0].op_type == "QuantizeLinear"
        return readers[0] if alone and name not in given_out else None

    def _activation(self, pair: Any) -> ActivationGrid:
        scale, zero_point = self._parameters(pair)
        dtype = str(zero_point.dtype)
        low, high = INTEGERS[dtype]
        return ActivationGrid(
            activation=_activation_name(pair),
            scale=float(scale),
            zero_point=int(zero_point),
            low=low,
            high=high,
            dtype=dtype,
            symmetric=self._scheme.symmetric,
        )

    def _parameters(self, node: Any) -> tuple[Array, Array]:
        scale, zero_point = (read_array(self._quantized, name) for name in node.input[1:3])
        return scale, zero_point

    def _weight(self, layer: Layer, restored: Any) -> WeightForm:
        integers = read_array(self._quantized, restored.input[0])
        scale, _ = self._parameters(restored)
        bits = 7 if np.abs(integers.astype(np.int32)).max(initial=0) <= _NARROW_MOST else 8
        per_channel = scale.size > 1 or (scale.ndim > 0 and layer.channels == 1)
        share = () if self._scheme.power_of_two else self._share(layer, scale, bits=bits)
        return WeightForm(
            bits=bits,
            per_channel=per_channel,
            power_of_two=self._scheme.power_of_two,
            share=share,
        )

    def _share(self, layer: Layer, scale: Array, *, bits: int) -> tuple[float, ...]:
        """How much of the largest weight the grids reach, where less than all."""
        largest = _largest(self._model, layer)
        reach = scale.astype(np.float64).ravel() * (2 ** (bits - 1) - 1)
        largest = largest if scale.size > 1 else largest.max(keepdims=True)
        # A grid may reach further than any weight, to make room for a bias: that is no clipping.
        share = np.minimum(reach / np.where(largest > 0, largest, np.inf), 1.0)
        share = np.where(largest > 0, share, 1.0)
        return () if np.all(share > 1 - _WHOLE) else tuple(share.tolist())

    # The rest of the graph.

    def _activations(self) -> dict[str, tuple[float, float]]:
        pairs = [n for n in self._quantized.graph.node if n.op_type == "QuantizeLinear"]
        plain = [pair for pair in pairs if np.size(self._parameters(pair)[0]) == 1]
        return {grid.activation: grid.bounds for grid in map(self._activation, plain)}

    def _between(self) -> Iterator[Skipped]:
        """Nodes between layers that read and write integers."""
        for node in self._quantized.graph.node:
            if node.op_type in LAYERS | _PAIR:
                continue
            reads = any(self._pair_before(name) is not None for name in node.input)
            writes = any(self._whole_pair(name) is not None for name in node.output)
            if reads and writes:
                reason = "rounds between layers, where no module with weights is"
                yield _skipped(node, reason)


def _skipped(node: Any, reason: str) -> Skipped:
    return Skipped(name=str(node.name), operator=str(node.op_type), reason=reason)


def _told_apart(found: list[ModuleGrid]) -> tuple[tuple[ModuleGrid, ...], list[Skipped]]:
    """Those with a module of their own, and the others."""
    names = [grid.module for grid in found]
    kept, doubled = [], []
    for grid in found:
        if grid.module and names.count(grid.module) == 1:
            kept.append(grid)
            continue
        several = f"{names.count(grid.module)} nodes belong to the module {grid.module!r}"
        reason = several if grid.module else "nothing tells which module it comes from"
        doubled.append(Skipped(name=grid.node, operator="layer", reason=reason))
    return tuple(kept), doubled


def _activation_name(pair: Any) -> str:
    """Name in the float graph; the raw tensor of an output of the graph has another one."""
    return str(pair.name).removesuffix(".QuantizeLinear")


def _path_of_weight(name: str) -> str:
    """``encoder.fc`` from ``inner.encoder.fc.weight``, which most exported weights are called."""
    path = name.removeprefix(_WRAPPER)
    return path.removesuffix(_WEIGHT) if path.endswith(_WEIGHT) and "/" not in path else ""


def _largest(model: Any, layer: Layer) -> Array:
    """float64 ``[channels]``: largest magnitude of the weights of each output channel."""
    rows = layer.rows(read_array(model, layer.weight))
    largest: Array = np.abs(rows).max(axis=2, initial=0.0).ravel().astype(np.float64)
    return largest


def _notes(ranges: ModuleRanges) -> tuple[str, ...]:
    by_reason: dict[str, list[Skipped]] = {}
    for one in ranges.skipped:
        by_reason.setdefault(one.reason, []).append(one)
    return tuple(
        f"not simulated: {len(nodes)} nodes, such as {nodes[0].name} ({reason})"
        for reason, nodes in by_reason.items()
    )
