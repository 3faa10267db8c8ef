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
    """What a precision may cost: ``clip(factor * floor, least * scale, most * scale)``.

    A model magnifies a rounding of its arithmetic by its own factor, which its float32 floor shows.
    So another arithmetic is expected at the floor times the ratio of its unit roundoff to float32's
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 2.1): 2^13 for float16,
    2^16 for bfloat16 and for 8 bits, whose step is 2^-8 of a range, 2^20 for 4. Four times that is
    allowed, and once for 4 bits, which round weights alone. benchmarks/parity.py measures the
    ratios.

    Attributes:
        factor: Allowed difference in float32 noise floors.
        least: Allowed in any case, as a part of the largest value of the reference: a shallow
            model rounds its output once, whatever its floor.
        most: Never allowed, as a part of the same.
    """

    factor: float
    least: float
    most: float


ALLOWANCES: Final[dict[str, Allowance]] = {
    "float32": Allowance(factor=NOISE_FACTOR, least=_LEAST_RELATIVE, most=_MOST_RELATIVE),
    "float16": Allowance(factor=2.0**15, least=2.0**-10, most=2.0**-5),
    "bfloat16": Allowance(factor=2.0**18, least=2.0**-7, most=2.0**-3),
    "int8": Allowance(factor=2.0**18, least=2.0**-4, most=2.0**-2),
    "int4": Allowance(factor=2.0**20, least=2.0**-3, most=2.0**-1),
}
"""Precision of an engine -> what it may cost."""


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


def allowed_difference(tolerance: Tolerance, *, precision: str, scale: float) -> tuple[float, str]:
    """How far an engine of some precision may be from the reference, and why, in words.

    Args:
        tolerance: Of the float32 model; its ``atol`` is allowed in any case.
        precision: A key of :data:`ALLOWANCES`.
        scale: Largest absolute value of the reference.
    """
    rule = ALLOWANCES[precision]
    if precision == "float32":
        return tolerance.atol, f"{rule.factor:g} times the float32 noise of {tolerance.floor:.3g}"
    by_floor = rule.factor * tolerance.floor
    value = float(np.clip(by_floor, rule.least * scale, rule.most * scale))
    if value == by_floor:
        why = f"2^{math.log2(rule.factor):g} times the float32 noise of {tolerance.floor:.3g}"
    else:
        why = f"1/{scale / value if value else 1:g} of the largest value, {scale:.3g}"
    return max(value, tolerance.atol), f"{precision}: {why}"


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
