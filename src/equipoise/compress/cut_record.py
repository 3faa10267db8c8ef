"""What every cut of a model says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CutRecord:
    """What came of a cut.

    Attributes:
        parameters_before: Numbers in the weights.
        parameters_after: The same of the result.
        loss_before: Mean loss of the task; None without labels.
        loss_after: The same of the result, before any training.
        loss_samples: The part of the data that it was measured on: ``validation``, or ``training``
            where there is no other; empty when it was not.
        notes: What the user should know.
    """

    parameters_before: int
    parameters_after: int
    loss_before: float | None
    loss_after: float | None
    loss_samples: str
    notes: tuple[str, ...]
