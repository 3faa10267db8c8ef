"""Whether a map of axes is right, shown by a model of the same form with random weights.

Channels have no order: when those of one width are shuffled on every axis that follows it, the
model computes what it did before. An axis that is missing, one too many, or one with another layout
changes the outputs. Weights are drawn so large that this cannot hide in rounding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from equipoise import extras
from equipoise.compress.transformer.attention import sample_inputs, trace
from equipoise.compress.transformer.axes import Axis, AxisMap, find_axes
from equipoise.compress.transformer.cut import Kept, take
from equipoise.sources.torch_model import named_outputs

_LIMIT: Final = 1e-3
"""Largest difference over largest output that is rounding. Wrong maps make differences near 1."""
_WIDTHS: Final = (("intermediate",), ("heads", "key_value_heads"), ("hidden",))


def proven_axes(module: Any, *, inputs: Mapping[str, Any] | None = None) -> AxisMap:
    """The axes that each width governs, tried out.

    Args:
        module: A transformers model with its weights, in evaluation mode; it is not changed.
        inputs: What it runs on; made up for text and pictures when None.

    Returns:
        The map. A width for which no layout holds is in its ``refused``.

    Raises:
        SourceError: It is not one stack of layers, or there is nothing to run it on.
    """
    feeds = dict(inputs) if inputs is not None else sample_inputs(module)
    seen = trace(module, feeds)
    found = find_axes(module, attention=seen.axes(module))
    trial = _Trial(module, feeds)
    for widths in _WIDTHS:
        found = _settled(found, widths, trial=trial)
    return _without_idle(found, seen.ran)


def _settled(axes: AxisMap, widths: tuple[str, ...], *, trial: _Trial) -> AxisMap:
    """``axes`` in the layout that holds for ``widths``; without them when none does."""
    if not any(axis.width in widths for axis in axes.axes):
        return axes
    for layout in (_as_blocks, _interleaved):
        tried = dataclasses.replace(
            axes, axes=tuple(layout(a) if a.width in widths else a for a in axes.axes)
        )
        if trial.holds(tried, widths):
            return tried
    reason = "a model with these channels in another order computes something else"
    return _refused(axes, dict.fromkeys(widths, reason))


def _as_blocks(axis: Axis) -> Axis:
    return axis


def _interleaved(axis: Axis) -> Axis:
    """Queries, keys and values head by head, in place of all queries, all keys, all values."""
    return dataclasses.replace(axis, blocks=1, unit=axis.blocks * axis.unit)


def _refused(axes: AxisMap, reasons: Mapping[Any, str]) -> AxisMap:
    left = tuple(axis for axis in axes.axes if axis.width not in reasons)
    return dataclasses.replace(axes, axes=left, refused={**axes.refused, **reasons})


def _without_idle(axes: AxisMap, ran: set[str]) -> AxisMap:
    """Refuse a width that governs a module that did not run: nothing was shown of it."""
    reasons = {}
    for axis in axes.axes:
        owner = axis.tensor.rpartition(".")[0]
        if axis.layer >= 0 and owner.count(".") and not _has_run(owner, ran):
            reasons[axis.width] = f"{owner} did not run, so nothing shows how it is connected"
    return _refused(axes, reasons) if reasons else axes


def _has_run(owner: str, ran: set[str]) -> bool:
    return any(name == owner or name.startswith(f"{owner}.") for name in ran) or (
        owner.rpartition(".")[0] in ran
    )


class _Trial:
    """A copy of a model with random weights, and its outputs."""

    def __init__(self, module: Any, feeds: Mapping[str, Any]) -> None:
        torch = extras.require("torch")
        self._model, self._feeds = copy.deepcopy(module), dict(feeds)
        self._random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.copy_(self._drawn(parameter))
        self._weights = {name: t.clone() for name, t in self._model.state_dict().items()}
        self._outputs = self._run()

    def _drawn(self, parameter: Any) -> Any:
        torch = extras.require("torch")
        values = torch.randn(parameter.shape, generator=self._random)
        return 1 + 0.3 * values if parameter.ndim < 2 else values / parameter.shape[-1] ** 0.5

    def _run(self) -> dict[str, Any]:
        torch = extras.require("torch")
        with torch.no_grad():
            return {
                name: v.clone() for name, v in named_outputs(self._model(**self._feeds)).items()
            }

    def holds(self, axes: AxisMap, widths: tuple[str, ...]) -> bool:
        """Whether shuffling ``widths`` leaves the outputs as they were."""
        kept = {key: value for key, value in self._shuffled(axes).items() if key[0] in widths}
        self._model.load_state_dict(take(self._weights, axes, kept))
        outputs = self._run()
        self._model.load_state_dict(self._weights)
        order = kept.get(("hidden", -1))
        return all(_equal(self._outputs[name], outputs[name], order) for name in self._outputs)

    def _shuffled(self, axes: AxisMap) -> Kept:
        layers = sorted({axis.layer for axis in axes.axes if axis.width != "hidden"})
        kept = {("hidden", -1): self._order(axes.shape.hidden)}
        shared = shares_heads(axes)
        heads = self._heads(axes)
        for layer in layers:
            kept["intermediate", layer] = self._order(axes.shape.intermediate)
            heads = heads if shared else self._heads(axes)
            kept["heads", layer], kept["key_value_heads", layer] = heads
        return kept

    def _heads(self, axes: AxisMap) -> tuple[Any, Any]:
        """Heads of keys and values in any order, each with its own heads in any order."""
        torch = extras.require("torch")
        groups = self._order(axes.shape.key_value_heads)
        each = axes.shape.heads // axes.shape.key_value_heads
        heads = [int(group) * each + self._order(each) for group in groups]
        return torch.cat(heads), groups

    def _order(self, count: int) -> Any:
        torch = extras.require("torch")
        return torch.randperm(count, generator=self._random)


def shares_heads(axes: AxisMap) -> bool:
    """Whether something outside the layers has a number per head, so that all cut the same ones."""
    return any(axis.layer < 0 for axis in axes.of("heads"))


def _equal(before: Any, after: Any, order: Any) -> bool:
    """Whether outputs are equal but for rounding, or are the hidden states in their new order."""
    if not before.isfinite().all():
        return False
    scale = max(float(before.abs().max()), 1e-30)
    forms = [before]
    if order is not None and before.ndim and before.shape[-1] == len(order):
        forms.append(before[..., order])
    return any(float((form - after).abs().max()) <= _LIMIT * scale for form in forms)
