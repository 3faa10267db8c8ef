"""What the channels that are kept can make up for of those that are cut.

A linear layer whose inputs are cut gave ``W x``; what is left gives ``W_k x_k``. The best that the
kept inputs can do is to stand in for the others as far as they tell what those are:

    W' = W_k + W_d C_dk (C_kk + r I)^-1

with C = E[x x^T] over samples, k the inputs kept and d those dropped: ridge regression of
``W_d x_d`` on ``x_k``, so that for large r nothing is made up for. With a bias C is centred and
the bias takes what the means leave. It is the least-squares step of channel pruning (He, Zhang, Sun
2017, equation 3) with fixed channels, and of optimal brain surgery for a group of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from equipoise import extras
from equipoise.compress.importance import input_rows, is_layer, is_transposed
from equipoise.compress.transformer.axes import Axis, AxisMap
from equipoise.compress.transformer.cut import Kept, kept_of

_RIDGE: Final = 1e-2
"""r over the mean of the diagonal of C_kk. Losses are flat from 1e-3 to 3e-2."""
_MOST_BYTES: Final = 1 << 30
"""Of products of inputs held at a time; what needs more is gathered in several passes."""


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A layer whose inputs are cut.

    Attributes:
        name: Of the module.
        layer: The module.
        kept: int64, its inputs that stay.
    """

    name: str
    layer: Any
    kept: Any

    @property
    def inputs(self) -> int:
        weight = self.layer.weight
        return int(weight.shape[0 if is_transposed(self.layer) else 1])


def refitted(module: Any, axes: AxisMap, *, kept: Kept, run: Callable[[], int]) -> dict[str, Any]:
    """The tensors of ``module`` with what its kept channels can make up for.

    Shapes are as before: cut the result afterwards. Weights of inputs that go are as before.

    Args:
        module: The model; it is not changed.
        axes: Its axes.
        kept: The channels that will be kept.
        run: Runs the forward passes over the samples.
    """
    tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    for targets in _passes(_targets(module, axes, kept)):
        for target, (second, mean) in zip(targets, _moments(targets, run), strict=True):
            _solve(target, tensors, second=second, mean=mean)
    return tensors


def _targets(module: Any, axes: AxisMap, kept: Kept) -> list[_Target]:
    found = []
    for axis in axes.axes:
        owner, _, leaf = axis.tensor.rpartition(".")
        layer = module.get_submodule(owner)
        if (
            leaf == "weight"
            and _is_linear(layer)
            and axis.axis == (0 if is_transposed(layer) else 1)
        ):
            channels = kept_of(kept, axis)
            width = axes.shape.width(axis.width)
            if channels is not None and len(channels) < width and _is_whole(axis, layer, width):
                inputs = axis.positions(channels, of=width).flatten()
                found.append(_Target(name=owner, layer=layer, kept=inputs))
    return found


def _is_linear(layer: Any) -> bool:
    return is_layer(layer) and not hasattr(layer, "kernel_size")


def _is_whole(axis: Axis, layer: Any, width: int) -> bool:
    inputs = layer.weight.shape[axis.axis]
    return bool(axis.blocks * axis.unit * width == inputs)


def _passes(targets: list[_Target]) -> Iterator[list[_Target]]:
    """Targets in groups whose products fit into memory together."""
    group: list[_Target] = []
    held = 0
    for target in targets:
        size = 8 * target.inputs**2
        if group and held + size > _MOST_BYTES:
            yield group
            group, held = [], 0
        group.append(target)
        held += size
    if group:
        yield group


def _moments(targets: list[_Target], run: Callable[[], int]) -> list[tuple[Any, Any]]:
    """E[x x^T] and E[x] of the inputs of each target, float64."""
    torch = extras.require("torch")
    sums = [torch.zeros(t.inputs, t.inputs, dtype=torch.float64) for t in targets]
    means = [torch.zeros(t.inputs, dtype=torch.float64) for t in targets]
    counts = [0] * len(targets)

    def hook(index: int) -> Callable[..., None]:
        def add(layer: Any, inputs: tuple[Any, ...]) -> None:
            rows = input_rows(layer, inputs[0].detach())
            sums[index] += rows.T @ rows
            means[index] += rows.sum(0)
            counts[index] += len(rows)

        return add

    handles = [t.layer.register_forward_pre_hook(hook(i)) for i, t in enumerate(targets)]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [(s / max(1, n), m / max(1, n)) for s, m, n in zip(sums, means, counts, strict=True)]


def _solve(target: _Target, tensors: Mapping[str, Any], *, second: Any, mean: Any) -> None:
    """Write the refitted weight, and bias where there is one, into ``tensors``."""
    torch = extras.require("torch")
    kept, weight = target.kept, tensors[f"{target.name}.weight"]
    matrix = (weight.T if is_transposed(target.layer) else weight).double()
    gone = torch.ones(target.inputs, dtype=torch.bool)
    gone[kept] = False
    bias = tensors.get(f"{target.name}.bias")
    if bias is not None:
        second = second - torch.outer(mean, mean)
    inner = second[kept][:, kept]
    ridge = _RIDGE * inner.diagonal().mean().clamp_min(1e-12)
    solved = torch.linalg.solve(inner + ridge * torch.eye(len(kept)), second[kept][:, gone])
    added = matrix[:, gone] @ solved.T
    matrix[:, kept] += added
    weight.copy_(matrix.T if is_transposed(target.layer) else matrix)
    if bias is not None:
        bias += matrix[:, gone] @ mean[gone] - added @ mean[kept]
