"""Static int8: from a float graph, statistics and a few real samples to a graph of Q/DQ pairs.

In order: which nodes, what to do about unlike channels, the grids of activations, those of weights
and their rounding, and the pairs themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from equipoise import onnxio
from equipoise.quantize import treatment as remedy
from equipoise.quantize.bias import expected_shifts, subtract_shifts
from equipoise.quantize.clip import weight_reach
from equipoise.quantize.grids import (
    INTEGERS,
    Grid,
    activation_grid,
    power_of_two_above,
    weight_grid,
)
from equipoise.quantize.histogram import Histogram
from equipoise.quantize.layers import Layer, find_layers, read_array
from equipoise.quantize.nodes import MOVES_VALUES, FloatNode, connected, integer_nodes
from equipoise.quantize.observe import observing
from equipoise.quantize.outliers import split_outliers
from equipoise.quantize.qdq import IntegerWeight, Placement, write_qdq
from equipoise.quantize.ranges import Bounds, MinMax, choose_range, expected_errors
from equipoise.quantize.rounding import (
    RoundingSettings,
    SecondMoments,
    round_to_moments,
    share_moments,
)
from equipoise.quantize.saturation import saturation
from equipoise.quantize.schemes import StaticInt8
from equipoise.quantize.smooth import smooth
from equipoise.quantize.statistics import TensorStatistics
from equipoise.spec import Array, Feeds
from equipoise.targets.profile import Int8Scheme

_POSITIONS: Final = 1024
"""Values of each activation that a treatment is weighed on, over all samples."""

_TREATED_SAMPLES: Final = 32

_SATURATION_DB: Final = 44.0
"""Rounding to 8 bits leaves about 43 dB of a layer's output, to 7 bits 37 dB. By power alone 38 dB
would be where saturation costs as much as the bit; but its errors all go one way and do not average
out, and held-out inputs saturate more: benchmarks/saturation.py predicts 21.8 dB of
EfficientNet-Lite0 with this, and predicted 20.4 dB with 38."""

_SATURATION_SAMPLES: Final = 8
_INT8_MOST: Final = 255
_PRODUCTS: Final = frozenset({"Gemm", "MatMul"})
"""Operators that give float out when anything but integers reads them."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A float graph that is ready to be quantised, and the grids that it will take.

    Attributes:
        model: Float ``onnx.ModelProto``, with treatments.
        placement: All that quantising adds.
        shifts: Layer -> what its bias loses when it runs in integers, per channel.
        kept: Nodes that stay in float, with the reason.
        treatments: What was done about unlike channels.
        notes: What a user should know, in words.
    """

    model: Any
    placement: Placement
    shifts: Mapping[str, Array]
    kept: tuple[FloatNode, ...]
    treatments: tuple[remedy.Treatment, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What is known of the activations.

    Attributes:
        statistics: Activation -> what calibration saw.
        rows: Calibration samples.
        ranges: Activation -> a range that was chosen before, instead of one from the statistics.
        threads: Threads per operator.
    """

    statistics: Mapping[str, TensorStatistics]
    rows: Sequence[Feeds]
    ranges: Mapping[str, Bounds] = field(default_factory=dict)
    threads: int = 1


def prepare_static(
    model: Any, calibrated: Calibrated, *, scheme: Int8Scheme, settings: StaticInt8
) -> Prepared:
    """Decide everything about static int8 of ``model``; change it where a treatment does.

    Args:
        model: Float ``onnx.ModelProto`` with named nodes; changed in place.
        calibrated: What is known of its activations.
        scheme: How the target wants its integers.
        settings: How to quantise.
    """
    return _Static(model, calibrated, scheme=scheme, settings=settings).prepare()


def written(prepared: Prepared, *, without: Iterable[str] = ()) -> Any:
    """A new ``onnx.ModelProto`` with the pairs of ``prepared``, but for the nodes ``without``.

    What joined those nodes to others goes back to float with them.
    """
    nodes = connected(prepared.model, prepared.placement.nodes - set(without))
    return _with_pairs(prepared, nodes)


def written_alone(prepared: Prepared, name: str) -> Any:
    """A new ``onnx.ModelProto`` with one node of ``prepared`` in integers."""
    return _with_pairs(prepared, frozenset({name}))


def _with_pairs(prepared: Prepared, nodes: frozenset[str]) -> Any:
    model = onnxio.copied(prepared.model)
    subtract_shifts(model, {name: s for name, s in prepared.shifts.items() if name in nodes})
    write_qdq(model, replace(prepared.placement, nodes=nodes))
    return model


class _Static:
    """The decisions about one model, in their order."""

    def __init__(
        self, model: Any, calibrated: Calibrated, *, scheme: Int8Scheme, settings: StaticInt8
    ) -> None:
        self._model, self._calibrated = model, calibrated
        self._scheme, self._settings = scheme, settings
        self._bits = settings.weight_bits or 8
        self._choice = integer_nodes(
            model, calibrated.statistics, scheme=scheme, float_nodes=settings.float_nodes
        )

    def prepare(self) -> Prepared:
        treatments, ranges = self._treat()
        grids = self._grids(ranges)
        moments = self._moments(grids)
        placement = self._placement(grids, moments, narrow=())
        notes: tuple[str, ...] = ()
        if self._scheme.saturates and self._settings.weight_bits is None:
            narrow = self._saturating(placement)
            placement = self._placement(grids, moments, narrow=narrow)
            notes = _narrow_notes(narrow)
        return Prepared(
            model=self._model,
            placement=placement,
            shifts=self._shifts(moments, placement),
            kept=self._choice.kept,
            treatments=treatments,
            notes=notes,
        )

    # Unlike channels.

    def _treat(self) -> tuple[tuple[remedy.Treatment, ...], dict[str, Bounds]]:
        """Treat the activations of products; return the ranges of what is new or other then."""
        groups = self._product_groups()
        remedies = self._settings.remedies
        if not groups or not (remedies.smoothing or remedies.outliers or remedies.clipping):
            return (), {}
        values = self._some_values(tuple(groups))
        treatments: list[remedy.Treatment] = []
        ranges: dict[str, Bounds] = {}
        for name, layers in groups.items():
            product = self._product(layers, values[name])
            chosen = remedy.choose_treatment(
                product,
                grid=self._grid,
                bits=self._bits,
                remedies=remedies,
                per_channel=self._is_per_channel("MatMul"),
            )
            treatments.append(chosen)
            ranges |= self._apply(layers, product, chosen)
        return tuple(treatments), ranges

    def _product_groups(self) -> dict[str, list[Layer]]:
        """Activation -> the MatMul layers in integers that read it, where it comes in float."""
        groups: dict[str, list[Layer]] = {}
        rounded = self._rounded()
        for layer in find_layers(self._model):
            seen = self._calibrated.statistics.get(layer.input)
            channels = None if seen is None else seen.channels
            is_product = layer.operator == "MatMul" and layer.name in self._choice.nodes
            if layer.input in rounded:
                continue
            if is_product and channels is not None and len(channels.low) == layer.shape[0]:
                groups.setdefault(layer.input, []).append(layer)
        return groups

    def _rounded(self) -> set[str]:
        """Activations that come from integers on a grid of their own: too late for a remedy."""
        names: set[str] = set()
        for node in self._model.graph.node:
            gives_integers = node.name in self._choice.nodes and node.op_type not in _PRODUCTS
            passes = node.op_type in {"Clip", "Relu"} and node.input[0] in names
            if gives_integers or passes:
                names.update(node.output)
        return names

    def _some_values(self, names: tuple[str, ...]) -> dict[str, Array]:
        """float32 ``[positions, channels]`` of each activation, spread over the samples."""
        rows = self._calibrated.rows
        rows = rows[:: max(1, len(rows) // _TREATED_SAMPLES)]
        each = max(1, _POSITIONS // max(len(rows), 1))
        found: dict[str, list[Array]] = {name: [] for name in names}
        random = np.random.default_rng(0)  # even steps would meet the first token of every text
        with observing(self._model, names, threads=self._calibrated.threads) as observe:
            for feeds in rows:
                for name, array in observe(feeds).items():
                    tokens = array.reshape(-1, array.shape[-1])
                    found[name].append(tokens[random.permutation(len(tokens))[:each]])
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    def _product(self, layers: Sequence[Layer], values: Array) -> remedy.Product:
        name = layers[0].input
        channels = self._calibrated.statistics[name].channels
        assert channels is not None  # noqa: S101  groups hold no other
        weights = [layer.rows(read_array(self._model, layer.weight))[0].T for layer in layers]
        return remedy.Product(
            activation=name,
            values=values,
            low=channels.low.astype(np.float32),
            high=channels.high.astype(np.float32),
            weight=np.concatenate(weights, axis=1),
        )

    def _apply(
        self, layers: Sequence[Layer], product: remedy.Product, chosen: remedy.Treatment
    ) -> dict[str, Bounds]:
        """Put a treatment into the graph; return the ranges of what the layers read and write."""
        after, factors, channels = remedy.treated(
            product, alpha=chosen.alpha, outliers=chosen.outliers
        )
        name = layers[0].input
        if chosen.alpha:
            name = smooth(self._model, layers, factors=factors)
        ranges = {name: remedy.bounds(after, cut=chosen.cut)}
        if chosen.outliers:
            split_outliers(self._model, layers, channels=channels)
            ranges |= _output_ranges(layers, after)
        return ranges

    # Grids.

    def _grid(self, low: float, high: float) -> Grid:
        widened = max(self._scheme.smallest_range - (high - low), 0.0)
        return activation_grid(
            low,
            high + widened,
            dtype=self._scheme.activation,
            symmetric=self._scheme.symmetric,
            power_of_two=self._scheme.power_of_two,
        )

    def _grids(self, ranges: Mapping[str, Bounds]) -> dict[str, Grid]:
        """The grid of every activation that a node in integers may read or write."""
        grids = {name: self._grid(*bounds) for name, bounds in ranges.items()}
        nodes = self._model.graph.node
        clips = {n.input[0]: n.output[0] for n in nodes if n.op_type in {"Clip", "Relu"}}
        for node in nodes:
            if node.name not in self._choice.nodes:
                continue
            names = [*node.input, *node.output, *(clips.get(name, "") for name in node.output)]
            if node.op_type in MOVES_VALUES and node.input[0] in grids:
                grids[node.output[0]] = grids[node.input[0]]
            for name in names:
                if name in self._calibrated.statistics and name not in grids:
                    grids[name] = self._grid(*self._range(name))
        return grids

    def _range(self, name: str) -> Bounds:
        bits = 16 if INTEGERS[self._scheme.activation][1] > _INT8_MOST else 8
        if name in self._calibrated.ranges:
            return self._calibrated.ranges[name]
        seen, method = self._calibrated.statistics[name], self._settings.method
        bounds = choose_range(seen, method, bits=bits, symmetric=self._scheme.symmetric)
        if self._scheme.power_of_two and not isinstance(method, MinMax):
            return _with_fitting_power(bounds, seen.histogram, bits=bits)
        return bounds

    # Weights.

    def _placement(
        self,
        grids: Mapping[str, Grid],
        moments: Mapping[str, SecondMoments],
        *,
        narrow: Sequence[str],
    ) -> Placement:
        weights = {
            layer.weight: self._weight(
                layer, moments.get(layer.name), bits=7 if layer.name in narrow else self._bits
            )
            for layer in self._layers()
        }
        return Placement(
            # A treatment may have come between a node and its integers.
            nodes=connected(self._model, self._choice.nodes),
            activations=grids,
            weights=weights,
            integer_bias=self._scheme.bias == "int32",
            quantize_outputs=self._scheme.quantize_outputs,
            float_products=self._scheme.float_products,
            fuses_adds=self._scheme.fuses_adds,
            absorbs_clips=self._scheme.absorbs_clips,
        )

    def _layers(self) -> list[Layer]:
        return [layer for layer in find_layers(self._model) if layer.name in self._choice.nodes]

    def _weight(self, layer: Layer, moments: SecondMoments | None, *, bits: int) -> IntegerWeight:
        weight = read_array(self._model, layer.weight)
        axis = layer.channel_axis if self._is_per_channel(layer.operator) else None
        reach = self._reach(layer, weight, moments, bits=bits)
        if axis is None:
            reach = reach.max()
        grid = weight_grid(reach, axis=axis, bits=bits, power_of_two=self._scheme.power_of_two)
        if self._scheme.power_of_two:
            grid = _fitting_power(grid, weight)
        if moments is None or self._settings.rounding is None:
            return IntegerWeight(values=grid.quantize(weight), grid=grid)
        rows = round_to_moments(layer.rows(weight), moments.elimination, grid=grid)
        return IntegerWeight(values=layer.stored(rows), grid=grid)

    def _reach(
        self, layer: Layer, weight: Array, moments: SecondMoments | None, *, bits: int
    ) -> Array:
        """How far the grid of each output channel reaches; errors count by what inputs carry."""
        power = None if moments is None else np.maximum(moments.power, 0.0)
        method = self._settings.weight_ranges
        return weight_reach(layer.rows(weight), method=method, bits=bits, power=power)

    def _is_per_channel(self, operator: str) -> bool:
        return self._scheme.per_channel and operator not in self._scheme.per_tensor

    def _moments(self, grids: Mapping[str, Grid]) -> dict[str, SecondMoments]:
        """Layer -> second moments of what it reads, as it comes back from its grid."""
        settings = self._settings
        if settings.rounding is None and not settings.bias_correction:
            return {}
        rounding = settings.rounding or RoundingSettings()
        shared = share_moments(self._layers(), settings=rounding)
        by_input: dict[str, dict[int, SecondMoments]] = {}
        for layer in self._layers():
            moments = shared[layer.name]
            by_input.setdefault(layer.input, {})[id(moments)] = moments
        rows = self._calibrated.rows
        names = tuple(by_input)
        with observing(self._model, names, threads=self._calibrated.threads) as observe:
            for feeds in rows[:: max(1, len(rows) // rounding.samples)]:
                for name, array in observe(feeds).items():
                    for moments in by_input[name].values():
                        moments.add(array, grid=grids[name])
        return dict(shared)

    def _shifts(
        self, moments: Mapping[str, SecondMoments], placement: Placement
    ) -> dict[str, Array]:
        """Layer -> the mean error of its outputs. In products between norms it changes nothing."""
        if not self._settings.bias_correction:
            return {}
        means = {
            layer.name: moments[layer.name].mean
            for layer in self._layers()
            if layer.operator != "MatMul"
        }
        return expected_shifts(self._model, means, weights=placement.weights)

    # Saturation.

    def _saturating(self, placement: Placement) -> tuple[str, ...]:
        """Layers that lose more to 16-bit sums than to a bit less in their weights."""
        rows = self._calibrated.rows
        some = rows[:: max(1, len(rows) // _SATURATION_SAMPLES)][:_SATURATION_SAMPLES]
        trial = onnxio.copied(self._model)
        write_qdq(trial, placement)
        found = saturation(trial, some, threads=self._calibrated.threads)
        return tuple(s.name for s in found if s.sqnr_db is not None and s.sqnr_db < _SATURATION_DB)


def _output_ranges(layers: Sequence[Layer], product: remedy.Product) -> dict[str, Bounds]:
    """Output of each layer of a product -> its range on the values that are at hand."""
    outputs = product.values @ product.weight
    ends = np.cumsum([layer.channels for layer in layers])[:-1]
    parts = np.split(outputs, ends, axis=1)
    return {
        layer.output: (float(part.min()), float(part.max()))
        for layer, part in zip(layers, parts, strict=True)
    }


def _fitting_power(grid: Grid, weight: Array) -> Grid:
    """The grid or the one with half its scale: clipping a few weights may cost less than a bit."""
    halved = replace(grid, scale=grid.scale / 2)
    errors = [float(np.square(one.round(weight) - weight).sum()) for one in (grid, halved)]
    return halved if errors[1] < errors[0] else grid


def _with_fitting_power(bounds: Bounds, histogram: Histogram, *, bits: int) -> Bounds:
    """The best symmetric range among those whose scale is a power of two near that of ``bounds``.

    A range that was chosen with any scale allowed loses up to a bit when its scale is raised.
    """
    if bounds[1] == 0:
        return bounds
    most = 2 ** (bits - 1) - 1
    above = power_of_two_above(np.array(bounds[1] / most))
    reach = above * np.array([1.0, 0.5]) * most
    errors = expected_errors(histogram, -reach * (most + 1) / most, reach, bits=bits)
    best = float(reach[errors.argmin()])
    return -best, best


def _narrow_notes(narrow: Sequence[str]) -> tuple[str, ...]:
    if not narrow:
        return ("no layer saturates on this target: all weights keep 8 bits",)
    shown = ", ".join(narrow[:3]) + (", ..." if len(narrow) > 3 else "")
    return (f"7-bit weights in {len(narrow)} layers whose 16-bit sums would overflow ({shown})",)
