"""Golden vectors against the engine, on the device that runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.bundle.golden import Golden
from equipoise.bundle.manifest import Engine
from equipoise.errors import IntegrityError
from equipoise.spec import Array, Feeds


@dataclass(frozen=True, kw_only=True)
class OutputCheck:
    """How one output did on the golden vectors of this device.

    Attributes:
        name: Output tensor.
        max_abs: Largest absolute difference from the golden outputs.
        allowed: Largest difference that is allowed; None where nobody has stated one, because the
            engine was not run where it was packed.
    """

    name: str
    max_abs: float
    allowed: float | None

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; NaN is not, nor is what nobody has stated."""
        return self.allowed is not None and self.max_abs <= self.allowed

    def __str__(self) -> str:
        allowed = "not run where it was packed, so none is stated"
        if self.allowed is not None:
            allowed = f"{self.allowed:.3g}"
        return f"{self.name} differs by at most {self.max_abs:.3g} (allowed {allowed})"


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """Golden vectors against the engine, on this device.

    Attributes:
        samples: Number of golden samples.
        outputs: One entry per output.
    """

    samples: int
    outputs: tuple[OutputCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether there is a sample, and every output is within its tolerance."""
        return self.samples > 0 and all(output.passed for output in self.outputs)

    def __str__(self) -> str:
        word = "passed" if self.passed else "FAILED"
        checks = "; ".join(map(str, self.outputs))
        return f"self-test {word} on {self.samples} golden samples: {checks}"


def run_selftest(
    run: Callable[[Feeds], dict[str, Array]], vectors: Sequence[Golden], *, engine: Engine
) -> SelfTest:
    """Run the golden inputs and compare with what ``engine`` is to give.

    Args:
        run: Runs the engine once.
        vectors: The golden vectors.
        engine: What the manifest says of it.

    Raises:
        IntegrityError: The vectors are not for this engine.
    """
    worst: dict[str, float] = {}
    for vector in vectors:
        expected = vector.expected(engine.name)
        for name, array in run(vector.inputs).items():
            if name not in expected:
                raise IntegrityError(f"the golden vectors have no output {name!r}")
            found = difference(array, expected[name])
            worst[name] = float(np.maximum(worst.get(name, 0.0), found))
    allowed = engine.golden_tolerance
    return SelfTest(
        samples=len(vectors),
        outputs=tuple(
            OutputCheck(name=n, max_abs=d, allowed=allowed.get(n)) for n, d in worst.items()
        ),
    )


def difference(left: Array, right: Array) -> float:
    """Largest absolute difference; infinite between arrays of other shapes, NaN where one has it.

    Equal infinities differ by nothing.
    """
    if left.shape != right.shape:
        return math.inf
    a, b = left.astype(np.float64), right.astype(np.float64)
    with np.errstate(invalid="ignore"):
        found = np.where(a == b, 0.0, np.abs(a - b))
    return float(found.max(initial=0.0))
