"""Shapes of layers at other widths, and the grid of them that a table has to hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final, Literal

from equipoise.compress.structure import Group, Layer, LayerShape, Structure
from equipoise.errors import InputError, UsageError

Precision = Literal["float32", "int8"]
"""Of the weights and, where the target's scheme says so, of what goes in and out."""

WEIGHT_BYTES: Final[dict[Precision, int]] = {"float32": 4, "int8": 1}


_NEAR_BYTES: Final = 1 << 19
"""What a second-level cache holds on all but the smallest CPUs."""


def check_shape(shape: LayerShape) -> None:
    """Check that there can be such a layer.

    Raises:
        InputError: A size is not positive, the groups do not divide the channels, a convolution has
            not as many kernel sizes, strides and paddings as axes, or nothing would come out of it.
    """
    numbers = (shape.inputs, shape.outputs, shape.groups, *shape.size, *shape.kernel, *shape.stride)
    if min(numbers) < 1 or not shape.size:
        raise InputError(f"{shape}: every size and number of channels has to be at least 1")
    if shape.inputs % shape.groups or shape.outputs % shape.groups:
        raise InputError(f"{shape}: {shape.groups} groups have to divide inputs and outputs")
    if shape.kind == "conv":
        axes = {len(part) for part in (shape.size, shape.kernel, shape.stride, shape.padding)}
        if len(axes) != 1 or min(output_size(shape)) < 1 or min(shape.padding) < 0:
            raise InputError(f"{shape}: kernel, stride and padding do not fit the size")
    elif len(shape.size) != 1:
        raise InputError(f"{shape}: the size of this kind is the number of positions")


def output_size(shape: LayerShape) -> tuple[int, ...]:
    """Spatial size of what comes out."""
    if shape.kind != "conv":
        return shape.size
    axes = zip(shape.size, shape.kernel, shape.stride, shape.padding, strict=True)
    return tuple((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in axes)


def output_values(shape: LayerShape) -> int:
    """Numbers that come out at batch 1."""
    return shape.outputs * math.prod(output_size(shape))


def weight_values(shape: LayerShape) -> int:
    """Numbers in the weight; none of attention."""
    if shape.kind == "attention":
        return 0
    return shape.outputs * (shape.inputs // shape.groups) * math.prod(shape.kernel)


def structure_bytes(structure: Structure, *, precision: Precision) -> int:
    """Bytes of all weights of the layers: what one inference brings through the caches."""
    weights = sum(weight_values(layer.shape) for layer in structure.layers)
    return weights * WEIGHT_BYTES[precision]


def working_sets_of(structure: Structure, *, precision: Precision) -> tuple[int, ...]:
    """Bytes of the model and of narrower ones, down to an eighth: where weights lie depends on it.

    A model that stays in the nearest caches at any width has one.
    """
    whole = structure_bytes(structure, precision=precision)
    sets = [whole >> halvings for halvings in (3, 2, 1, 0)]
    return tuple(size for size in sets if size > _NEAR_BYTES) or (whole,)


def is_tied(layer: Layer) -> bool:
    """Whether inputs and outputs follow one width, so that one number says the shape."""
    same = layer.input_group == layer.output_group != ""
    return same or layer.depthwise or layer.shape.kind == "attention"


def resized(layer: Layer, *, inputs: int, outputs: int) -> LayerShape:
    """The shape of ``layer`` with other numbers of inputs and outputs.

    The groups of a depthwise convolution follow its inputs, and so do the heads of attention; those
    of any other stay.
    """
    shape = layer.shape
    groups = shape.groups
    if layer.depthwise or shape.kind == "attention":
        groups = max(1, shape.groups * inputs // shape.inputs)
    return replace(shape, inputs=inputs, outputs=outputs, groups=groups)


def channels_of(layer: Layer, widths: Mapping[str, int]) -> tuple[int, int]:
    """Inputs and outputs of ``layer`` at ``widths``; a group that is not there keeps its width."""
    shape = layer.shape
    inputs, outputs = shape.inputs, shape.outputs
    if layer.input_group in widths:
        inputs = widths[layer.input_group] * layer.input_factor
    if layer.output_group in widths:
        outputs = widths[layer.output_group] * layer.output_factor
    if shape.kind == "attention":  # may name one of the two groups alone
        if layer.output_group in widths and layer.input_group not in widths:
            inputs = shape.inputs * outputs // shape.outputs
        outputs = shape.outputs * inputs // shape.inputs
    return inputs, outputs


def grid_of(group: Group, *, multiple: int, points: int) -> tuple[int, ...]:
    """The widths of ``group`` that are measured: evenly spread multiples, and the full width.

    Raises:
        UsageError: ``multiple`` or ``points`` is too small.
    """
    if multiple < 1 or points < 2:
        raise UsageError(
            f"multiple {multiple} has to be at least 1, and points {points} at least 2"
        )
    step = math.lcm(multiple, group.multiple)
    last = group.width // step
    steps = {round(1 + (last - 1) * place / (points - 1)) for place in range(points)}
    return tuple(sorted({step * each for each in steps if 0 < each <= last} | {group.width}))


def shapes_of(
    structure: Structure, *, multiple: int = 1, points: int = 6
) -> tuple[LayerShape, ...]:
    """Every shape that a table for ``structure`` has to hold, each once.

    Args:
        structure: Groups and layers at full width.
        multiple: Measured widths are multiples of it and of the group's own.
        points: Widths per group, between the multiple and the full width.

    Raises:
        UsageError: ``multiple`` or ``points`` is too small.
        InputError: There can be no such layer.
    """
    grids = {g.name: grid_of(g, multiple=multiple, points=points) for g in structure.groups}
    found = dict.fromkeys(shape for each in structure.layers for shape in _grid(each, grids))
    for shape in found:
        check_shape(shape)
    return tuple(found)


def _grid(layer: Layer, grids: Mapping[str, tuple[int, ...]]) -> Iterator[LayerShape]:
    names = dict.fromkeys((layer.input_group, layer.output_group))
    unknown = [name for name in names if name and name not in grids]
    if unknown:
        raise InputError(f"layer {layer.name!r} is of the group {unknown[0]!r}, which is not there")
    for first in grids.get(layer.input_group, (0,)):
        seconds = (first,) if len(names) == 1 else grids.get(layer.output_group, (0,))
        for second in seconds:
            widths = {layer.input_group: first, layer.output_group: second}
            widths.pop("", None)
            inputs, outputs = channels_of(layer, widths)
            shape = resized(layer, inputs=inputs, outputs=outputs)
            # Grouped convolutions that are not depthwise exist at multiples of their groups alone.
            if inputs % shape.groups == 0 and outputs % shape.groups == 0:
                yield shape
