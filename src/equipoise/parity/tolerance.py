"""How close is equal: tolerances from the noise floor of the model itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise.errors import ParityError
from equipoise.parity.compare import OutputParity
from equipoise.spec import Array

NOISE_FACTOR: Final = 32.0
"""Another order of summation moves a float32 result by a few noise floors; 32 is beyond that."""

_LEAST_RELATIVE: Final = 1e-6
"""Eight units in the last place of float32: models whose floor happens to be measured as zero."""

_MOST_RELATIVE: Final = 1e-2


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What a precision may cost: a largest difference of ``factor`` noise floors, or little noise.

    A model magnifies a rounding of its arithmetic by its own factor, which its float32 floor shows.
    So another arithmetic is expected at the floor times the ratio of its unit roundoff to float32's
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 2.1): 2^13 for float16,
    2^16 for bfloat16 and for 8 bits, whose step is 2^-8 of a range, 2^20 for 4. Four times that is
    allowed, and once for 4 bits, which round weights alone. benchmarks/parity.py measures the
    ratios. A shallow model magnifies nothing, and still rounds its output once: so noise below a
    few of the precision's own steps is allowed whatever the floor.

    Attributes:
        factor: Allowed largest difference, in float32 noise floors.
        most: Never a larger one, as a part of the largest value of the reference.
        sqnr_db: Signal over noise that is enough by itself, in dB; None where none is.
    """

    factor: float
    most: float
    sqnr_db: float | None


ALLOWANCES: Final[dict[str, Allowance]] = {
    "float32": Allowance(factor=NOISE_FACTOR, most=_MOST_RELATIVE, sqnr_db=None),
    "float16": Allowance(factor=2.0**15, most=2.0**-5, sqnr_db=60.0),
    "bfloat16": Allowance(factor=2.0**18, most=2.0**-3, sqnr_db=42.0),
    "int8": Allowance(factor=2.0**18, most=2.0**-2, sqnr_db=30.0),
    "int4": Allowance(factor=2.0**20, most=2.0**-1, sqnr_db=18.0),
}
"""Precision of an engine -> what it may cost."""


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What one output of an engine may differ by.

    Attributes:
        atol: Largest difference.
        sqnr_db: Signal over noise that is enough by itself; None where none is.
        why: Where that comes from, in words.
    """

    atol: float
    sqnr_db: float | None = None
    why: str


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Allowed absolute difference of one output.

    Attributes:
        output: Output tensor.
        atol: Largest allowed absolute difference.
        floor: Measured noise floor: largest difference between the model in float32 and in
            float64 on real samples.
    """

    output: str
    atol: float
    floor: float


def tolerances(
    float32: Sequence[Mapping[str, Array]],
    float64: Sequence[Mapping[str, Array]],
    *,
    again: Sequence[Mapping[str, Array]] = (),
) -> tuple[Tolerance, ...]:
    """Tolerances from the same samples computed in float32 and in float64.

    ``atol = max(32 * floor, 1e-6 * largest reference value)``, and never above a hundredth of the
    largest reference value: a model that noisy has a fault of its own.

    Args:
        float32: Outputs of the samples.
        float64: The same samples in float64.
        again: Some of the samples in float32 once more, the first ones: the floor is no lower than
            what they differ by from one run to the next.
    """
    floors: dict[str, float] = {}
    scales: dict[str, float] = {}
    for single, double in zip(float32, float64, strict=True):
        for name, exact in double.items():
            difference = np.abs(single[name].astype(np.float64) - exact)
            floors[name] = max(floors.get(name, 0.0), float(difference.max(initial=0.0)))
            scales[name] = max(scales.get(name, 0.0), float(np.abs(exact).max(initial=0.0)))
    for first, second in zip(float32, again, strict=False):
        for name, array in second.items():
            difference = np.abs(array.astype(np.float64) - first[name].astype(np.float64))
            floors[name] = max(floors[name], float(difference.max(initial=0.0)))
    return tuple(
        Tolerance(
            output=name,
            floor=floor,
            atol=float(
                np.clip(
                    NOISE_FACTOR * floor,
                    _LEAST_RELATIVE * scales[name],
                    _MOST_RELATIVE * scales[name],
                )
            ),
        )
        for name, floor in floors.items()
    )


def relative_tolerances(
    expected: Sequence[Mapping[str, Array]], again: Sequence[Mapping[str, Array]] = ()
) -> tuple[Tolerance, ...]:
    """Tolerances without a float64 model.

    The floor is four units in the last place of the largest value, or the difference to
    ``again``, the same samples computed in another order, if that is larger.
    """
    scales: dict[str, float] = {}
    spreads: dict[str, float] = {}
    for outputs in expected:
        for name, array in outputs.items():
            largest = float(np.abs(array.astype(np.float64)).max(initial=0.0))
            scales[name] = max(scales.get(name, 0.0), largest)
    for outputs, other in zip(expected, again, strict=False):
        for name, array in outputs.items():
            difference = np.abs(array.astype(np.float64) - other[name].astype(np.float64))
            spreads[name] = max(spreads.get(name, 0.0), float(difference.max(initial=0.0)))
    unit = float(np.finfo(np.float32).eps) * 4
    floors = {name: max(unit * scale, spreads.get(name, 0.0)) for name, scale in scales.items()}
    return tuple(
        Tolerance(output=name, floor=floor, atol=NOISE_FACTOR * max(floor, unit * 1e-6))
        for name, floor in floors.items()
    )


def allowed_difference(tolerance: Tolerance, *, precision: str, scale: float) -> Allowed:
    """How far an engine of some precision may be from the reference: :class:`Allowance`.

    Args:
        tolerance: Of the float32 model; its ``atol`` is allowed in any case.
        precision: A key of :data:`ALLOWANCES`.
        scale: Largest absolute value of the reference.
    """
    rule = ALLOWANCES[precision]
    by_floor = rule.factor * tolerance.floor
    atol = max(tolerance.atol, min(by_floor, rule.most * scale))
    factor = f"{rule.factor:g}" if precision == "float32" else f"2^{math.log2(rule.factor):g}"
    why = f"{precision}: {factor} times the float32 noise of {tolerance.floor:.3g}"
    if by_floor > rule.most * scale and atol != tolerance.atol:
        why = f"{precision}: 1/{1 / rule.most:g} of the largest value, {scale:.3g}"
    return Allowed(atol=atol, sqnr_db=rule.sqnr_db, why=why)


def check_parity(
    parity: Iterable[OutputParity], allowed: Iterable[Tolerance], *, what: str
) -> None:
    """Check every output against its tolerance.

    Raises:
        ParityError: Names the first output that departs, its difference and what is allowed.
    """
    limits = {tolerance.output: tolerance for tolerance in allowed}
    for output in parity:
        limit = limits[output.name]
        if output.max_abs > limit.atol:
            raise ParityError(
                f"{what}: output {output.name!r} differs from the reference by"
                f" {output.max_abs:.3g}; allowed {limit.atol:.3g}"
                f" ({NOISE_FACTOR:.0f} times the model's own float32 noise of {limit.floor:.3g})"
            )
