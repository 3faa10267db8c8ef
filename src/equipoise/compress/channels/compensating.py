"""What the channels that stay can make up for, and the statistics of batch norms after a cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np

from equipoise import extras
from equipoise.compress.channels.calls import is_convolution
from equipoise.compress.channels.coupling import Coupling, Kept, index_masks
from equipoise.compress.importance import input_rows
from equipoise.spec import Array

_RIDGE: Final = 1e-2
_MOST_POSITIONS: Final = 4096
"""Of one call: the moments of a picture's every position are hardly better than of some."""
_MOST_INPUTS: Final = 8192
"""A layer of more has a matrix of moments beyond half a gigabyte, and is left as it is."""


def compensate_(
    module: Any, couplings: Iterable[Coupling], *, kept: Kept, run: Callable[[], object]
) -> tuple[str, ...]:
    """Change the weights of channels that stay so that they stand in for the others. In place.

    A layer that gave ``W x`` is left with ``W_k x_k``. Ridge regression of what goes on what stays,

        W' = W_k + W_d C_dk (C_kk + r I)^-1,    C = E[x x^T] over samples and positions,

    is the least-squares step of channel pruning (He, Zhang, Sun 2017, equation 3) for given
    channels, with one matrix for all positions of a kernel. Cut the module afterwards.

    Args:
        module: In evaluation mode.
        couplings: What is cut.
        kept: What stays of it.
        run: Runs the module over the samples.

    Returns:
        Names of the layers that were changed.
    """
    masks = index_masks(couplings, kept)
    targets = {
        name: mask
        for (name, role, _), mask in masks.items()
        if role == "inputs" and not mask.all() and _can(module.get_submodule(name), mask)
    }
    moments = _moments(module, list(targets), run)
    for name in moments:
        _solve(module.get_submodule(name), targets[name], moments[name])
    return tuple(moments)


def _can(layer: Any, mask: Array) -> bool:
    plain = not is_convolution(layer) or (layer.groups == 1 and not layer.transposed)
    return plain and len(mask) <= _MOST_INPUTS


def _moments(module: Any, names: list[str], run: Callable[[], object]) -> dict[str, Any]:
    """E[x x^T] of the inputs of each layer that runs, float64 [inputs, inputs]."""
    torch = extras.require("torch")
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(layer: Any, inputs: tuple[Any, ...]) -> None:
            rows = input_rows(layer, inputs[0].detach())
            rows = rows[:: -(-len(rows) // _MOST_POSITIONS)].double()
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    handles = [module.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] / counts[name] for name in sums}


def _solve(layer: Any, mask: Array, second: Any) -> None:
    """Add to the weights of the inputs that stay what they explain of the others."""
    torch = extras.require("torch")
    stays, goes = (torch.from_numpy(np.flatnonzero(m)) for m in (mask, ~mask))
    inner = second[stays][:, stays]
    ridge = _RIDGE * inner.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(stays), dtype=torch.float64)
    explained = torch.linalg.solve(inner + ridge * identity, second[stays][:, goes])  # [k, d]
    weight = layer.weight.data
    added = torch.einsum("od...,kd->ok...", weight[:, goes].double(), explained)
    weight[:, stays] += added.to(weight.dtype)


def has_batch_norms(module: Any) -> bool:
    """Whether any statistics can be estimated anew."""
    return bool(_batch_norms(module))


def _batch_norms(module: Any) -> list[Any]:
    batch: Any = extras.require("torch.nn.modules.batchnorm")
    kind = batch._BatchNorm  # noqa: SLF001 - the class of all batch norms
    return [m for m in module.modules() if isinstance(m, kind) and m.track_running_stats]


def reestimate_(module: Any, *, run: Callable[[], int]) -> None:
    """Estimate mean and variance of every batch norm anew, as the mean over batches. In place.

    After a cut the inputs of the layers behind it have other statistics (EagleEye: Li, Wu, Su,
    Wang 2020, section 3.3).

    Args:
        module: In evaluation mode, and left so.
        run: Runs the module over batches of samples.
    """
    torch = extras.require("torch")
    with torch.no_grad(), _estimating(module):
        run()


@contextlib.contextmanager
def _estimating(module: Any) -> Iterator[None]:
    norms = _batch_norms(module)
    momenta = [norm.momentum for norm in norms]
    counts = [int(norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.fill_(count)
            norm.eval()
