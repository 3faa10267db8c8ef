"""What an engine has to keep to, said by the user or taken from the noise floor of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from equipoise.errors import UsageError
from equipoise.parity.compare import OutputParity
from equipoise.parity.tolerance import Allowed


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the user's own. With one of them, the noise floor limits nothing.

    Attributes:
        atol: Largest allowed ``|difference|``, or of ``|difference| - rtol * |reference|``.
        rtol: Part of the reference's own value that a difference may be.
        min_cosine: Smallest allowed cosine of a sample.
        min_sqnr_db: Smallest allowed signal over noise of an output, in dB.
        max_flips: Largest allowed share of positions whose largest entry is another one.
        max_drop: Largest allowed drop of the task metric, absolute, at 95 % confidence.

    Raises:
        UsageError: A limit is negative or no number, a cosine is above 1, a share above 1.
    """

    atol: float | None = None
    rtol: float | None = None
    min_cosine: float | None = None
    min_sqnr_db: float | None = None
    max_flips: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = -1.0 if field.name == "min_cosine" else 0.0
            most = 1.0 if field.name in {"min_cosine", "max_flips", "max_drop"} else math.inf
            if value is not None and not least <= value <= most:
                option = f"--{field.name.removesuffix('_db').replace('_', '-')}"
                allowed = f"{least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
                raise UsageError(f"{option} is {value:g}; {allowed} is possible")

    @property
    def stated(self) -> bool:
        """Whether the user said anything of the outputs."""
        return any(getattr(self, f.name) is not None for f in fields(self) if f.name != "max_drop")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measure of one output beside its limit.

    Attributes:
        output: Output tensor.
        measure: What is measured, in words.
        measured: What was found, in words.
        allowed: The limit, in words.
        passed: Whether the limit is kept.
        why: Where the limit comes from, in words; empty for one of the user's.
    """

    output: str
    measure: str
    measured: str
    allowed: str
    passed: bool
    why: str = ""

    @property
    def limit(self) -> str:
        """The limit and where it comes from."""
        return f"{self.allowed} ({self.why})" if self.why else self.allowed


def judge(parity: OutputParity, limits: Limits, *, allowed: Allowed) -> tuple[Finding, ...]:
    """What was found of an output beside every limit that counts.

    Args:
        parity: How the output compares, with ``limits.rtol`` taken off its ``excess``.
        limits: The user's.
        allowed: What counts where the user says nothing.
    """
    if not limits.stated:
        return (_by_floor(parity, allowed),)
    return (*_difference(parity, limits), *_others(parity, limits))


def _by_floor(parity: OutputParity, allowed: Allowed) -> Finding:
    words, quiet = f"at most {allowed.atol:.3g}", False
    if allowed.sqnr_db is not None:
        words += f", or {allowed.sqnr_db:g} dB"
        quiet = parity.sqnr_db is None or parity.sqnr_db >= allowed.sqnr_db
    return Finding(
        output=parity.name,
        measure="largest difference",
        measured=f"{parity.max_abs:.3g} ({_decibels(parity)})",
        allowed=words,
        passed=parity.max_abs <= allowed.atol or quiet,
        why=allowed.why,
    )


def _decibels(parity: OutputParity) -> str:
    return "no difference" if parity.sqnr_db is None else f"{parity.sqnr_db:.1f} dB"


def _difference(parity: OutputParity, limits: Limits) -> Iterator[Finding]:
    if limits.atol is None and limits.rtol is None:
        return
    atol, words = limits.atol or 0.0, f"at most {limits.atol or 0.0:.3g}"
    if limits.rtol is not None:
        words += f" + {limits.rtol:g} of the value"
    yield Finding(
        output=parity.name,
        measure="largest difference",
        measured=f"{parity.max_abs:.3g}",
        allowed=words,
        passed=parity.excess <= atol,
    )


def _others(parity: OutputParity, limits: Limits) -> Iterator[Finding]:
    if limits.min_cosine is not None:
        yield Finding(
            output=parity.name,
            measure="smallest cosine",
            measured=f"{parity.least_cosine:.6f}",
            allowed=f"at least {limits.min_cosine:g}",
            passed=parity.least_cosine >= limits.min_cosine,
        )
    if limits.min_sqnr_db is not None:
        yield Finding(
            output=parity.name,
            measure="SQNR",
            measured=_decibels(parity),
            allowed=f"at least {limits.min_sqnr_db:g} dB",
            passed=parity.sqnr_db is None or parity.sqnr_db >= limits.min_sqnr_db,
        )
    if limits.max_flips is not None and parity.flips is not None:
        yield Finding(
            output=parity.name,
            measure="arg-max flips",
            measured=f"{parity.flips:.3%}",
            allowed=f"at most {limits.max_flips:.3%}",
            passed=parity.flips <= limits.max_flips,
        )
