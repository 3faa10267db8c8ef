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

from typing import Any

from equipoise.compress.fake_finding import Finder, Found
from equipoise.compress.fake_layers import FakeLayer, PassedNorm, Scales
from equipoise.errors import RecipeError
from equipoise.sources.module_grids import ModuleRanges, with_scales


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
    if any(isinstance(m.__dict__.get("forward"), FakeLayer | PassedNorm) for m in module.modules()):
        raise RecipeError(
            "the module is under fake quantisation already",
            hint="Call remove() of what attach() returned before.",
        )
    if learn_scales and any(grid.weight.power_of_two for grid in ranges.modules):
        raise RecipeError(
            "scales of this target are powers of two, which cannot be learned step by step",
            hint="Train with the fixed ranges.",
        )
    found = Finder(module).find(ranges.modules)
    if not found.layers:
        reason = found.skipped[0].reason if found.skipped else "there are none"
        raise RecipeError(
            f"none of the {len(ranges.modules)} layers with ranges is in this module: {reason}",
            hint="Give the ranges of the file that was exported from this very module.",
        )
    return Attached(ranges, found, scales=Scales(ranges, learned=learn_scales))


class Attached:
    """Layers under fake quantisation.

    Attributes:
        modules: Dotted names of the layers.
        folded: Dotted name of a layer -> that of the batch normalisation folded into it.
        skipped: Layers with ranges that are not simulated, and why.
        scales: ``torch.nn.Module`` with the scales that are learned; None when none are. Its
            parameters have to be optimised, saved and shared between processes by who trains.
    """

    def __init__(self, ranges: ModuleRanges, found: Found, *, scales: Scales) -> None:
        self._ranges, self._found, self._scales = ranges, found, scales
        self.modules = tuple(one.name for one in found.layers)
        self.folded = {one.name: one.norm_name for one in found.layers if one.norm is not None}
        self.skipped = found.skipped
        self.scales = scales.module
        self._layers = {one.name: FakeLayer(one, scales) for one in found.layers}
        self._hooks: list[Any] = []
        self._put_in()

    def _put_in(self) -> None:
        for one in self._found.layers:
            one.layer.forward = self._layers[one.name]
            # PyTorch's fused encoder layer calls none of its modules, unless one has a hook.
            self._hooks.append(one.layer.register_forward_pre_hook(_look_on))
            if one.norm is not None:
                one.norm.forward = PassedNorm(one.norm)

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
