"""torch-pruning as its own documentation uses it: by hand, global magnitude, at a number of MACs.

What a person gets with that library alone, for the comparison with ``equipoise prune``: no
verification, no compensation, no statistics anew; training afterwards is the same for both.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

_STEPS = 200
_MOST_OF_A_LAYER = 0.9
"""Without a limit the global ranking empties whole layers."""


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """A pruned copy of a module.

    Attributes:
        module: It.
        macs_before: Multiplications on one sample, as torch-pruning counts them.
        macs_after: The same of the copy.
        parameters_after: Numbers in its weights.
    """

    module: Any
    macs_before: float
    macs_after: float
    parameters_after: int


def prune_by_hand(module: Any, *, example: Any, macs: float, multiple: int = 8) -> ByHand:
    """Prune a copy of ``module`` until it has at most ``macs`` multiplications.

    Args:
        module: In evaluation mode.
        example: One sample, a tensor with a batch of 1.
        macs: Goal, as torch-pruning counts: it includes norms and pooling.
        multiple: Widths are multiples of it.

    Raises:
        ValueError: The goal is not reached; says how far it got.
    """
    import torch_pruning as pruning

    pruned = copy.deepcopy(module)
    before, _ = pruning.utils.count_ops_and_params(pruned, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = pruning.pruner.BasePruner(
            pruned,
            example,
            importance=pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=1.0,
            max_pruning_ratio=_MOST_OF_A_LAYER,
            iterative_steps=_STEPS,
            ignored_layers=_classifier(pruned),
            round_to=multiple,
        )
        for _ in range(_STEPS):
            after, parameters = pruning.utils.count_ops_and_params(pruned, example)
            if after <= macs:
                return ByHand(
                    module=pruned,
                    macs_before=float(before),
                    macs_after=float(after),
                    parameters_after=int(parameters),
                )
            pruner.step()
    raise ValueError(
        f"torch-pruning got from {before:,.0f} MACs to {after:,.0f}, not to {macs:,.0f}"
    )


def _classifier(module: Any) -> list[Any]:
    """The last linear layer: its outputs are the classes."""
    import torch

    return [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)][-1:]
