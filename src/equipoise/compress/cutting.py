"""What may be cut and how far, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from equipoise.compress.importance import Importance
from equipoise.compress.latency.allocate import Scope
from equipoise.compress.settings import Objective, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """What to cut.

    Attributes:
        importance: What makes a channel, head or layer important.
        scope: Whether layers compete with each other, or each gives the same share.
        multiple: Widths are multiples of it; what the target likes when None.
        depth: Whether whole layers may go.
        proposals: Ways to cut that are tried by their loss in each step.
    """

    importance: Importance = "taylor"
    scope: Scope = "global"
    multiple: int | None = None
    depth: bool = True
    proposals: int = 4


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How far to prune, and how.

    Attributes:
        speedup: Goal: latency of the original's float engine over the pruned one's.
        max_drop: Largest drop of the metric, absolute.
        steps: Steps to the goal, each the same factor; fewer where a step does not pay.
        step_epochs: Epochs of training after each step.
        recovery: Training after the last one; its objective holds for all.
        cutting: What to cut.
    """

    speedup: float = 2.0
    max_drop: float = 0.01
    steps: int = 3
    step_epochs: float = 1.0
    recovery: TrainSettings = field(
        default_factory=lambda: TrainSettings(objective=Objective(task=0.5, logits=1.0))
    )
    cutting: Cutting = field(default_factory=Cutting)


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Weights that become zero while all sizes stay.

    Attributes:
        pattern: ``2:4``, two of every four along the inputs, or ``unstructured``.
        share: Of the weights of each layer; of ``unstructured`` alone.
    """

    pattern: Literal["2:4", "unstructured"] = "2:4"
    share: float = 0.5

    @property
    def words(self) -> str:
        """For tables and messages."""
        return "2:4" if self.pattern == "2:4" else f"{self.share:.0%} unstructured"
