"""How long a model would take at other widths: an estimate, from measured layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from equipoise.compress.latency.operators import nodes_of
from equipoise.compress.latency.shapes import (
    WEIGHT_BYTES,
    channels_of,
    output_values,
    resized,
    weight_values,
)
from equipoise.compress.latency.surface import Surface, surface_of
from equipoise.compress.latency.table import LayerTable
from equipoise.compress.structure import Layer, LayerShape, Structure
from equipoise.errors import InputError, UsageError

Rest = Literal["none", "outputs", "warmer", "scaled"]
"""What is done with the difference between a whole model and its layers.

``none``: no whole model was measured. ``outputs``: it is shared among the layers by how much they
give out, and follows that, for what is left is work on single values: normalisations, activation
functions, sums. ``warmer``: the layers took longer alone, as though less of them had been in the
caches, so that every model counts as one that reads less. ``scaled``: even then they took longer,
and all are scaled down.
"""


_EXACT: Final = 1.001

Cost = NDArray[np.float64]
"""[..., working sets + 1]: milliseconds for each working set, and bytes of weights."""


class Estimator:
    """Estimated latency of a model at other widths.

    A narrower model has less to read, so more of it stays in the caches, and each of its layers
    takes less time than the same layer in a larger model. So layers are measured between models of
    several sizes, and their time is taken between those, linearly in the logarithm of the bytes.

    Args:
        table: Measured layers, of ``structure`` or of one that it was cut from.
        structure: Groups and layers at full width.
        whole_ms: Measured latency of the whole model at full width; that of the table when None.
        whole_nodes: Nodes that the runtime runs of it, as the record of its engine counts them;
            those of the table when None.

    Attributes:
        structure: As given.
        rest: What is done with the difference between the whole and its layers.
        rest_ms: That difference, negative where the layers took longer alone.
        call_ms: What a call takes by itself, at any width.
        start_ms: What the nodes outside of the layers take before they begin, at any width.
        full_ms: Estimate at full width; ``whole_ms`` where there is one.

    Raises:
        InputError: The table lacks a layer at full width, or ``whole_ms`` is shorter than a call.
    """

    def __init__(
        self,
        table: LayerTable,
        structure: Structure,
        *,
        whole_ms: float | None = None,
        whole_nodes: int | None = None,
    ) -> None:
        self.structure = structure
        self.call_ms = table.call_ms.value
        self._widths = {group.name: group.width for group in structure.groups}
        self._surfaces = _surfaces(table, structure.layers)
        self._sets = np.log2(np.maximum(table.working_sets, 1))
        self._steps = np.arange(len(self._sets), dtype=np.float64)
        self._shift = 0.0
        self._bytes = WEIGHT_BYTES[table.precision]
        self._blocks = len({layer.block for layer in structure.layers if layer.block >= 0})
        self._scale, self._rest_per_value = 1.0, 0.0
        self._known: dict[tuple[int, int, int], Cost] = {}
        self.rest: Rest = "none"
        self.rest_ms = 0.0
        measured = table.whole_ms.value if whole_ms is None and table.whole_ms else whole_ms
        self.start_ms = 0.0
        if measured is not None:
            nodes = table.whole_nodes if whole_nodes is None else whole_nodes
            self._fit(measured, start_ms=_start_ms(table, structure, nodes=nodes))
        self.full_ms = self.latency_ms({})

    def _fit(self, whole_ms: float, *, start_ms: float) -> None:
        """Let the estimate at full width be what was measured."""
        left = whole_ms - self.call_ms
        if left <= 0:
            raise InputError(
                f"the whole model takes {whole_ms:.4f} ms, and a call of nothing {self.call_ms:.4f}"
            )
        self.start_ms = start_ms if start_ms < left else 0.0
        left -= self.start_ms
        costs = self._sum({}, None)
        self.rest_ms = left - float(self.total_ms(costs) - self.call_ms - self.start_ms)
        if self.rest_ms >= 0:
            values = sum(output_values(layer.shape) for layer in self.structure.layers)
            self.rest, self._rest_per_value = "outputs", self.rest_ms / values
        else:
            self._take_off(costs, left)
        self._known.clear()

    def _take_off(self, costs: Cost, left: float) -> None:
        """Count every model as one that reads less; what that does not explain is scaled."""
        times = np.maximum.accumulate(costs[:-1])
        place = np.log2(max(costs[-1], 1.0))
        self._shift = float(min(0.0, np.interp(left, times, self._sets) - place))
        layers = float(self.total_ms(costs)) - self.call_ms - self.start_ms
        self.rest = "warmer"
        if layers > left * _EXACT:
            self.rest, self._scale = "scaled", left / layers

    def layer(self, index: int, widths: Mapping[str, int]) -> Cost:
        """Milliseconds of one layer with its part of the rest, and the bytes of its weights.

        Args:
            index: Of the layer in the structure.
            widths: Group -> width; a group that is not there keeps its width.

        Returns:
            float64 [working sets + 1]: milliseconds for each working set, and bytes.
        """
        inputs, outputs = channels_of(self.structure.layers[index], widths)
        key = (index, inputs, outputs)
        if key not in self._known:
            self._known[key] = self._layer(index, inputs, outputs)
        return self._known[key]

    def _layer(self, index: int, inputs: int, outputs: int) -> Cost:
        shape = resized(self.structure.layers[index], inputs=inputs, outputs=outputs)
        rest = self._rest_per_value * output_values(shape)
        times = self._scale * self._surfaces[index].at(inputs, outputs) + rest
        return np.append(times, self._bytes * weight_values(shape))

    def total_ms(self, costs: Cost) -> Cost:
        """Milliseconds of models whose layers have these costs, the call with it.

        Args:
            costs: float64 [..., working sets + 1]: sums over layers of what :meth:`layer` gives.

        Returns:
            float64 [...].
        """
        read = np.log2(np.maximum(costs[..., -1:], 1)) + self._shift
        places = np.interp(read, self._sets, self._steps)
        below = np.minimum(places.astype(np.int64), max(len(self._sets) - 2, 0))
        above = np.minimum(below + 1, len(self._sets) - 1)
        share = places - below
        times = np.take_along_axis(costs, below, -1) * (1 - share)
        times += np.take_along_axis(costs, above, -1) * share
        found: Cost = self.call_ms + self.start_ms + times[..., 0]
        return found

    def latency_ms(self, widths: Mapping[str, int], *, blocks: int | None = None) -> float:
        """Estimated milliseconds of the model.

        Args:
            widths: Group -> width; a group that is not there keeps its width.
            blocks: Transformer layers that are kept; all when None. Which ones does not matter: the
                mean over all of them is taken for each.

        Raises:
            UsageError: There is no such group, a width is not between 1 and the full width, or
                ``blocks`` is not between 0 and what the model has.
        """
        self._check(widths, blocks)
        gone = self._start_in_blocks * (1 - self._share(blocks))
        return float(self.total_ms(self._sum(widths, blocks))) - gone

    def layers_ms(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Name of each layer -> its milliseconds with its part of the rest, in that model."""
        whole, fixed = self._sum(widths, None), self.call_ms + self.start_ms
        layers = enumerate(self.structure.layers)
        costs = {layer.name: self.layer(index, widths) for index, layer in layers}
        alike = {name: np.append(cost[:-1], whole[-1]) for name, cost in costs.items()}
        return {name: float(self.total_ms(cost)) - fixed for name, cost in alike.items()}

    @property
    def _start_in_blocks(self) -> float:
        """Of the nodes outside of the layers, as many are in the blocks as of the layers."""
        layers = self.structure.layers
        return self.start_ms * sum(layer.block >= 0 for layer in layers) / len(layers)

    def _share(self, blocks: int | None) -> float:
        return 1.0 if blocks is None or not self._blocks else blocks / self._blocks

    def _sum(self, widths: Mapping[str, int], blocks: int | None) -> Cost:
        share = self._share(blocks)
        total = np.zeros(len(self._sets) + 1)
        for index, layer in enumerate(self.structure.layers):
            total += self.layer(index, widths) * (share if layer.block >= 0 else 1.0)
        return total

    def _check(self, widths: Mapping[str, int], blocks: int | None) -> None:
        for name, width in widths.items():
            if name not in self._widths:
                raise UsageError(f"unknown group {name!r}; known: {', '.join(self._widths)}")
            if not 1 <= width <= self._widths[name]:
                raise UsageError(
                    f"group {name!r} cannot have {width} channels; allowed: 1 to"
                    f" {self._widths[name]}"
                )
        if blocks is not None and not 0 <= blocks <= self._blocks:
            raise UsageError(f"{blocks} blocks cannot be kept; the model has {self._blocks}")


def _start_ms(table: LayerTable, structure: Structure, *, nodes: int) -> float:
    """What those of ``nodes`` that are not in the layers take before they begin."""
    shapes = (layer.shape for layer in structure.layers)
    inside = sum(nodes_of(shape, precision=table.precision) for shape in shapes)
    return max(0, nodes - inside) * table.node_ms


def _surfaces(table: LayerTable, layers: Sequence[Layer]) -> list[Surface]:
    """A surface for each layer; layers of one form share it."""
    measured = {each.shape: each.latency_ms for each in table.layers}
    made: dict[tuple[LayerShape, bool, bool], Surface] = {}
    surfaces = []
    for layer in layers:
        same = layer.input_group == layer.output_group != ""
        form = (layer.shape, layer.depthwise, same)
        if form not in made:
            made[form] = surface_of(layer, measured)
        surfaces.append(made[form])
    return surfaces


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A whole model that was measured.

    Attributes:
        widths: Group -> width; a group that is not there has its full width.
        latency_ms: Measured milliseconds.
        blocks: Transformer layers that it has; all when None.
    """

    widths: dict[str, int]
    latency_ms: float
    blocks: int | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """An estimate beside what was measured.

    Attributes:
        measured: The model.
        estimated_ms: Estimated milliseconds.
        error: Estimate over measurement, less one.
    """

    measured: Measured
    estimated_ms: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Estimates beside measurements of whole models.

    Attributes:
        checks: One per model.
        median_error: Median of the absolute errors.
        worst_error: The largest of them.
        rest: What was done with the difference between the whole and its layers.
    """

    checks: tuple[Check, ...]
    median_error: float
    worst_error: float
    rest: Rest


def validate(estimator: Estimator, models: Sequence[Measured]) -> Validation:
    """Compare estimates with measured whole models.

    Raises:
        InputError: There is no model, or a measurement is not positive.
        UsageError: The widths of one do not fit.
    """
    if not models or min(model.latency_ms for model in models) <= 0:
        raise InputError("an estimate is checked on models whose measured latency is positive")
    checks = []
    for model in models:
        estimated = estimator.latency_ms(model.widths, blocks=model.blocks)
        error = estimated / model.latency_ms - 1
        checks.append(Check(measured=model, estimated_ms=estimated, error=error))
    errors = [abs(check.error) for check in checks]
    return Validation(
        checks=tuple(checks),
        median_error=float(np.median(errors)),
        worst_error=max(errors),
        rest=estimator.rest,
    )
