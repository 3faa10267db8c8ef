"""Optimisation profiles: which sizes an engine takes, and at which it is fast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from equipoise.errors import IncompatibleError, UsageError, unknown_name
from equipoise.runtimes.protocol import SizeRange
from equipoise.runtimes.tensorrt.plan import Profile
from equipoise.spec import TensorSpec

BATCH: Final = SizeRange(least=1, usual=1, largest=8)
"""Of a batch that no profile names: one request at a time is the use on a device."""
LENGTH: Final = SizeRange(least=1, usual=64, largest=256)
"""Of any other dimension that no profile names, such as a sequence."""


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """The profiles of an engine.

    Attributes:
        profiles: Sizes of every dynamic dimension, for each profile; none where all are fixed.
        notes: What was chosen, in words.
    """

    profiles: tuple[dict[str, SizeRange], ...]
    notes: tuple[str, ...]


def complete(asked: Sequence[Profile], inputs: Sequence[TensorSpec]) -> Profiles:
    """The profiles that were asked for, with a range for each dimension that they leave out.

    Raises:
        UsageError: A profile names no dynamic dimension of the model, or a range is none.
        IncompatibleError: There are profiles, but the model has no dynamic dimension.
    """
    usual = _usual_ranges(inputs)
    for profile in asked:
        _check(profile, usual)
    if not usual:
        return Profiles(profiles=(), notes=())
    named = {name for profile in asked for name in profile}
    return Profiles(
        profiles=tuple({**usual, **profile} for profile in asked or ({},)),
        notes=tuple(_note(name, r) for name, r in usual.items() if name not in named),
    )


def _usual_ranges(inputs: Iterable[TensorSpec]) -> dict[str, SizeRange]:
    found: dict[str, SizeRange] = {}
    for spec in inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                found.setdefault(dim, _usual_range(dim, axis=axis))
    return found


def _usual_range(name: str, *, axis: int) -> SizeRange:
    lower = name.lower()
    batch = "batch" in lower or (axis == 0 and "seq" not in lower)
    return BATCH if batch else LENGTH


def _note(name: str, chosen: SizeRange) -> str:
    return (
        f"no profile names the dimension {name!r}: it takes {chosen.least} to {chosen.largest} and"
        f" is fast at {chosen.usual}"
    )


def _check(profile: Profile, known: Profile) -> None:
    for name, chosen in profile.items():
        if not known:
            raise IncompatibleError(
                f"a profile names {name!r}, but every size of the model is fixed",
                hint="Leave the profile out, or export the model with dynamic dimensions.",
            )
        if name not in known:
            raise unknown_name("dynamic dimension", name, known)
        if not 1 <= chosen.least <= chosen.usual <= chosen.largest:
            raise UsageError(
                f"the sizes of {name!r} are {chosen.least}:{chosen.usual}:{chosen.largest};"
                " expected 1 <= least <= usual <= largest"
            )


def add_profiles(
    config: Any, builder: Any, *, profiles: Iterable[Profile], inputs: Sequence[TensorSpec]
) -> None:
    """Give ``profiles`` to a builder configuration."""
    for profile in profiles:
        added = builder.create_optimization_profile()
        for spec in inputs:
            if any(isinstance(dim, str) for dim in spec.shape):
                ranges = [[_of(dim, profile, end) for dim in spec.shape] for end in _ENDS]
                added.set_shape(spec.name, *map(tuple, ranges))
        if config.add_optimization_profile(added) < 0:
            raise IncompatibleError(f"the profile {dict(profile)} was refused")


_ENDS: Final = ("least", "usual", "largest")


def _of(dim: int | str, profile: Profile, end: str) -> int:
    return dim if isinstance(dim, int) else int(getattr(profile[dim], end))
