"""The importance of each channel: the sum over every slice of a weight that carries it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from equipoise import extras
from equipoise.compress.channels.coupling import NO_CHANNEL, Coupling, Member
from equipoise.compress.importance import FROM_GRADIENTS, Importance, slice_scores
from equipoise.spec import Array

Losses = Callable[[Any], Iterable[Any]]
"""Runs a module over samples: one loss per sample, as it is asked for."""


def channel_scores(
    module: Any,
    couplings: Sequence[Coupling],
    *,
    importance: Importance,
    norms: Mapping[str, str],
    losses: Losses,
) -> dict[str, Array]:
    """Score every channel of every coupling.

    Measures of weights and activations have a unit of their own in each tensor, so each tensor's
    scores are divided by their mean before they are added; measures of the loss all have one unit.
    What a batch norm multiplies a channel by counts as part of the weights before it: by
    themselves these may have any size.

    Args:
        module: In evaluation mode. It is not changed.
        couplings: What to score.
        importance: The measure.
        norms: Layer -> the batch norm that alone follows it.
        losses: For the measures that need samples.

    Returns:
        Name of each coupling -> float64 [width].

    Raises:
        DataError: The measure needs samples and there are none.
    """
    from_weights = importance not in FROM_GRADIENTS
    scored = _folded(module, norms) if from_weights else module
    left_out = set(norms.values()) if from_weights else set()
    members = {
        coupling.name: [m for m in coupling.members if m.module not in left_out]
        for coupling in couplings
    }
    axes: dict[str, list[int]] = defaultdict(list)
    for name, axis, _ in (a for ms in members.values() for m in ms for a in _axes(scored, m)):
        axes[name].append(axis)
    slices = slice_scores(scored, importance, axes=axes, losses=losses(scored))
    return {
        coupling.name: _summed(
            coupling.width,
            [a for m in members[coupling.name] for a in _axes(scored, m)],
            {key: value.numpy() for key, value in slices.items()},
            divided=from_weights,
        )
        for coupling in couplings
    }


def _folded(module: Any, norms: Mapping[str, str]) -> Any:
    """A copy in which the scale of a batch norm is part of the layer before it.

    It computes the same: the norm's own scale becomes 1, and its mean goes along.
    """
    torch = extras.require("torch")
    folded = copy.deepcopy(module)
    for name, norm_name in norms.items():
        layer, norm = folded.get_submodule(name), folded.get_submodule(norm_name)
        if not norm.affine or norm.running_var is None:
            continue
        deviation = (norm.running_var + norm.eps).sqrt()
        with torch.no_grad():
            scale = norm.weight / deviation
            _scale_rows(layer, scale)
            norm.running_mean.mul_(scale)
            norm.weight.copy_(deviation)
    return folded


def _scale_rows(layer: Any, scale: Any) -> None:
    axis = 1 if getattr(layer, "transposed", False) and layer.groups == 1 else 0
    shape = [1] * layer.weight.ndim
    shape[axis] = -1
    layer.weight.mul_(scale.view(shape))
    if layer.bias is not None:
        layer.bias.mul_(scale)


def _axes(module: Any, member: Member) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Parameters that a member has: name, axis, and the channel of each index."""
    if member.role == "parameter":
        yield member.module, member.axis, member.channels
        return
    layer = module.get_submodule(member.module)
    weight = getattr(layer, "weight", None)
    if weight is None:
        return
    name = f"{member.module}.weight"
    transposed = getattr(layer, "transposed", False) and member.role != "depthwise"
    if member.role == "inputs":
        # Of a grouped convolution an index of this axis is an input of every group at once.
        if getattr(layer, "groups", 1) == 1:
            yield name, 0 if transposed else 1, member.channels
        return
    axis = 1 if transposed or member.role == "embedding" else 0
    yield name, axis, member.channels
    if getattr(layer, "bias", None) is not None:
        yield f"{member.module}.bias", 0, member.channels


def _summed(
    width: int,
    axes: Sequence[tuple[str, int, tuple[int, ...]]],
    slices: Mapping[tuple[str, int], Array],
    *,
    divided: bool,
) -> Array:
    """float64 [width]: what the slices of each channel add up to."""
    total = np.zeros(width)
    for name, axis, channels in axes:
        if (name, axis) not in slices:
            continue  # a parameter of two names is scored under the first
        index = np.array(channels)
        mine = index != NO_CHANNEL
        added = np.bincount(index[mine], weights=slices[name, axis][mine], minlength=width)
        mean = added.mean()
        total += added / mean if divided and mean > 0 else added
    return total
