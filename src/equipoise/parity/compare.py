"""How the outputs of an engine compare with the reference, sample by sample, in one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from equipoise.errors import NonFiniteError, ParityError
from equipoise.spec import Array, cosine, describe


@dataclass(frozen=True, kw_only=True)
class OutputParity:
    """How one output of an engine compares with the reference over all samples.

    Attributes:
        name: Output tensor.
        max_abs: Largest absolute difference.
        max_rel: Largest difference over the reference's own value, of the values that are at least
            a thousandth of the largest of their sample: of smaller ones it says nothing.
        excess: Largest of ``|difference| - rtol * |reference|``; ``max_abs`` without ``rtol``.
        scale: Largest absolute value of the reference.
        sqnr_db: 10 log10 of (sum of squared reference / sum of squared difference); None when
            the outputs are equal to the last bit.
        cosine: Mean over samples of the cosine between the flattened outputs.
        least_cosine: The smallest of them.
        top1_agreement: Share of positions on the last axis whose largest entry is the same;
            None when the last axis has one entry.
        top_k: Number of entries that ``top_k_overlap`` looks at.
        top_k_overlap: Mean share of the reference's ``top_k`` largest entries that are among the
            engine's; None where the last axis has fewer than four entries.
        kl: Mean over positions of the Kullback-Leibler divergence of the engine's probabilities
            from the reference's, in nats; of the softmax where the values are no probabilities.
            None when the last axis has one entry.
    """

    name: str
    max_abs: float
    max_rel: float
    excess: float
    scale: float
    sqnr_db: float | None
    cosine: float
    least_cosine: float
    top1_agreement: float | None
    top_k: int = 0
    top_k_overlap: float | None = None
    kl: float | None = None

    @property
    def flips(self) -> float | None:
        """Share of positions whose largest entry is another one."""
        return None if self.top1_agreement is None else 1.0 - self.top1_agreement


_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_TELLING: Final = 1e-3
"""A value below this share of the largest one has no relative error worth the name."""

_MOST_K: Final = 5
_FEWEST_CLASSES: Final = 4
_TINY: Final = float(np.finfo(np.float64).tiny)


class ParityMeter:
    """Collects the comparison of one output over samples in constant memory.

    Args:
        name: The output tensor.
        rtol: Part of the reference's own value that a difference may be, beside ``excess``.
    """

    def __init__(self, name: str, *, rtol: float = 0.0) -> None:
        self._name, self._rtol = name, rtol
        self._max_abs = self._max_rel = self._excess = self._scale = 0.0
        self._signal = self._noise = 0.0
        self._cosines: tuple[float, float, int] = (0.0, 1.0, 0)
        self._decisions = _Decisions()

    def add(self, reference: Array, output: Array) -> None:
        """Add one sample.

        Args:
            reference: Reference output, of any shape.
            output: The engine's output, of the same shape.

        Raises:
            ParityError: The shapes differ.
        """
        if reference.shape != output.shape:
            raise ParityError(
                f"output {self._name!r} is {describe(output)}; the reference is"
                f" {describe(reference)}",
                hint="A dimension was frozen at export, or the wrong source was given.",
            )
        wanted, got = reference.astype(np.float64), output.astype(np.float64)
        self._add_differences(wanted, np.abs(got - wanted))
        total, least, count = self._cosines
        found = cosine(wanted, got)
        self._cosines = total + found, min(least, found), count + 1
        if wanted.size and wanted.ndim and wanted.shape[-1] > 1:
            self._decisions.add(wanted, got)

    def _add_differences(self, wanted: Array, difference: Array) -> None:
        size, scale = np.abs(wanted), _largest(wanted)
        self._max_abs = max(self._max_abs, _largest(difference))
        self._excess = max(self._excess, _largest(np.maximum(difference - self._rtol * size, 0.0)))
        self._scale = max(self._scale, scale)
        telling = size > _TELLING * scale
        self._max_rel = max(self._max_rel, _largest(difference[telling] / size[telling]))
        self._signal += float(np.square(wanted).sum())
        self._noise += float(np.square(difference).sum())

    def result(self) -> OutputParity:
        """The comparison so far."""
        total, least, count = self._cosines
        return OutputParity(
            name=self._name,
            max_abs=self._max_abs,
            max_rel=self._max_rel,
            excess=self._excess,
            scale=self._scale,
            sqnr_db=_decibel(self._signal, self._noise),
            cosine=total / max(count, 1),
            least_cosine=least,
            top1_agreement=self._decisions.agreement,
            top_k=self._decisions.k,
            top_k_overlap=self._decisions.overlap,
            kl=self._decisions.kl,
        )


class _Decisions:
    """What the last axis says when its entries are scores of classes."""

    def __init__(self) -> None:
        self._positions, self.k = 0, 0
        self._agreed = self._shared = self._kl = 0.0

    def add(self, wanted: Array, got: Array) -> None:
        """Add the outputs of one sample, float64 [..., classes]."""
        classes = wanted.shape[-1]
        wanted, got = wanted.reshape(-1, classes), got.reshape(-1, classes)
        self._positions += len(wanted)
        self._agreed += float((wanted.argmax(-1) == got.argmax(-1)).sum())
        self.k = min(_MOST_K, classes // 2) if classes >= _FEWEST_CLASSES else 0
        if self.k:
            self._shared += _shared(wanted, got, k=self.k)
        self._kl += float(_divergence(wanted, got).sum())

    @property
    def agreement(self) -> float | None:
        return self._agreed / self._positions if self._positions else None

    @property
    def overlap(self) -> float | None:
        return self._shared / self._positions if self._positions and self.k else None

    @property
    def kl(self) -> float | None:
        if not self._positions:
            return None
        mean = self._kl / self._positions
        return mean if math.isfinite(mean) else _FLOAT32_MAX


def _shared(wanted: Array, got: Array, *, k: int) -> float:
    """Sum over positions of the share of the ``k`` largest that are the same."""
    first, second = (np.argpartition(-scores, k - 1, axis=-1)[:, :k] for scores in (wanted, got))
    return float((first[:, :, np.newaxis] == second[:, np.newaxis, :]).any(-1).mean(-1).sum())


def _divergence(wanted: Array, got: Array) -> Array:
    """Kullback-Leibler divergence at each position, float64 [positions], in nats."""
    first, second = _log_probabilities(wanted), _log_probabilities(got)
    with np.errstate(invalid="ignore"):
        divergence: Array = (np.exp(first) * (first - second)).sum(-1)
    return np.maximum(divergence, 0.0)


def _log_probabilities(scores: Array) -> Array:
    """Logarithms of ``scores`` where they are probabilities already, of their softmax elsewhere."""
    if (scores >= 0.0).all() and np.allclose(scores.sum(-1), 1.0, atol=1e-3):
        logarithms: Array = np.log(np.maximum(scores, _TINY))
        return logarithms
    shifted = scores - scores.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _largest(array: Array) -> float:
    """Largest absolute value; an engine that gives NaN is as wrong as a float can say."""
    if not array.size:
        return 0.0
    largest = float(np.abs(array).max())
    return largest if math.isfinite(largest) else _FLOAT32_MAX


def _decibel(signal: float, noise: float) -> float | None:
    if noise == 0.0:
        return None
    if not math.isfinite(noise) or signal == 0.0:
        return -400.0
    return 10 * math.log10(signal / noise)


class Comparison:
    """Parity meters for all outputs of a model.

    Args:
        rtol: As of :class:`ParityMeter`.
    """

    def __init__(self, *, rtol: float = 0.0) -> None:
        self._rtol = rtol
        self._meters: dict[str, ParityMeter] = {}

    def add(self, reference: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Add one sample. Raises ParityError when an output is missing or has another shape."""
        for name, wanted in reference.items():
            if name not in outputs:
                raise ParityError(
                    f"output {name!r} of the reference is not among {sorted(outputs)}"
                )
            meter = self._meters.setdefault(name, ParityMeter(name, rtol=self._rtol))
            meter.add(wanted, outputs[name])

    def result(self) -> tuple[OutputParity, ...]:
        """One entry per output."""
        return tuple(meter.result() for meter in self._meters.values())


def require_finite(outputs: Mapping[str, Array], *, sample: int | str, what: str) -> None:
    """Refuse NaN and infinity in ``outputs``.

    Raises:
        NonFiniteError: Names the output, the sample and how many values are not finite.
    """
    for name, array in outputs.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise NonFiniteError(
                f"{what}: output {name!r} of sample {sample} has {count} of {array.size} values"
                " that are NaN or infinite",
                hint="Check the weights and the preprocessing: no engine can be compared with it.",
            )
