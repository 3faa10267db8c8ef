"""Fake quantisation: a module computes in float what its int8 file computes in integers.

Layers round their input, weight, bias and output to the grids of the quantised file, and gradients
go through the rounding as if it were not there (straight-through estimator, Bengio, Léonard,
Courville 2013), but not to values that a grid cuts off. Weights stay in float as they are stored;
keys of the state do not change. What is measured on such a module is simulated.

    with attach(module, ranges) as attached:
        ...train...
        ranges = attached.ranges()

A batch normalisation that the export folds into a convolution is folded here too, with its
statistics as they are: the weight is rounded as the file stores it, and the scale and bias of the
normalisation go on learning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from equipoise import extras
from equipoise.errors import RecipeError
from equipoise.sources.module_grids import (
    ActivationGrid,
    ModuleGrid,
    ModuleRanges,
    Skipped,
    WeightForm,
    with_scales,
)

_SMALLEST_SCALE: Final = 2.0**-60
_BIAS_MOST: Final = 2.0**30
"""A bias fills half of int32 at most; see ``quantize/qdq.py``."""

_SAME: Final = 1e-4
"""Largest relative difference of two computations of one folded weight in float32."""

_TRANSPOSED: Final = "Conv1D"
"""A product of transformers whose weight is ``[inputs, outputs]``."""


def attach(module: Any, ranges: ModuleRanges, *, learn_scales: bool = False) -> Attached:
    """Let the layers of ``module`` compute as the quantised file does, until ``remove``.

    Args:
        module: The ``torch.nn.Module`` that ``load_module`` gives, with the weights that were
            exported.
        ranges: Its grids.
        learn_scales: Learn the scales of activations too (LSQ; Esser et al. 2020, arXiv
            1902.08153). Their parameters are ``Attached.scales``, not the module's: who trains
            has to hold them beside it.

    Raises:
        RecipeError: No layer has these weights, the module is under fake quantisation already, or
            scales have to be powers of two and cannot be learned.
    """
    if any(isinstance(m.__dict__.get("forward"), _Layer | _Passed) for m in module.modules()):
        raise RecipeError(
            "the module is under fake quantisation already",
            hint="Call remove() of what attach() returned before.",
        )
    if learn_scales and any(grid.weight.power_of_two for grid in ranges.modules):
        raise RecipeError(
            "scales of this target are powers of two, which cannot be learned step by step",
            hint="Train with the fixed ranges.",
        )
    found = _Finder(module).find(ranges.modules)
    if not found.layers:
        reason = found.skipped[0].reason if found.skipped else "there are none"
        raise RecipeError(
            f"none of the {len(ranges.modules)} layers with ranges is in this module: {reason}",
            hint="Give the ranges of the file that was exported from this very module.",
        )
    return Attached(ranges, found, scales=_Scales(ranges, learned=learn_scales))


class Attached:
    """Layers under fake quantisation.

    Attributes:
        modules: Dotted names of the layers.
        folded: Dotted name of a layer -> that of the batch normalisation folded into it.
        skipped: Layers with ranges that are not simulated, and why.
        scales: ``torch.nn.Module`` with the scales that are learned; None when none are. Its
            parameters have to be optimised, saved and shared between processes by who trains.
    """

    def __init__(self, ranges: ModuleRanges, found: _Found, *, scales: _Scales) -> None:
        self._ranges, self._found, self._scales = ranges, found, scales
        self.modules = tuple(one.name for one in found.layers)
        self.folded = {one.name: one.norm_name for one in found.layers if one.norm is not None}
        self.skipped = found.skipped
        self.scales = scales.module
        self._layers = {one.name: _Layer(one, scales) for one in found.layers}
        self._hooks: list[Any] = []
        self._put_in()

    def _put_in(self) -> None:
        for one in self._found.layers:
            one.layer.forward = self._layers[one.name]
            # PyTorch's fused encoder layer calls none of its modules, unless one has a hook.
            self._hooks.append(one.layer.register_forward_pre_hook(_look_on))
            if one.norm is not None:
                one.norm.forward = _Passed(one.norm)

    def unused(self) -> tuple[str, ...]:
        """Layers that did not run since: code that takes their weights alone is not simulated."""
        return tuple(name for name, layer in self._layers.items() if not layer.calls)

    def ranges(self) -> ModuleRanges:
        """The ranges with the scales as they are now."""
        return with_scales(self._ranges, self._scales.now())

    def remove(self) -> None:
        """Put everything back; a second time it does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        for one in self._found.layers:
            for owner in (one.layer, one.norm):
                if owner is not None:
                    owner.__dict__.pop("forward", None)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _look_on(_module: Any, _arguments: object) -> None:
    """A hook that does nothing."""


# Which module a grid is of.


@dataclass(frozen=True, kw_only=True, eq=False)
class _Placed:
    """A layer, the normalisation that is folded into it, and their grids."""

    name: str
    layer: Any
    grid: ModuleGrid
    norm_name: str = ""
    norm: Any = None


@dataclass(frozen=True, kw_only=True)
class _Found:
    layers: tuple[_Placed, ...]
    skipped: tuple[Skipped, ...]


class _Finder:
    """Finds layers by name and knows them by their weights.

    The name of a folded convolution in a graph may be that of its normalisation or its own. Which
    two belong together is told by the weights: the largest of each channel, after folding.
    """

    def __init__(self, module: Any) -> None:
        self._modules = dict(module.named_modules())
        self._order = list(self._modules)
        self._taken: set[str] = set()

    def find(self, grids: Iterable[ModuleGrid]) -> _Found:
        layers: list[_Placed] = []
        skipped: list[Skipped] = []
        for grid in grids:
            found = self._one(grid)
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                layers.append(found)
                self._taken.update({found.name, found.norm_name} - {""})
        return _Found(layers=tuple(layers), skipped=tuple(skipped))

    def _one(self, grid: ModuleGrid) -> _Placed | Skipped:
        named = [n for n in (grid.module, grid.place) if n and n in self._modules]
        layers = [n for n in named if _is_layer(self._modules[n])]
        if layers and self._is_bypassed(layers[0]):
            reason = "the module around it takes its weight and does not call it"
            return Skipped(name=layers[0], operator="Linear", reason=reason)
        norms = [n for n in named if _is_norm(self._modules[n])]
        pairs = list(self._pairs(layers[:1], norms[:1], channels=len(grid.largest)))
        best = min(pairs, key=lambda pair: self._distance(*pair, grid=grid), default=("", ""))
        if not pairs or self._distance(*best, grid=grid) > _SAME:
            kind = type(self._modules[named[0]]).__name__ if named else "missing"
            return Skipped(name=grid.module, operator=kind, reason=_no_layer(named, layers, norms))
        name, norm = best
        return _Placed(
            name=name,
            layer=self._modules[name],
            grid=grid,
            norm_name=norm,
            norm=self._modules[norm] if norm else None,
        )

    def _is_bypassed(self, name: str) -> bool:
        around = self._modules[name.rpartition(".")[0]] if name else None
        return isinstance(around, extras.require("torch").nn.MultiheadAttention)

    def _pairs(
        self, layers: list[str], norms: list[str], *, channels: int
    ) -> Iterator[tuple[str, str]]:
        """A layer and the normalisation that may be in it, the likeliest first."""
        if layers and norms:
            yield layers[0], norms[0]
        elif layers:
            yield layers[0], ""
            yield from ((layers[0], norm) for norm in self._norms_after(layers[0], channels))
        elif norms:
            yield from ((layer, norms[0]) for layer in self._layers_before(norms[0], channels))

    def _norms_after(self, name: str, channels: int) -> list[str]:
        names = self._order[self._order.index(name) :]
        return [
            n
            for n in names
            if n not in self._taken
            and _is_norm(self._modules[n])
            and len(self._modules[n].running_var) == channels
        ]

    def _layers_before(self, name: str, channels: int) -> list[str]:
        names = self._order[: self._order.index(name)][::-1]
        return [
            n
            for n in names
            if n not in self._taken
            and _is_layer(self._modules[n])
            and _rows(self._modules[n]).shape[0] == channels
        ]

    def _distance(self, name: str, norm: str, *, grid: ModuleGrid) -> float:
        """Relative difference of the largest weights from those of the graph."""
        torch = extras.require("torch")
        magnitudes = _rows(self._modules[name]).detach().abs().amax(dim=1).double().cpu()
        if norm:
            factor = _factor(self._modules[norm]).detach().abs().double().cpu()
            if factor.shape != magnitudes.shape:
                return float("inf")
            magnitudes = magnitudes * factor
        wanted = torch.tensor(grid.largest, dtype=torch.float64)
        if wanted.shape != magnitudes.shape:
            return float("inf")
        return float((magnitudes - wanted).abs().max() / wanted.max().clamp_min(1e-30))


def _no_layer(named: list[str], layers: list[str], norms: list[str]) -> str:
    if not named:
        return "the module has nothing of this name"
    if not layers and not norms:
        return "it is no linear layer or convolution: its code takes weights by itself"
    return "its weights are not those that were exported"


def _is_layer(module: Any) -> bool:
    nn = extras.require("torch").nn
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) or _is_transposed(module)


def _is_transposed(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__ == _TRANSPOSED and getattr(weight, "ndim", 0) == 2


def _is_norm(module: Any) -> bool:
    """Any batch normalisation with statistics, with frozen ones or an activation behind it too."""
    names = ("running_mean", "running_var", "eps", "weight", "bias")
    return all(hasattr(module, name) for name in names) and module.running_var is not None


def _rows(layer: Any) -> Any:
    """Weight as ``[channels, inputs]``."""
    weight = layer.weight.t() if _is_transposed(layer) else layer.weight
    return weight.flatten(1)


def _factor(norm: Any) -> Any:
    """``[channels]``: what a batch normalisation multiplies each channel by."""
    torch = extras.require("torch")
    factor = torch.rsqrt(norm.running_var.float() + norm.eps)
    return factor if norm.weight is None else norm.weight.float() * factor


# Rounding.


class _Scales:
    """The scale of each activation: a constant, or a parameter that is learned.

    The gradient of a scale is multiplied by ``1 / sqrt(values * largest integer)`` (Esser et al.
    2020, section 2.2).
    """

    def __init__(self, ranges: ModuleRanges, *, learned: bool) -> None:
        torch = extras.require("torch")
        grids = [g for m in ranges.modules for g in (m.input, m.output) if g is not None]
        self._first = {grid.activation: grid.scale for grid in grids}
        self._index = {name: i for i, name in enumerate(self._first)}
        self._constants: dict[tuple[str, str], Any] = {}
        self.module = None
        if learned:
            # A name of a tensor is no name of a parameter: it may hold dots.
            values = [torch.nn.Parameter(torch.tensor(s)) for s in self._first.values()]
            self.module = torch.nn.ParameterList(values)

    def of(self, grid: ActivationGrid, *, values: Any) -> Any:
        """The scale for ``values``, a float32 scalar on their device."""
        if self.module is None:
            return self._constant(grid.activation, values.device)
        scale = self.module[self._index[grid.activation]].clamp_min(_SMALLEST_SCALE)
        most = max(grid.high - grid.zero_point, grid.zero_point - grid.low)
        share = (values.numel() * most) ** -0.5
        return scale * share + (scale - scale * share).detach()

    def _constant(self, name: str, device: Any) -> Any:
        key = (name, str(device))
        if key not in self._constants:
            torch = extras.require("torch")
            self._constants[key] = torch.tensor(self._first[name], device=device)
        return self._constants[key]

    def now(self) -> dict[str, float]:
        """Activation -> its scale, where scales are learned."""
        if self.module is None:
            return {}
        return {
            name: max(float(self.module[index].detach()), _SMALLEST_SCALE)
            for name, index in self._index.items()
        }


def _rounded(steps: Any, low: float, high: float) -> Any:
    """Nearest integers within bounds, halves to even; the gradient of the clipping alone."""
    clipped = steps.clamp(low, high)
    return clipped + (clipped.round() - clipped).detach()


def round_activation(values: Any, grid: ActivationGrid, *, scale: Any) -> Any:
    """``values`` as they come back from ``grid``, as ONNX's Q and DQ do it in float32.

    Args:
        values: float32 tensor.
        grid: Its zero point and integers.
        scale: float32 scalar tensor; it may be learned.
    """
    low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
    return _rounded(values / scale, low, high) * scale


def weight_scale(rows: Any, form: WeightForm) -> Any:
    """The scale of each channel of a weight; no gradient goes through it.

    Args:
        rows: ``[channels, inputs]``.
        form: How a scale follows from them.

    Returns:
        float32 ``[channels, 1]``, or ``[1, 1]`` for one scale.
    """
    torch = extras.require("torch")
    rows = rows.detach()
    reach = rows.abs().amax(dim=1, keepdim=True)
    reach = reach if form.per_channel else reach.max().reshape(1, 1)
    if form.share:
        reach = reach * reach.new_tensor(form.share).reshape(-1, 1)
    scale = (reach / _most(form)).clamp_min(_SMALLEST_SCALE)
    scale = torch.where(reach == 0, torch.ones_like(scale), scale)
    return _fitting_power(rows, scale, form=form) if form.power_of_two else scale


def _fitting_power(rows: Any, scale: Any, *, form: WeightForm) -> Any:
    """The next powers of two, or half of them all where clipping a few weights costs less."""
    above = _power_of_two_above(scale)
    errors = [
        (_rounded(rows / one, -_most(form), _most(form)) * one - rows).square().sum()
        for one in (above, above / 2)
    ]
    return above / 2 if errors[1] < errors[0] else above


def _power_of_two_above(scale: Any) -> Any:
    torch = extras.require("torch")
    fraction, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(fraction), exponent - (fraction == 0.5).int())


def _most(form: WeightForm) -> int:
    return int(2 ** (form.bits - 1) - 1)


class _Passed:
    """Forward of a normalisation that has been folded: what is behind it in the module, alone."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm

    def __call__(self, values: Any, *_: object) -> Any:
        """``values``, through the dropout and activation that some such modules hold."""
        for name in ("drop", "act"):
            step = getattr(self._norm, name, None)
            values = values if step is None else step(values)
        return values


class _Layer:
    """Forward of a layer on its grids.

    It is an object and not a closure so that a deep copy of the module refers to the copy.
    """

    def __init__(self, placed: _Placed, scales: _Scales) -> None:
        self._layer, self._norm, self._grid = placed.layer, placed.norm, placed.grid
        self._scales = scales
        self.calls = 0

    def __call__(self, values: Any) -> Any:
        """The output for a float tensor, in float32 whatever autocast says."""
        torch = extras.require("torch")
        self.calls += 1
        with torch.autocast(values.device.type, enabled=False):
            return self._run(values.float())

    def _run(self, values: Any) -> Any:
        grid = self._grid
        input_scale = self._scales.of(grid.input, values=values)
        values = round_activation(values, grid.input, scale=input_scale)
        weight, bias = self._folded()
        rows = weight.flatten(1)
        scale = self._roomy(weight_scale(rows, grid.weight), bias, input_scale)
        weight = (_rounded(rows / scale, -_most(grid.weight), _most(grid.weight)) * scale).reshape(
            weight.shape
        )
        if bias is not None and grid.integer_bias:
            step = (input_scale * scale).detach().flatten()
            bias = bias + ((bias / step).round() * step - bias).detach()
        return self._finished(values, weight, bias)

    def _finished(self, values: Any, weight: Any, bias: Any) -> Any:
        """The layer's own forward on rounded tensors, and the rounding of what it gives."""
        grid = self._grid
        if grid.output is None:
            return self._forward(values, weight, bias)
        output = self._forward(values, weight, None if grid.output_before_bias else bias)
        scale = self._scales.of(grid.output, values=output)
        output = round_activation(output, grid.output, scale=scale)
        return output + bias if grid.output_before_bias and bias is not None else output

    def _forward(self, values: Any, weight: Any, bias: Any) -> Any:
        """The module's own code, with other tensors for its weight and bias while it runs."""
        layer = self._layer
        # A call of the module would run its hooks a second time.
        kept = layer.__dict__["_parameters"]
        weight = weight.t() if _is_transposed(layer) else weight
        if _is_transposed(layer) and bias is None:
            bias = weight.new_zeros(weight.shape[1])
        layer.__dict__["_parameters"] = {**kept, "weight": weight, "bias": bias}
        try:
            return type(layer).forward(layer, values)
        finally:
            layer.__dict__["_parameters"] = kept

    def _folded(self) -> tuple[Any, Any]:
        """Weight ``[channels, ...]`` and bias, with the normalisation in them; None for no bias."""
        layer, norm = self._layer, self._norm
        weight = layer.weight.t() if _is_transposed(layer) else layer.weight
        weight, bias = weight.float(), None if layer.bias is None else layer.bias.float()
        if norm is None:
            return weight, bias
        factor = _factor(norm)
        mean = norm.running_mean.float() if bias is None else norm.running_mean.float() - bias
        shift = -mean * factor if norm.bias is None else norm.bias.float() - mean * factor
        return weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), shift

    def _roomy(self, scale: Any, bias: Any, input_scale: Any) -> Any:
        """Scales at which an integer bias fits into int32: a channel of tiny weights needs them."""
        if bias is None or not self._grid.integer_bias:
            return scale
        torch = extras.require("torch")
        least = bias.detach().abs() / (input_scale.detach() * _BIAS_MOST)
        least = least.reshape(-1, 1) if scale.numel() > 1 else least.max().reshape(1, 1)
        return torch.where(least <= scale, scale, _power_of_two_above(least))
