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
        scale: Largest absolute value of the reference.
        sqnr_db: 10 log10 of (sum of squared reference / sum of squared difference); None when
            the outputs are equal to the last bit.
        cosine: Mean over samples of the cosine between the flattened outputs.
        top1_agreement: Share of positions on the last axis whose largest entry is the same;
            None when the last axis has one entry.
    """

    name: str
    max_abs: float
    scale: float
    sqnr_db: float | None
    cosine: float
    top1_agreement: float | None


_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


class ParityMeter:
    """Collects the comparison of one output over samples in constant memory.

    Args:
        name: The output tensor.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._max_abs = self._scale = 0.0
        self._signal = self._noise = 0.0
        self._cosine_sum, self._samples = 0.0, 0
        self._agreed, self._positions = 0, 0

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
        difference = got - wanted
        self._max_abs = max(self._max_abs, _largest(difference))
        self._scale = max(self._scale, _largest(wanted))
        self._signal += float(np.square(wanted).sum())
        self._noise += float(np.square(difference).sum())
        self._cosine_sum += cosine(wanted, got)
        self._samples += 1
        if wanted.ndim and wanted.shape[-1] > 1:
            same = wanted.argmax(-1) == got.argmax(-1)
            self._agreed += int(same.sum())
            self._positions += same.size

    def result(self) -> OutputParity:
        """The comparison so far."""
        return OutputParity(
            name=self._name,
            max_abs=self._max_abs,
            scale=self._scale,
            sqnr_db=_decibel(self._signal, self._noise),
            cosine=self._cosine_sum / max(self._samples, 1),
            top1_agreement=self._agreed / self._positions if self._positions else None,
        )


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
    """Parity meters for all outputs of a model."""

    def __init__(self) -> None:
        self._meters: dict[str, ParityMeter] = {}

    def add(self, reference: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Add one sample. Raises ParityError when an output is missing or has another shape."""
        for name, wanted in reference.items():
            if name not in outputs:
                raise ParityError(
                    f"output {name!r} of the reference is not among {sorted(outputs)}"
                )
            self._meters.setdefault(name, ParityMeter(name)).add(wanted, outputs[name])

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
