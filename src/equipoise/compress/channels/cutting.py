"""Cutting indices out of the tensors of a module, and zeroing them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from equipoise import extras
from equipoise.compress.channels.calls import is_convolution, is_depthwise
from equipoise.compress.channels.coupling import Coupling, Kept, index_masks
from equipoise.compress.channels.heads import cut_heads_
from equipoise.spec import Array


def cut_(module: Any, couplings: Iterable[Coupling], kept: Kept) -> None:
    """Make ``module`` narrower: only what ``kept`` says stays of each coupling. In place."""
    masks = index_masks(couplings, kept)
    for (name, role, axis), mask in masks.items():
        if role == "parameter":
            _cut_parameter(module, name, axis=axis, mask=mask)
        elif role == "heads":
            cut_heads_(module.get_submodule(name), mask)
        elif role != "inputs":
            inputs = masks.get((name, "inputs", 0))
            _cut_layer(module.get_submodule(name), inputs=inputs, outputs=mask)
        elif (name, "outputs", 0) not in masks:
            _cut_layer(module.get_submodule(name), inputs=mask, outputs=None)


def mask_(module: Any, couplings: Iterable[Coupling], kept: Kept) -> None:
    """Let nothing of ``module`` look at the channels that do not stay. In place.

    The weights that lead from them become zero, so that its outputs are those of the same module
    without these channels.
    """
    for (name, role, _), mask in index_masks(couplings, kept).items():
        if role == "inputs":
            layer = module.get_submodule(name)
            for index in np.flatnonzero(~mask):
                input_slice(layer, int(index)).zero_()


def input_slice(layer: Any, index: int) -> Any:
    """The weights of a layer that lead from input ``index``: a view."""
    weight = layer.weight.data
    if getattr(layer, "transposed", False):
        return weight[index]
    groups = getattr(layer, "groups", 1)
    outputs, inputs = len(weight) // groups, weight.shape[1]
    group = index // inputs
    return weight[group * outputs : (group + 1) * outputs, index % inputs]


def _cut_parameter(module: Any, name: str, *, axis: int, mask: Array) -> None:
    owner, _, key = name.rpartition(".")
    holder = module.get_submodule(owner)
    setattr(holder, key, _selected(getattr(holder, key), mask, axis=axis))


def _selected(parameter: Any, mask: Array, *, axis: int) -> Any:
    """``parameter`` with the indices of one axis that stay, as a new parameter or buffer."""
    torch = extras.require("torch")
    index = torch.from_numpy(np.flatnonzero(mask)).to(parameter.device)
    value = parameter.detach().index_select(axis, index)
    if not isinstance(parameter, torch.nn.Parameter):
        return value
    return torch.nn.Parameter(value, requires_grad=parameter.requires_grad)


def _cut_layer(layer: Any, *, inputs: Array | None, outputs: Array | None) -> None:
    torch = extras.require("torch")
    if is_depthwise(layer):
        _cut_depthwise(layer, outputs)
    elif is_convolution(layer):
        _cut_convolution(layer, inputs=inputs, outputs=outputs)
    elif isinstance(layer, torch.nn.Linear):
        _cut_linear(layer, inputs=inputs, outputs=outputs)
    elif isinstance(layer, torch.nn.Embedding):
        layer.weight = _selected(layer.weight, _given(outputs), axis=1)
        layer.embedding_dim = layer.weight.shape[1]
    else:
        _cut_norm(layer, _given(outputs))


def _given(mask: Array | None) -> Array:
    if mask is None:
        raise TypeError("a layer that has no inputs of its own was asked to cut them")
    return mask


def _cut_depthwise(layer: Any, mask: Array | None) -> None:
    _cut(layer, "weight", _given(mask))
    _cut(layer, "bias", _given(mask))
    layer.groups = layer.in_channels = layer.out_channels = len(layer.weight)


def _cut(layer: Any, name: str, mask: Array, *, axis: int = 0) -> None:
    if getattr(layer, name, None) is not None:
        setattr(layer, name, _selected(getattr(layer, name), mask, axis=axis))


def _cut_linear(layer: Any, *, inputs: Array | None, outputs: Array | None) -> None:
    if inputs is not None:
        _cut(layer, "weight", inputs, axis=1)
    if outputs is not None:
        _cut(layer, "weight", outputs)
        _cut(layer, "bias", outputs)
    layer.out_features, layer.in_features = layer.weight.shape


def _cut_convolution(layer: Any, *, inputs: Array | None, outputs: Array | None) -> None:
    out, into = (1, 0) if layer.transposed else (0, 1)
    if inputs is not None and layer.groups == 1:
        _cut(layer, "weight", inputs, axis=into)
    elif inputs is not None:
        layer.weight = _grouped(layer, inputs)
    if outputs is not None:
        _cut(layer, "weight", outputs, axis=out)
        _cut(layer, "bias", outputs)
    layer.out_channels = layer.weight.shape[out]
    layer.in_channels = layer.weight.shape[into] * layer.groups


def _grouped(layer: Any, mask: Array) -> Any:
    """Every group of a convolution has inputs of its own, and loses as many as any other."""
    torch = extras.require("torch")
    rows = layer.weight.chunk(layer.groups)
    masks = np.split(mask, layer.groups)
    parts = [_selected(r, m, axis=1).detach() for r, m in zip(rows, masks, strict=True)]
    return torch.nn.Parameter(torch.cat(parts), requires_grad=layer.weight.requires_grad)


def _cut_norm(layer: Any, mask: Array) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        _cut(layer, name, mask)
    for name in ("num_features", "num_channels", "num_parameters"):
        if hasattr(layer, name):
            setattr(layer, name, int(mask.sum()))
    if hasattr(layer, "normalized_shape"):
        layer.normalized_shape = (int(mask.sum()),)
