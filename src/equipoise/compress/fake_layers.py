"""Rounding to grids in PyTorch, with gradients, and the forward of a layer that rounds."""

from __future__ import annotations

from typing import Any, Final

from equipoise import extras
from equipoise.compress.fake_finding import Placed, fold_factor, is_transposed
from equipoise.sources.module_grids import ActivationGrid, ModuleRanges, WeightForm

_SMALLEST_SCALE: Final = 2.0**-60


class Scales:
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


class PassedNorm:
    """Forward of a normalisation that has been folded: what is behind it in the module, alone."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm

    def __call__(self, values: Any, *_: object) -> Any:
        """``values``, through the dropout and activation that some such modules hold."""
        for name in ("drop", "act"):
            step = getattr(self._norm, name, None)
            values = values if step is None else step(values)
        return values


class FakeLayer:
    """Forward of a layer on its grids.

    It is an object and not a closure so that a deep copy of the module refers to the copy.
    """

    def __init__(self, placed: Placed, scales: Scales) -> None:
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
        scale = weight_scale(rows, grid.weight)
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
        weight = weight.t() if is_transposed(layer) else weight
        if is_transposed(layer) and bias is None:
            bias = weight.new_zeros(weight.shape[1])
        layer.__dict__["_parameters"] = {**kept, "weight": weight, "bias": bias}
        try:
            return type(layer).forward(layer, values)
        finally:
            layer.__dict__["_parameters"] = kept

    def _folded(self) -> tuple[Any, Any]:
        """Weight ``[channels, ...]`` and bias, with the normalisation in them; None for no bias."""
        layer, norm = self._layer, self._norm
        weight = layer.weight.t() if is_transposed(layer) else layer.weight
        weight, bias = weight.float(), None if layer.bias is None else layer.bias.float()
        if norm is None:
            return weight, bias
        factor = fold_factor(norm)
        mean = norm.running_mean.float() if bias is None else norm.running_mean.float() - bias
        shift = -mean * factor if norm.bias is None else norm.bias.float() - mean * factor
        return weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), shift
