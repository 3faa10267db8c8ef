"""When a search has to stop."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When to stop.

    Attributes:
        seconds: In trials, those of earlier runs of the same search included; None for no limit.
        trials: Number of them.
    """

    seconds: float | None = None
    trials: int | None = None


class Clock:
    """What a search has spent of its budget.

    What was done in earlier runs costs nothing when it is only looked up again.

    Args:
        budget: When to stop.
        spent_s: Seconds of the trials of earlier runs.
    """

    def __init__(self, budget: Budget, *, spent_s: float) -> None:
        self._budget, self._earlier_s = budget, spent_s
        self._began = time.monotonic()

    def spent_s(self) -> float:
        """Seconds of all runs."""
        return self._earlier_s + time.monotonic() - self._began

    def left_s(self) -> float | None:
        """Seconds that are left; None without a limit."""
        seconds = self._budget.seconds
        return None if seconds is None else max(seconds - self.spent_s(), 0.0)

    def ended(self, *, trials: int) -> str:
        """Why there can be no more than ``trials``, in words; empty where there can."""
        budget = self._budget
        if budget.trials is not None and trials >= budget.trials:
            return f"all {budget.trials} trials were made"
        if budget.seconds is not None and self.left_s() == 0:
            return f"the budget of {budget.seconds:g} s is spent"
        return ""
