"""What is asked of an engine: limits that it has to keep, and what is to be least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from equipoise.errors import UsageError, unknown_name

Quantity = Literal["latency", "size", "memory"]
Limited = Literal["drop", "metric", "latency", "size", "memory"]

QUANTITIES: Final[tuple[Quantity, ...]] = ("latency", "size", "memory")
_SECOND: Final = 0.01
"""What the next quantity of an order counts beside the one before it, while searching."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One limit, and what was found.

    Attributes:
        quantity: What is limited.
        allowed: The limit, in its own unit: the metric's, milliseconds, bytes.
        found: What is compared with it: the bound of the drop or metric at the stated confidence,
            the upper end of the latency's interval, bytes.
    """

    quantity: Limited
    allowed: float
    found: float

    @property
    def kept(self) -> bool:
        """Whether it is kept."""
        if self.quantity == "metric":
            return self.found >= self.allowed
        return self.found <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Limits, and what to minimise under them.

    Attributes:
        max_drop: Largest drop of the metric against the source, absolute; None for no limit.
        min_metric: Least metric.
        max_latency_ms: Most milliseconds per inference.
        max_size_bytes: Most bytes on disk.
        max_memory_bytes: Most peak resident memory.
        minimise: Costs; in order, the next one deciding among those that tie in the one before,
            or with weights.
        weights: One per cost: powers of the costs over those of the float engine, whose product is
            least. Empty for an order.
        confidence: Of every claim about the metric, for all candidates together.
    """

    max_drop: float | None = 0.01
    min_metric: float | None = None
    max_latency_ms: float | None = None
    max_size_bytes: float | None = None
    max_memory_bytes: float | None = None
    minimise: tuple[Quantity, ...] = QUANTITIES
    weights: tuple[float, ...] = ()
    confidence: float = 0.95

    @property
    def powers(self) -> dict[Quantity, float]:
        """Cost -> its power in the one number that guides the search."""
        weights = self.weights or [_SECOND**rank for rank in range(len(self.minimise))]
        return dict(zip(self.minimise, weights, strict=True))

    def log_cost(self, relative: dict[Quantity, float]) -> float:
        """The one number that guides the search.

        Args:
            relative: Cost -> its value over that of the float engine.
        """
        return math.fsum(power * math.log(relative[name]) for name, power in self.powers.items())


def parse_minimise(text: str) -> tuple[tuple[Quantity, ...], tuple[float, ...]]:
    """Costs and weights from ``latency,size`` (an order) or ``latency=2,size=1`` (weights).

    Raises:
        UsageError: An unknown cost, one that is named twice, or weights for some alone.
    """
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    named: list[Quantity] = [_quantity(name.strip()) for name, _, _ in parts]
    if not named or len(set(named)) < len(named):
        raise UsageError(f"--minimise {text!r}: name each of {', '.join(QUANTITIES)} at most once")
    weighted = [bool(sign) for _, sign, _ in parts]
    if any(weighted) and not all(weighted):
        raise UsageError(f"--minimise {text!r}: give weights to all, or to none for an order")
    weights = tuple(_weight(value, text=text) for _, sign, value in parts if sign)
    return tuple(named), weights


def _quantity(name: str) -> Quantity:
    for known in QUANTITIES:
        if name == known:
            return known
    raise unknown_name("cost", name, QUANTITIES)


def _weight(value: str, *, text: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise UsageError(f"--minimise {text!r}: a weight is a number above 0, not {value!r}")
    return weight


def check_goal(goal: Goal) -> None:
    """Raise UsageError for a limit that no engine could keep, or a confidence out of range."""
    if goal.max_drop is not None and not 0 <= goal.max_drop < math.inf:
        raise UsageError(f"--max-drop is {goal.max_drop}; it must be at least 0")
    for option, value in (
        ("--max-latency", goal.max_latency_ms),
        ("--max-size", goal.max_size_bytes),
        ("--max-memory", goal.max_memory_bytes),
    ):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{option} is {value:g}; it must be above 0")
    if not 0.5 < goal.confidence < 1:
        raise UsageError(f"--confidence is {goal.confidence:g}; it lies between 0.5 and 1")
