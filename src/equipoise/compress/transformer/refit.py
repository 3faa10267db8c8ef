"""What the channels that are kept can make up for of those that are cut.

A linear layer whose inputs are cut gave ``W x``; what is left gives ``W_k x_k``. The best that the
kept inputs can do is to stand in for the others as far as they tell what those are:

    W' = W_k + W_d C_dk (C_kk + r I)^-1

with C = E[x x^T] over positions, k the inputs kept and d those dropped: ridge regression of
``W_d x_d`` on ``x_k``, so that for large r nothing is made up for. With a bias C is centred and
the bias takes what the means leave. It is the least-squares step of channel pruning (He, Zhang, Sun
2017, equation 3) with fixed channels.

Each position counts by one over the squared norm of what the layer gives there, so that it is the
relative error that is least. Transformers give some positions, such as the first and separators,
values so large that a plain mean fits them alone, and spoils the rest.
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
"""r over the mean of the diagonal of C_kk."""
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
        run: Runs the forward passes over the samples, and says how many there were.
    """
    tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    for targets in _passes(_targets(module, axes, kept)):
        for target, moments in zip(targets, _moments(targets, run), strict=True):
            _solve(target, tensors, moments)
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


class _Moments:
    """Weighted E[x x^T] and E[x] of the inputs of one layer, float64."""

    def __init__(self, inputs: int) -> None:
        torch = extras.require("torch")
        self._second = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._first = torch.zeros(inputs, dtype=torch.float64)
        self._total = 0.0

    def add(self, rows: Any, weights: Any) -> None:
        """Rows [positions, inputs] with a weight each."""
        weighted = rows * weights[:, None]
        self._second += rows.T @ weighted
        self._first += weighted.sum(0)
        self._total += float(weights.sum())

    def centred(self, *, about_mean: bool) -> tuple[Any, Any]:
        """Second moments, about the mean where there is a bias to take it; and the mean."""
        torch = extras.require("torch")
        total = self._total or 1.0
        second, mean = self._second / total, self._first / total
        return (second - torch.outer(mean, mean) if about_mean else second), mean


def _moments(targets: list[_Target], run: Callable[[], int]) -> list[_Moments]:
    """Moments of the inputs of each target over all samples."""
    torch = extras.require("torch")
    found = [_Moments(target.inputs) for target in targets]

    def hook(moments: _Moments) -> Callable[..., None]:
        def see(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
            moments.add(input_rows(layer, inputs[0]), _weights(output))

        return see

    handles = [t.layer.register_forward_hook(hook(m)) for t, m in zip(targets, found, strict=True)]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _weights(output: Any) -> Any:
    """One over the squared norm of what a layer gives at each position, [positions]."""
    rows = output.reshape(-1, output.shape[-1])
    return 1 / rows.square().sum(-1).clamp_min(1e-12)


def _solve(target: _Target, tensors: Mapping[str, Any], moments: _Moments) -> None:
    """Write the refitted weight, and bias where there is one, into ``tensors``."""
    torch = extras.require("torch")
    kept, weight = target.kept, tensors[f"{target.name}.weight"]
    bias = tensors.get(f"{target.name}.bias")
    matrix = (weight.T if is_transposed(target.layer) else weight).double()
    gone = torch.ones(target.inputs, dtype=torch.bool)
    gone[kept] = False
    second, mean = moments.centred(about_mean=bias is not None)
    inner = second[kept][:, kept]
    ridge = _RIDGE * inner.diagonal().mean().clamp_min(1e-12)
    factor = torch.linalg.cholesky(inner + ridge * torch.eye(len(kept)))
    added = matrix[:, gone] @ torch.cholesky_solve(second[kept][:, gone], factor).T
    matrix[:, kept] += added
    weight.copy_(matrix.T if is_transposed(target.layer) else matrix)
    if bias is not None:
        bias += matrix[:, gone] @ mean[gone] - added @ mean[kept]
