"""Latency of one layer over its numbers of inputs and outputs, from the points of a table."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.compress.latency.shapes import is_tied, resized
from equipoise.compress.structure import Layer, LayerShape
from equipoise.errors import InputError
from equipoise.measure.interval import Interval

Grid = NDArray[np.float64]
"""Milliseconds."""

Points = Mapping[tuple[int, int], tuple[Interval, ...]]
"""(inputs, outputs) -> milliseconds for each working set."""


class Surface:
    """Milliseconds of a layer, bilinear between measured points and level beyond them.

    Multiply-accumulates, weights and activations of a layer are bilinear in inputs and outputs, and
    so is the time as far as it follows them.

    Args:
        inputs: Measured numbers of inputs, rising.
        outputs: Measured numbers of outputs, rising; one where they follow the inputs.
        latency_ms: float64 [inputs, outputs, working sets]: milliseconds at each pair.
    """

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], latency_ms: Grid) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._latency_ms = latency_ms
        self._known: dict[tuple[int, int], Grid] = {}

    def at(self, inputs: int, outputs: int) -> Grid:
        """Milliseconds at ``inputs`` and ``outputs``, float64 [working sets]."""
        key = (inputs, outputs)
        if key not in self._known:
            self._known[key] = self._interpolated(inputs, outputs)
        return self._known[key]

    def _interpolated(self, inputs: int, outputs: int) -> Grid:
        row, down = _place(self._inputs, inputs)
        column, across = _place(self._outputs, outputs)
        below, beside = min(row + 1, len(self._inputs) - 1), min(column + 1, len(self._outputs) - 1)
        first = (
            self._latency_ms[row, column] * (1 - across) + self._latency_ms[row, beside] * across
        )
        last = (
            self._latency_ms[below, column] * (1 - across)
            + self._latency_ms[below, beside] * across
        )
        found: Grid = first * (1 - down) + last * down
        return found


def _place(axis: tuple[int, ...], value: int) -> tuple[int, float]:
    """Index of the point below ``value``, and the share of the way to the next."""
    index = bisect.bisect_right(axis, value) - 1
    if index < 0 or index >= len(axis) - 1:
        return min(max(index, 0), len(axis) - 1), 0.0
    return index, (value - axis[index]) / (axis[index + 1] - axis[index])


def surface_of(layer: Layer, measured: Mapping[LayerShape, tuple[Interval, ...]]) -> Surface:
    """The surface of ``layer`` from a table.

    Args:
        layer: A layer at full width.
        measured: Milliseconds by shape, for each working set.

    Raises:
        InputError: The table has no measurement of the layer at full width.
    """
    shape = layer.shape
    points = {
        (each.inputs, each.outputs): latency
        for each, latency in measured.items()
        if each.kind == shape.kind and each.size == shape.size and _belongs(each, layer)
    }
    if (shape.inputs, shape.outputs) not in points:
        raise InputError(
            f"the table has no measurement of layer {layer.name!r} as it is: {shape}",
            hint="Measure the shapes that shapes_of() lists for this structure.",
        )
    if is_tied(layer):
        line = sorted(points)
        return Surface(
            tuple(inputs for inputs, _ in line),
            (shape.outputs,),
            _grid(points, [[p] for p in line]),
        )
    inputs, outputs = _rectangle(points, keep=(shape.inputs, shape.outputs))
    return Surface(inputs, outputs, _grid(points, [[(i, o) for o in outputs] for i in inputs]))


def _belongs(shape: LayerShape, layer: Layer) -> bool:
    """Whether ``shape`` is ``layer`` at some width up to its own."""
    full = layer.shape
    if shape.inputs > full.inputs or shape.outputs > full.outputs:
        return False
    if is_tied(layer) and shape.inputs * full.outputs != shape.outputs * full.inputs:
        return False
    return shape == resized(layer, inputs=shape.inputs, outputs=shape.outputs)


def _rectangle(points: Points, *, keep: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Inputs and outputs such that every pair was measured.

    Points of other layers of the same form may lie between; the row or column with most missing is
    left out until none is.
    """
    inputs, outputs = sorted({i for i, _ in points}), sorted({o for _, o in points})
    while True:
        rows = {i: sum((i, o) not in points for o in outputs) for i in inputs}
        columns = {o: sum((i, o) not in points for i in inputs) for o in outputs}
        row = max(inputs, key=lambda i: (i != keep[0], rows[i] / len(outputs)))
        column = max(outputs, key=lambda o: (o != keep[1], columns[o] / len(inputs)))
        if not any(rows.values()):
            return tuple(inputs), tuple(outputs)
        if column == keep[1] or (
            row != keep[0] and rows[row] / len(outputs) >= columns[column] / len(inputs)
        ):
            inputs.remove(row)
        else:
            outputs.remove(column)


def _grid(points: Points, pairs: list[list[tuple[int, int]]]) -> Grid:
    """[inputs, outputs, working sets]: monotone as far as the intervals let it be."""
    value, low, high = (
        np.array([[[getattr(i, part) for i in points[pair]] for pair in row] for row in pairs])
        for part in ("value", "low", "high")
    )
    smooth = np.stack([monotone(each) for each in np.moveaxis(value, 2, 0)], axis=2)
    return np.clip(smooth, low, high)


def monotone(values: Grid) -> Grid:
    """``values`` made rising along both axes, columns first and then rows.

    Least squares along a line is ``max, i <= k, of min, j >= k, of mean(x[i..j])`` (Robertson,
    Wright and Dykstra, Order Restricted Statistical Inference, 1988, section 1.4). As that keeps
    the order between two lines, the second pass does not undo the first.

    Args:
        values: float64 [inputs, outputs].
    """
    columns = np.apply_along_axis(_rising, 0, values)
    rows: Grid = np.apply_along_axis(_rising, 1, columns)
    return rows


def _rising(line: NDArray[Any]) -> NDArray[Any]:
    sums = np.concatenate([[0.0], np.cumsum(line)])
    count = len(line)
    means = np.full((count, count), np.inf)  # [i, j]: mean of line[i..j]
    for first in range(count):
        lengths = np.arange(1, count - first + 1)
        means[first, first:] = (sums[first + 1 :] - sums[first]) / lengths
    least = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]  # over j >= k
    return np.array([least[: k + 1, k].max() for k in range(count)])
