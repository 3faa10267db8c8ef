"""What to do about activations whose channels are unlike, chosen by the noise that it leaves.

For each activation that products read, three remedies are weighed on real values: moving range
from channels to weights (``smooth``), keeping a few channels in float (``outliers``), and cutting
off rare extremes. The noise of the layers' outputs is computed for every combination, token by
token, in proportion to the token's own output: what follows is most often a normalisation of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise.quantize.grids import Grid
from equipoise.quantize.smooth import smoothing_factors
from equipoise.spec import Array

_ALPHAS: Final = (0.0, 0.5, 0.7, 0.9)
_OUTLIERS: Final = (0, 1, 2, 4)
_CUTS: Final = (1.0, 0.8, 0.65, 0.5)
_PAYS: Final = 0.5
"""A remedy costs nodes in the graph, and its noise is an estimate: it has to halve it, 3 dB."""


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """Which remedies may be used.

    Attributes:
        smoothing: SmoothQuant.
        outliers: Channels in float.
        clipping: Cutting off extremes.
    """

    smoothing: bool = True
    outliers: bool = True
    clipping: bool = True


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """How one activation is treated.

    Attributes:
        activation: Its name in the float graph.
        alpha: Of SmoothQuant; 0 for none.
        outliers: Number of channels in float.
        cut: Share of the largest magnitude that the grid reaches.
        sqnr_db: Signal to noise of the layers' outputs, by token, that this leaves; estimated.
        untreated_db: The same without any remedy.
    """

    activation: str
    alpha: float
    outliers: int
    cut: float
    sqnr_db: float
    untreated_db: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """An activation and the weights that read it.

    Attributes:
        activation: Its name.
        values: float32 ``[positions, channels]``: some of its values.
        low: ``[channels]``, least value over all samples.
        high: ``[channels]``, largest value over all samples.
        weight: float32 ``[channels, outputs]``, of all layers together.
    """

    activation: str
    values: Array
    low: Array
    high: Array
    weight: Array


def treated(product: Product, *, alpha: float, outliers: int) -> tuple[Product, Array, Array]:
    """``product`` after remedies, its smoothing factors, and its outlier channels."""
    factors = np.ones(len(product.low), dtype=np.float32)
    if alpha:
        magnitude = np.maximum(np.abs(product.low), np.abs(product.high))
        factors = smoothing_factors(magnitude, np.abs(product.weight).max(axis=1), alpha=alpha)
    low, high = product.low / factors, product.high / factors
    magnitude = np.maximum(np.abs(low), np.abs(high))
    channels = np.sort(np.argsort(-magnitude, kind="stable")[:outliers])
    kept = np.ones(len(low), dtype=bool)
    kept[channels] = False
    smoothed = Product(
        activation=product.activation,
        values=product.values / factors * kept,
        low=low * kept,
        high=high * kept,
        weight=product.weight * factors[:, None] * kept[:, None],
    )
    return smoothed, factors, channels


def bounds(product: Product, *, cut: float) -> tuple[float, float]:
    """The range of the activation when its largest magnitude is cut to a share."""
    low, high = float(min(product.low.min(), 0.0)), float(max(product.high.max(), 0.0))
    reach = cut * max(-low, high)
    return max(low, -reach), min(high, reach)


def choose_treatment(
    product: Product,
    *,
    grid: Callable[[float, float], Grid],
    bits: int,
    remedies: Remedies,
    per_channel: bool = True,
) -> Treatment:
    """The cheapest treatment of ``product`` that no dearer one beats by much.

    Args:
        product: The activation, and what reads it.
        grid: From a range to the activation's grid.
        bits: Bits of the weights.
        remedies: Which may be used.
        per_channel: Whether each output channel has a weight scale of its own.
    """
    trust = _token_weights(product)
    best = untreated = None
    for alpha, outliers in _options(product, remedies):
        after, _, _ = treated(product, alpha=alpha, outliers=outliers)
        weighed = _weight_noise(after, trust, bits=bits, per_channel=per_channel)
        if best is not None and weighed >= best[0] * _PAYS:
            continue
        for cut in _CUTS if remedies.clipping else (1.0,):
            noise = weighed + _activation_noise(after, trust, grid=grid(*bounds(after, cut=cut)))
            untreated = noise if untreated is None else untreated
            # Clipping is free, so it needs no more than to be better.
            same = best is not None and best[1:3] == (alpha, outliers)
            if best is None or noise < best[0] * (1.0 if same else _PAYS):
                best = (noise, alpha, outliers, cut)
    assert best is not None and untreated is not None  # noqa: S101, PT018  there is an option
    return Treatment(
        activation=product.activation,
        alpha=best[1],
        outliers=best[2],
        cut=best[3],
        sqnr_db=_decibel(best[0]),
        untreated_db=_decibel(untreated),
    )


def _options(product: Product, remedies: Remedies) -> list[tuple[float, int]]:
    """Pairs of alpha and number of outliers, the cheapest to run first."""
    alphas = _ALPHAS if remedies.smoothing else (0.0,)
    counts = _OUTLIERS if remedies.outliers else (0,)
    most = len(product.low) // 16
    pairs = itertools.product(alphas, (count for count in counts if count <= most))
    return sorted(pairs, key=lambda pair: (bool(pair[0]) + 2 * bool(pair[1]), pair[1]))


def _token_weights(product: Product) -> Array:
    """``1 / (tokens * |y|^2)`` for each token's output ``y``; a token of nothing counts nothing."""
    power = np.square(product.values @ product.weight).sum(axis=1)
    floor = max(float(power.max()) * 1e-6, float(np.finfo(np.float32).tiny))
    weights: Array = (power > floor) / (np.maximum(power, floor) * max(len(power), 1))
    return weights


def _activation_noise(product: Product, trust: Array, *, grid: Grid) -> float:
    """Power of the outputs' noise from rounding and cutting off the activation.

    Errors of different channels are taken as independent.
    """
    errors = grid.round(product.values)
    errors -= product.values
    errors *= errors
    return float((trust @ errors) @ np.square(product.weight).sum(axis=1))


def _weight_noise(product: Product, trust: Array, *, bits: int, per_channel: bool) -> float:
    """Power of the outputs' noise from rounding weights to their grids, ``scale^2 / 12`` each."""
    reach = np.abs(product.weight).max(axis=0 if per_channel else None)
    scales = np.broadcast_to(reach / (2 ** (bits - 1) - 1), product.weight.shape[1:])
    return float((trust @ np.square(product.values)).sum() * np.square(scales).sum() / 12)


def _decibel(noise: float) -> float:
    return float(-10 * np.log10(max(noise, 1e-30)))
