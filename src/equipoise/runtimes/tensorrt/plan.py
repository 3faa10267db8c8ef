"""What stands beside an engine: the tensors by the names of the model, and what sizes it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from equipoise import fs, record
from equipoise.errors import InputError, IntegrityError
from equipoise.runtimes.protocol import SizeRange
from equipoise.spec import Feeds, TensorSpec

PLAN_FILE: Final = "plan.json"
WEIGHTS_FILE: Final = "weights.onnx"
Profile = Mapping[str, SizeRange]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an engine does not say of itself.

    Attributes:
        inputs: Specs of the inputs, with the names of dynamic dimensions.
        outputs: Specs of the outputs.
        profiles: Sizes of every dynamic dimension of the inputs, for each optimisation profile.
        later_versions: Whether later versions of the runtime load it.
        later_gpus: Whether every GPU from compute capability 8.0 loads it.
        weights: ONNX file in the same directory that has the weights; empty where the engine has
            them.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[dict[str, SizeRange], ...] = ()
    later_versions: bool = False
    later_gpus: bool = False
    weights: str = ""

    def profile_for(self, feeds: Feeds) -> int:
        """Index of the narrowest profile that takes ``feeds``; 0 where every size is fixed.

        Raises:
            InputError: There is none.
        """
        if not self.profiles:
            return 0
        given = sizes(feeds, self.inputs)
        fitting = [i for i, profile in enumerate(self.profiles) if _takes(profile, given)]
        if fitting:
            return min(fitting, key=lambda index: _widest(self.profiles[index]))
        asked = ", ".join(f"{name} {size}" for name, size in given.items())
        raise InputError(
            f"no optimisation profile takes {asked}; the engine was built for"
            f" {' or '.join(map(describe_profile, self.profiles))}",
            hint="Build it again with such a --profile, or give other sizes.",
        )


def _takes(profile: Profile, given: Mapping[str, int]) -> bool:
    return all(r.least <= given[name] <= r.largest for name, r in profile.items())


def _widest(profile: Profile) -> int:
    return math.prod(r.largest for r in profile.values())


def describe_profile(profile: Profile) -> str:
    """``batch 1 to 8, sequence 1 to 256``."""
    return ", ".join(f"{name} {r.least} to {r.largest}" for name, r in profile.items())


def sizes(feeds: Feeds, inputs: Iterable[TensorSpec]) -> dict[str, int]:
    """Dynamic dimension -> its size in ``feeds``."""
    return {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }


def read_plan(directory: Path) -> Plan:
    """Read what stands beside an engine. Raises IntegrityError when it is missing or no such."""
    path = directory / PLAN_FILE
    text = fs.read_text(path, error=IntegrityError)
    return record.loads(Plan, text, where=str(path), error=IntegrityError)
