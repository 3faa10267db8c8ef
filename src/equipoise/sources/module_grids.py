"""Which integer grids the modules of a source compute on in a quantised file, as data.

Quantisation reads them off a graph without PyTorch; training puts them into modules without ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from equipoise import fs, record
from equipoise.errors import DataError

Bounds = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ActivationGrid:
    """The values ``scale * (q - zero_point)`` for integers ``low <= q <= high``.

    Attributes:
        activation: Name of the tensor in the float graph; who shares it shares the grid.
        scale: A float32 value.
        zero_point: The integer that stands for zero.
        low: Least integer.
        high: Largest integer.
        dtype: Type of the integers.
        symmetric: Whether zero is the middle of the type whatever the range.
    """

    activation: str
    scale: float
    zero_point: int
    low: int
    high: int
    dtype: str
    symmetric: bool = False

    @property
    def bounds(self) -> Bounds:
        """The range from which quantisation makes this grid again."""
        if self.symmetric:
            reach = (self.high - self.zero_point) * self.scale
            return -reach, reach
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale


@dataclass(frozen=True, kw_only=True)
class WeightForm:
    """How a weight gets its grid, whatever its values are by then; zero is in the middle.

    Attributes:
        bits: Of the grid, whose integers are ``-(2^(bits - 1) - 1)`` to ``2^(bits - 1) - 1``.
        per_channel: One scale for each output channel, else one for all.
        power_of_two: Scales are powers of two: the next above, or half of it where that costs less.
        share: Share of its largest magnitude that the grid of each channel reaches; empty for 1.
    """

    bits: int = 8
    per_channel: bool = True
    power_of_two: bool = False
    share: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModuleGrid:
    """The grids of one module with weights.

    Attributes:
        node: Name of its node in the float graph.
        module: Dotted name of the module; of the batch normalisation that the export folded into
            it where that alone is known.
        place: Dotted name of the module whose code made the node, where it is another one: most
            often that batch normalisation.
        input: What it reads.
        output: What it writes; None where that stays in float.
        output_before_bias: The output is rounded before the bias is added.
        weight: How its weight is rounded, after folding.
        integer_bias: Its bias is int32 on the grid of the product's scales.
        largest: Largest magnitude of the weights of each output channel in the float graph, by
            which a module is known to be the one meant.
    """

    node: str
    module: str
    input: ActivationGrid
    weight: WeightForm
    largest: tuple[float, ...]
    place: str = ""
    output: ActivationGrid | None = None
    output_before_bias: bool = False
    integer_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What is rounded otherwise in the file than modules can do it, or not at all, and why.

    Attributes:
        name: Name of the node or module.
        operator: Type of the node or module.
        reason: Why, in words.
    """

    name: str
    operator: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ModuleRanges:
    """The grids of a model.

    Attributes:
        modules: Of its modules, in the order of the graph.
        activations: Every activation that is rounded -> its range, between layers too.
        skipped: Nodes with weights that stay in float, and nodes between layers whose rounding no
            module does.
        model_sha256: Hash of the float ONNX file.
    """

    modules: tuple[ModuleGrid, ...]
    activations: dict[str, Bounds]
    skipped: tuple[Skipped, ...]
    model_sha256: str


def read_module_ranges(path: Path) -> ModuleRanges:
    """What :func:`write_module_ranges` wrote.

    Raises:
        DataError: The file is missing or holds something else.
    """
    text = fs.read_text(path, error=DataError)
    return record.loads(ModuleRanges, text, where=str(path), error=DataError)


def write_module_ranges(path: Path, ranges: ModuleRanges) -> None:
    """Write ``ranges`` as JSON. Raises OutputError when ``path`` cannot be written."""
    fs.write_json(path, ranges)


def with_scales(ranges: ModuleRanges, scales: dict[str, float]) -> ModuleRanges:
    """``ranges`` in which some activations have other scales and the same zero points.

    Args:
        ranges: As they were.
        scales: Activation -> its new scale, which is rounded to float32.
    """

    def moved(grid: ActivationGrid) -> ActivationGrid:
        return replace(grid, scale=float(np.float32(scales.get(grid.activation, grid.scale))))

    modules = tuple(
        replace(m, input=moved(m.input), output=None if m.output is None else moved(m.output))
        for m in ranges.modules
    )
    grids = [g for m in modules for g in (m.input, m.output) if g is not None]
    moved_bounds = {g.activation: g.bounds for g in grids if g.activation in scales}
    return replace(ranges, modules=modules, activations=ranges.activations | moved_bounds)
