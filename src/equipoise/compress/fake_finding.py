"""Which layer of a module each grid is of, and which batch normalisation is folded into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from equipoise import extras
from equipoise.sources.module_grids import ModuleGrid, Skipped

_SAME: Final = 1e-4
"""Largest relative difference of two computations of one folded weight in float32."""

_TRANSPOSED: Final = "Conv1D"
"""A product of transformers whose weight is ``[inputs, outputs]``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """A layer, the normalisation that is folded into it, and their grids."""

    name: str
    layer: Any
    grid: ModuleGrid
    norm_name: str = ""
    norm: Any = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """Layers that were found, and grids without one."""

    layers: tuple[Placed, ...]
    skipped: tuple[Skipped, ...]


class Finder:
    """Finds layers by name and knows them by their weights.

    The name of a folded convolution in a graph may be that of its normalisation or its own. Which
    two belong together is told by the weights: the largest of each channel, after folding.
    """

    def __init__(self, module: Any) -> None:
        self._modules = dict(module.named_modules())
        self._order = list(self._modules)
        self._taken: set[str] = set()

    def find(self, grids: Iterable[ModuleGrid]) -> Found:
        """The layer of each of ``grids``; no layer and no normalisation is taken twice."""
        layers: list[Placed] = []
        skipped: list[Skipped] = []
        for grid in grids:
            found = self._one(grid)
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                layers.append(found)
                self._taken.update({found.name, found.norm_name} - {""})
        return Found(layers=tuple(layers), skipped=tuple(skipped))

    def _one(self, grid: ModuleGrid) -> Placed | Skipped:
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
        return Placed(
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
            and rows_of(self._modules[n]).shape[0] == channels
        ]

    def _distance(self, name: str, norm: str, *, grid: ModuleGrid) -> float:
        """Relative difference of the largest weights from those of the graph."""
        torch = extras.require("torch")
        magnitudes = rows_of(self._modules[name]).detach().abs().amax(dim=1).double().cpu()
        if norm:
            factor = fold_factor(self._modules[norm]).detach().abs().double().cpu()
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
    return isinstance(module, kinds) or is_transposed(module)


def is_transposed(module: Any) -> bool:
    """Whether the weight of a product is ``[inputs, outputs]``, as in GPT-2."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == _TRANSPOSED and getattr(weight, "ndim", 0) == 2


def _is_norm(module: Any) -> bool:
    """Any batch normalisation with statistics, with frozen ones or an activation behind it too."""
    names = ("running_mean", "running_var", "eps", "weight", "bias")
    return all(hasattr(module, name) for name in names) and module.running_var is not None


def rows_of(layer: Any) -> Any:
    """Weight as ``[channels, inputs]``."""
    weight = layer.weight.t() if is_transposed(layer) else layer.weight
    return weight.flatten(1)


def fold_factor(norm: Any) -> Any:
    """``[channels]``: what a batch normalisation multiplies each channel by."""
    torch = extras.require("torch")
    factor = torch.rsqrt(norm.running_var.float() + norm.eps)
    return factor if norm.weight is None else norm.weight.float() * factor
