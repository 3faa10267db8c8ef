"""What quantisation makes of every tensor that a float model and its quantised form share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise import extras, onnxio
from equipoise.parity.compare import ParityMeter
from equipoise.quantize.observe import observing
from equipoise.quantize.pairs import DEQUANTIZE, PAIR, wiring
from equipoise.quantize.statistics import MASK_MAGNITUDE
from equipoise.spec import Array, Feeds


@dataclass(frozen=True, kw_only=True)
class TensorNoise:
    """One tensor over all samples.

    Attributes:
        name: Tensor, the same in both models.
        sqnr_db: Signal of the float model to the difference of the quantised one, all noise from
            before included; None when both are equal.
        rounding_db: Signal to the rounding noise of the tensor's own Q/DQ pair alone, mask
            constants left out; None where there is no pair, or nothing is lost.
        low: Least finite value in the float model.
        high: Largest finite value in the float model.
        outlier: Largest magnitude of a channel over the median one: how many times wider a grid
            for the whole tensor is than half of the channels need.
        channel: Index of that channel.
    """

    name: str
    sqnr_db: float | None
    rounding_db: float | None
    low: float
    high: float
    outlier: float
    channel: int


def tensor_noise(
    original: Any, quantized: Any, *, rows: Iterable[Feeds], threads: int = 1
) -> tuple[TensorNoise, ...]:
    """Compare all shared float tensors, in the order of the float graph.

    Giving out every tensor keeps a runtime from merging Q/DQ with what lies between, so this is the
    noise of the rounding itself, without that of a kernel. Memory is that of one sample.

    Args:
        original: Float ``onnx.ModelProto``.
        quantized: Its quantised form.
        rows: Samples.
        threads: Threads per operator.

    Raises:
        InputError: A sample does not fit a model.
    """
    names, rounded = _shared(original, quantized), _rounded(quantized)
    rounded = {name: rounded[name] for name in names if name in rounded}
    meters = {name: _Meter(name) for name in names}
    with (
        observing(original, names, threads=threads) as wanted,
        observing(quantized, (*names, *rounded.values()), threads=threads) as given,
    ):
        for feeds in rows:
            reference, output = wanted(feeds), given(feeds)
            for name, meter in meters.items():
                meter.add(reference[name], output[name])
                if name in rounded:
                    meter.add_rounding(output[name], output[rounded[name]])
    return tuple(meter.result() for meter in meters.values() if meter.seen)


def _shared(original: Any, quantized: Any) -> tuple[str, ...]:
    inputs = {value.name for value in original.graph.input}
    produced = [n for node in original.graph.node for n in node.output if n and n not in inputs]
    left, right = _floats(original), _floats(quantized)
    return tuple(name for name in produced if name in left and name in right)


def _floats(model: Any) -> set[str]:
    kind = extras.require("onnx").TensorProto.FLOAT
    made = {name for node in model.graph.node for name in node.output}
    return {n for n, found in onnxio.value_types(model).items() if found == kind and n in made}


def _rounded(quantized: Any) -> dict[str, str]:
    """Tensor -> the same after its Q/DQ pair."""
    wires = wiring(quantized)
    pairs = (n.output[0] for n in quantized.graph.node if n.op_type == DEQUANTIZE)
    return {wires.before(name): name for name in pairs if wires.before(name) != name}


class _Meter:
    """Noise, range and channels of one tensor."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._parity, self._rounding = ParityMeter(name), ParityMeter(name)
        self._low, self._high = np.inf, -np.inf
        self._channels: Array | None = None
        self.seen = False

    def add(self, reference: Array, output: Array) -> None:
        """Add a sample; a tensor whose shape a pass has changed is another tensor."""
        if reference.shape != output.shape or not reference.size:
            return
        self.seen = True
        # An infinity that both share is no noise, and NaN is the largest there is.
        self._parity.add(np.nan_to_num(reference), np.nan_to_num(output))
        finite = reference[np.isfinite(reference)]
        if finite.size:
            self._low = min(self._low, float(finite.min()))
            self._high = max(self._high, float(finite.max()))
        self._add_channels(np.nan_to_num(reference))

    def add_rounding(self, exact: Array, rounded: Array) -> None:
        """Add what the pair makes of a sample; a mask constant would pass for a huge signal."""
        kept = np.isfinite(exact) & (np.abs(exact) < MASK_MAGNITUDE)
        self._rounding.add(np.where(kept, exact, 0), np.where(kept, rounded, 0))

    def _add_channels(self, reference: Array) -> None:
        axis = 1 if reference.ndim > 3 else reference.ndim - 1
        others = tuple(i for i in range(reference.ndim) if i != axis)
        largest = np.abs(reference).max(axis=others)
        known = self._channels
        if known is None or known.shape == largest.shape:
            self._channels = largest if known is None else np.maximum(known, largest)

    def result(self) -> TensorNoise:
        """What was seen; a tensor of infinities alone has the range 0 to 0."""
        channels = np.ravel(self._channels if self._channels is not None else 0.0)
        middle = float(np.median(channels))
        return TensorNoise(
            name=self._name,
            sqnr_db=self._parity.result().sqnr_db,
            rounding_db=self._rounding.result().sqnr_db,
            low=self._low if np.isfinite(self._low) else 0.0,
            high=self._high if np.isfinite(self._high) else 0.0,
            outlier=float(channels.max()) / middle if middle else 1.0,
            channel=int(channels.argmax()),
        )


def by_node(quantized: Any, noise: Iterable[TensorNoise]) -> dict[str, float]:
    """Node -> SQNR in dB of the worst rounding among what it reads and gives."""
    found = {t.name: t.rounding_db for t in noise if t.rounding_db is not None}
    wires = wiring(quantized)
    worst = {}
    for node in (n for n in quantized.graph.node if n.op_type not in PAIR):
        touched = [*map(wires.before, node.input), *node.output]
        values = [found[name] for name in touched if name in found]
        if values:
            worst[str(node.name)] = min(values)
    return worst
