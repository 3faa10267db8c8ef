"""The optimiser, its rate at each step, and which layers behave as in training."""

from __future__ import annotations

import math
from typing import Any

from equipoise import extras
from equipoise.compress.settings import TrainSettings
from equipoise.errors import UsageError

_MOMENTUM = 0.9


def check_settings(settings: TrainSettings) -> None:
    """Check every number for its range.

    Raises:
        UsageError: One is outside; says which, its value, and what is allowed.
    """
    least = {
        "batch_size": 1, "accumulate": 1, "weight_decay": 0, "clip": 0, "evaluate_every": 0,
        "patience": 0, "save_every": 0, "seed": 0, "warmup": 0,
    }  # fmt: skip
    for name, lowest in least.items():
        value = getattr(settings, name)
        if not lowest <= value < math.inf:
            raise UsageError(f"{name} is {value}; it has to be {lowest} or more")
    for name in ("epochs", "learning_rate"):
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise UsageError(f"{name} is {value}; it has to be more than 0")
    if settings.warmup > 1:
        raise UsageError(f"warmup is {settings.warmup}; it is a share of the steps, 0 to 1")


def build_optimizer(module: Any, *, settings: TrainSettings, fused: bool) -> Any:
    """AdamW, or SGD with Nesterov momentum 0.9, over what needs a gradient.

    Parameters of fewer than two dimensions, which are biases and the scales of norms, do not decay.

    Args:
        module: All that is trained.
        settings: Rate, decay and kind.
        fused: One kernel for all parameters; not for parameters divided between processes.
    """
    torch = extras.require("torch")
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)
    return torch.optim.SGD(
        groups, lr=settings.learning_rate, momentum=_MOMENTUM, nesterov=True, fused=fused
    )


def rate(step: int, *, steps: int, settings: TrainSettings) -> float:
    """The learning rate of one step: a linear warm-up, then the schedule down to 0.

    Args:
        step: From 0.
        steps: In all.
        settings: Largest rate, schedule and share of warm-up.
    """
    rising = round(settings.warmup * steps)
    if step < rising:
        return settings.learning_rate * (step + 1) / (rising + 1)
    done = (step - rising) / max(steps - rising, 1)
    factor = {
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "constant": 1.0,
    }[settings.schedule]
    return settings.learning_rate * factor


def set_training_(module: Any, *, dropout: bool) -> None:
    """Put ``module`` into the state it trains in.

    With ``dropout`` every layer is as its authors train it. Without, everything is as in
    evaluation, which turns off dropout of every kind, in attention and of whole layers too, and
    any other noise; so what is learned is what will run. Only batch normalisation goes on
    normalising by the batch, and recurrent layers stay in training, where cuDNN has their
    gradient, with the dropout between them at 0.
    """
    torch = extras.require("torch")
    module.train(dropout)
    if dropout:
        return
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):  # noqa: SLF001  no public base
            layer.train()
        elif isinstance(layer, torch.nn.RNNBase):
            layer.train()
            layer.dropout = 0.0
