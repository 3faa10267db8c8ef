"""A gate: one thing that a check looked at, what it found, and what it allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One thing that was checked.

    Attributes:
        name: What was checked, such as ``logits: SQNR``.
        group: What it belongs to, such as an engine or ``lock``.
        passed: Whether it is as it has to be.
        measured: What was found, in words, with its unit.
        allowed: What is allowed, in the same words.
        advice: What to do about it when it failed, or what to know when it passed.
    """

    name: str
    group: str
    passed: bool
    measured: str
    allowed: str
    advice: str = ""


def failures_first(gates: Iterable[Gate]) -> tuple[Gate, ...]:
    """The gates that failed, then the others; each in the order that they came in."""
    return tuple(sorted(gates, key=lambda gate: gate.passed))
