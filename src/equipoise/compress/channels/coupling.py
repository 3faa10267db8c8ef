"""Channels that can only be cut together, as data that names modules and indices.

A *coupling* is a set of channels that one width counts. Each of its members is one axis of one
layer, and says for every index of that axis which channel it belongs to: a flattened map has
several indices per channel, a concatenation has indices of several couplings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from equipoise.errors import RecipeError, unknown_name
from equipoise.spec import Array

Role = Literal["outputs", "inputs", "depthwise", "norm", "embedding", "parameter", "heads"]
NO_CHANNEL: Final = -1


@dataclass(frozen=True, kw_only=True)
class Member:
    """One axis of one layer.

    Attributes:
        module: Dotted name of the layer; of the parameter for the role ``parameter``.
        role: Which axis. ``depthwise`` is both of a convolution that has one group per channel;
            ``heads`` is none, but the number of heads that a module has.
        axis: Of a parameter that belongs to no layer.
        channels: For each index of the axis, its channel of the coupling, or -1 for none.
    """

    module: str
    role: Role
    axis: int = 0
    channels: tuple[int, ...]

    @property
    def key(self) -> tuple[str, Role, int]:
        """What is cut: several couplings may share it."""
        return self.module, self.role, self.axis

    def whole(self) -> bool:
        """Whether every index belongs to the coupling."""
        return NO_CHANNEL not in self.channels


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """Channels of one width.

    Attributes:
        name: Of the first layer that makes them.
        width: How many there are.
        members: Every axis that carries them.
        parts: Part of each channel: as many have to stay in one part as in any other, because the
            groups of a convolution or norm have equal sizes.
        unit: Outputs of a layer per channel: the size of a head.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    parts: tuple[int, ...]
    unit: int = 1

    @property
    def part_count(self) -> int:
        """Into how many parts the channels fall."""
        return len(set(self.parts))

    def step(self, multiple: int) -> int:
        """What widths are multiples of, so that outputs of layers are multiples of ``multiple``."""
        return math.lcm(multiple // math.gcd(multiple, self.unit), self.part_count)


Kept = Mapping[str, Array]
"""Name of a coupling -> bool [width]: which of its channels stay."""


def index_masks(couplings: Iterable[Coupling], kept: Kept) -> dict[tuple[str, Role, int], Array]:
    """For every axis that gets shorter, bool [size of the axis]: which indices stay."""
    masks: dict[tuple[str, Role, int], Array] = {}
    for coupling in couplings:
        if coupling.name not in kept or kept[coupling.name].all():
            continue
        for member in coupling.members:
            channels = np.array(member.channels)
            stays = (channels == NO_CHANNEL) | kept[coupling.name][channels]
            masks[member.key] = masks.get(member.key, True) & stays
    return masks


def best(coupling: Coupling, *, scores: Array, width: int) -> Array:
    """The ``width`` channels of the highest scores, as many from each part.

    Args:
        coupling: The channels.
        scores: float64 [width of the coupling].
        width: How many stay; a multiple of the number of parts.

    Returns:
        bool [width of the coupling].
    """
    parts = np.array(coupling.parts)
    kept = np.zeros(coupling.width, dtype=bool)
    for part in np.unique(parts):
        inside = np.flatnonzero(parts == part)
        order = np.argsort(-scores[inside], kind="stable")
        kept[inside[order[: width // coupling.part_count]]] = True
    return kept


def check_widths(
    couplings: Iterable[Coupling], widths: Mapping[str, int], *, multiple: int
) -> None:
    """Check widths that were asked for.

    Raises:
        UsageError: There is no group of that name.
        RecipeError: A width is not between 1 and what there is, or no multiple of what it must be.
    """
    known = {coupling.name: coupling for coupling in couplings}
    for name, width in widths.items():
        if name not in known:
            raise unknown_name("group of channels", name, known)
        _check_width(known[name], width, multiple=multiple)


def _check_width(coupling: Coupling, width: int, *, multiple: int) -> None:
    step = coupling.step(multiple)
    if width == coupling.width or (0 < width < coupling.width and width % step == 0):
        return
    raise RecipeError(
        f"group {coupling.name!r} has {coupling.width} channels and cannot get {width}:"
        f" {coupling.width}, or a smaller positive multiple of {step}, is allowed",
    )
