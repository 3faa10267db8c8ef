"""The space of recipes: axes, and the recipe of each point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from equipoise.compress.cutting import Pruning
from equipoise.quantize.blockwise import BlockGrid
from equipoise.quantize.ranges import Entropy, MinMax, Mse, Percentile
from equipoise.quantize.schemes import DynamicInt8, StaticInt8, WeightOnlyInt8
from equipoise.quantize.weight_only import WeightOnly
from equipoise.recipe import Recipe

AxisName = Literal[
    "target", "model", "graph", "precision", "tables", "ranges", "kept", "rounding", "threads"
]
Point = tuple[int, ...]
"""The index of a choice on each axis."""

BASELINE: Final = "float32"
_STATIC: Final = "int8-static"
_BLOCKED_TABLES: Final = frozenset({"int8-dynamic", _STATIC, "int4-blocks"})
"""Precisions whose tables may be in blocks of 4 bits."""

_KEPT_DB: Final = (20.0, 0.0, 10.0, 15.0, 25.0, 30.0, 35.0)
"""Signal to noise that the outputs keep on calibration samples: nodes go back to float for it, by
what they gain and harm. With 0 nearly everything stays in integers."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One choice on an axis.

    Attributes:
        label: Its part of a recipe's name; empty for what needs no mention.
        words: The same for people.
        value: What it means to its axis.
        position: Where it lies on an axis on which near choices act alike.
        later: Whether it waits for what others have shown, instead of being tried at the start.
    """

    label: str
    words: str
    value: Any = None
    position: float | None = None
    later: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One thing that recipes differ in.

    Attributes:
        name: What.
        choices: The first one is what is done where nothing speaks for another.
    """

    name: AxisName
    choices: tuple[Choice, ...]

    def positions(self) -> list[float] | None:
        """Of all choices; None where they have no order."""
        found = [choice.position for choice in self.choices if choice.position is not None]
        return found if len(found) == len(self.choices) else None


@dataclass(frozen=True, kw_only=True)
class Space:
    """All recipes that a search may try.

    Attributes:
        axes: In the order in which they name a recipe.
    """

    axes: tuple[Axis, ...]

    def points(self) -> Iterator[Point]:
        """Every recipe once: choices that mean nothing beside others are the first ones."""
        sizes = (range(len(axis.choices)) for axis in self.axes)
        return (point for point in itertools.product(*sizes) if self.canonical(point) == point)

    def canonical(self, point: Point) -> Point:
        """The point of the same recipe whose idle axes are at their first choice."""
        idle = set(self._idle(point))
        pairs = zip(point, self.axes, strict=True)
        return tuple(0 if axis.name in idle else index for index, axis in pairs)

    def _idle(self, point: Point) -> Iterator[AxisName]:
        """Axes that mean nothing beside the other choices."""
        precision = self.choice(point, "precision").label
        if precision != _STATIC:
            yield from _STATIC_FIELDS
        if precision not in _BLOCKED_TABLES or self._elsewhere(point):
            yield "tables"

    def _elsewhere(self, point: Point) -> bool:
        """Whether it is for another target than the first, whose runtime may not know blocks."""
        return self.axes[0].name == "target" and point[0] > 0

    def choice(self, point: Point, name: AxisName) -> Choice:
        """The choice of ``point`` on one axis."""
        for index, axis in zip(point, self.axes, strict=True):
            if axis.name == name:
                return axis.choices[index]
        raise KeyError(name)

    def at(self, labels: Mapping[AxisName, str]) -> Point:
        """The point with these choices, by their labels; the first ones on the other axes."""
        found = []
        for axis in self.axes:
            known = [choice.label for choice in axis.choices]
            found.append(known.index(labels[axis.name]) if axis.name in labels else 0)
        return self.canonical(tuple(found))

    def recipe(self, point: Point) -> Recipe:
        """The recipe of ``point``, named after its choices."""
        chosen = [axis.choices[i] for axis, i in zip(self.axes, self.canonical(point), strict=True)]
        labels = [choice.label for choice in chosen if choice.label]
        words = "; ".join(choice.words for choice in chosen if choice.words)
        recipe = Recipe(name=_name(labels), summary=f"{words[:1].upper()}{words[1:]}.")
        for axis, choice in zip(self.axes, chosen, strict=True):
            recipe = _with(recipe, axis.name, choice.value)
        return recipe


def _name(labels: Sequence[str]) -> str:
    """Of a pruned model that it stays in float need not be said."""
    pruned = any(label.startswith("pruned-") for label in labels)
    return "-".join(label for label in labels if not (pruned and label == BASELINE))


_FIELDS: Final[dict[AxisName, str]] = {
    "target": "target", "model": "pruning", "graph": "fused", "precision": "quantization",
    "threads": "threads",
}  # fmt: skip
"""Axis -> field of a recipe."""

_STATIC_FIELDS: Final[dict[AxisName, str]] = {
    "ranges": "method", "kept": "min_sqnr_db", "rounding": "rounding"
}  # fmt: skip
"""Axis -> field of static int8."""


def _with(recipe: Recipe, axis: AxisName, value: Any) -> Recipe:
    """``recipe`` with a choice of one axis, in the order of the axes."""
    if axis in _FIELDS:
        return replace(recipe, **{_FIELDS[axis]: value})
    if axis == "tables":
        return recipe if value is None else _with_tables(recipe, value)
    if not isinstance(recipe.quantization, StaticInt8):
        return recipe
    changed = replace(recipe.quantization, **{_STATIC_FIELDS[axis]: value})
    return replace(recipe, quantization=changed)


def _with_tables(recipe: Recipe, tables: Any) -> Recipe:
    assert isinstance(recipe.quantization, (DynamicInt8, StaticInt8, WeightOnly))  # noqa: S101
    return replace(recipe, quantization=replace(recipe.quantization, tables=tables))


@dataclass(frozen=True, kw_only=True)
class SpaceSettings:
    """What a space is made of.

    Attributes:
        saturates: Whether the 16-bit sums of the target's int8 kernels can overflow. Where they
            can, dynamic schemes take seven-bit weights; static ones find out which layers need it.
        prunings: Goals to prune to.
        first_pruning: Try the first of them at the start alone, and leave the others to what it
            shows.
        threads: Numbers of threads to choose from; what the job has when empty.
        targets: Other targets of the same device.
        tables: Whether the model has tables that the target gathers from blocks.
    """

    saturates: bool
    prunings: tuple[Pruning, ...] = ()
    first_pruning: bool = False
    threads: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()
    tables: bool = False


def space_for(settings: SpaceSettings) -> Space:
    """The space for a CPU."""
    models = _models(settings.prunings, first_alone=settings.first_pruning)
    precisions = _precisions(saturates=settings.saturates)
    axes = [models, precisions, _GRAPHS, _RANGES, _KEPT, _ROUNDING]
    if settings.tables:
        axes.insert(2, _TABLES)
    if settings.targets:
        axes.insert(0, _targets(settings.targets))
    if len(settings.threads) > 1:
        axes.append(_threads(settings.threads))
    return Space(axes=tuple(axes))


def baseline_alone(*, saturates: bool) -> Space:
    """The space of the float engine, for a recipe that is named."""
    precisions = _precisions(saturates=saturates)
    return Space(axes=(replace(precisions, choices=precisions.choices[:1]),))


def _models(prunings: Sequence[Pruning], *, first_alone: bool) -> Axis:
    pruned = (
        Choice(
            label=f"pruned-{pruning.speedup:g}x",
            words=f"pruned to {pruning.speedup:g} times the speed and trained again",
            value=pruning,
            position=math.log(pruning.speedup),
            later=first_alone and index > 0,
        )
        for index, pruning in enumerate(prunings)
    )
    return Axis(name="model", choices=(Choice(label="", words="", position=0.0), *pruned))


def _targets(names: Sequence[str]) -> Axis:
    others = (Choice(label=name, words=f"for the target {name}", value=name) for name in names)
    return Axis(name="target", choices=(Choice(label="", words="", value=""), *others))


_TABLES: Final = Axis(
    name="tables",
    choices=(
        Choice(label="", words=""),
        Choice(label="4bit-tables", words="tables in blocks of 4 bits", value="blocks"),
    ),
)
_GRAPHS: Final = Axis(
    name="graph",
    choices=(
        Choice(label="", words="", value=False),
        Choice(
            label="fused",
            words="attention, layer norm and GELU as single operators",
            value=True,
        ),
    ),
)


def _precisions(*, saturates: bool) -> Axis:
    bits = "7-bit weights, because this CPU saturates" if saturates else "8-bit weights"
    return Axis(
        name="precision",
        choices=(
            Choice(label=BASELINE, words="float32"),
            Choice(
                label="int8-weights",
                words="weights stored as int8 per channel, computed in float",
                value=WeightOnlyInt8(),
            ),
            Choice(
                label="int8-dynamic",
                words=f"activations quantised in every run, {bits}",
                value=DynamicInt8(reduce_range=saturates),
            ),
            Choice(
                label=_STATIC,
                words="ranges from calibration data; what int8 would harm stays in float",
                value=StaticInt8(),
            ),
            Choice(
                label="int8-blocks",
                words="weights of products in blocks of 8 bits, products in int8",
                value=WeightOnly(grid=BlockGrid(bits=8), accuracy_level=4),
            ),
            Choice(
                label="int4-blocks",
                words="weights of products in blocks of 4 bits, products in int8",
                value=WeightOnly(grid=BlockGrid(bits=4), accuracy_level=4),
            ),
        ),
    )


_RANGES: Final = Axis(
    name="ranges",
    choices=(
        Choice(label="", words="", value=Mse()),
        Choice(label="minmax", words="ranges of all values seen", value=MinMax()),
        Choice(label="percentile", words="ranges of 99.99 % of values", value=Percentile()),
        Choice(label="entropy", words="ranges of least divergence", value=Entropy()),
    ),
)
_KEPT: Final = Axis(
    name="kept",
    choices=tuple(
        Choice(
            label="" if index == 0 else f"{level:g}dB",
            words="" if index == 0 else f"{level:g} dB kept",
            value=level,
            position=level,
        )
        for index, level in enumerate(_KEPT_DB)
    ),
)
_ROUNDING: Final = Axis(
    name="rounding",
    choices=(
        Choice(label="", words="", value=StaticInt8().rounding),
        Choice(label="nearest", words="weights to their nearest integers", value=None),
    ),
)


def _threads(counts: Sequence[int]) -> Axis:
    """The most threads first: what is measured with nothing said."""
    ordered = sorted(counts, reverse=True)
    choices = tuple(
        Choice(
            label="" if index == 0 else f"{count}t",
            words="" if index == 0 else f"{count} thread{'s' if count > 1 else ''}",
            value=count,
            position=count,
        )
        for index, count in enumerate(ordered)
    )
    return Axis(name="threads", choices=choices)
