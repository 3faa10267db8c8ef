"""Calibration: what range the activations of a float model take on real samples.

One pass, one sample at a time: memory is that of one sample plus five numbers per tensor,
whatever the number of samples and however their shapes differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from equipoise import extras, fs, onnxio, progress, record
from equipoise.data.store import Rows
from equipoise.errors import DataError
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.spec import Array

_FILE: Final = "ranges.json"


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What to calibrate.

    Attributes:
        model: Float ONNX file.
        samples: Directory of calibration inputs, written by ``data.store``.
        threads: Threads per operator.
    """

    model: Path
    samples: Path
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class TensorRange:
    """What one activation did over all samples.

    Attributes:
        low: Least finite value.
        high: Largest finite value.
        mean_square: Mean of the squared finite values.
        count: Number of finite values.
        non_finite: Number of infinities and NaNs: mask constants, mostly.
    """

    low: float
    high: float
    mean_square: float
    count: int
    non_finite: int

    @property
    def magnitude(self) -> float:
        """Largest absolute finite value."""
        return max(abs(self.low), abs(self.high))

    @property
    def int8_sqnr_db(self) -> float:
        """Signal to quantisation noise, in dB, of this tensor on its own 8-bit grid.

        With step ``s = (max - min) / 255`` over a range that includes zero, uniform rounding noise
        has power ``s**2 / 12`` (Widrow and Kollar, Quantization Noise, 2008, ch. 4); the signal has
        power ``mean_square``. Outliers stretch the range and leave few steps for the rest, which
        is how static int8 collapses.
        """
        step = (max(self.high, 0.0) - min(self.low, 0.0)) / 255
        if step == 0.0 or self.mean_square == 0.0:
            return math.inf
        return 10 * math.log10(self.mean_square / (step**2 / 12))


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Ranges of all float activations of a model, and what they came from."""

    tensors: dict[str, TensorRange]
    samples: int


def read_ranges(directory: Path) -> Ranges:
    """The ranges that :func:`calibrate` left in ``directory``."""
    path = directory / _FILE
    return record.loads(Ranges, fs.read_text(path, error=DataError), where=str(path))


@dataclass(frozen=True, kw_only=True)
class CalibrateRecord:
    """What calibration saw: numbers of samples and of tensors."""

    samples: int
    tensors: int


class _Running:
    """Range and power of one tensor, so far."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.square_sum, self.count, self.non_finite = 0.0, 0, 0

    def add(self, values: Array) -> None:
        """Add the values of one sample; a minimum and a maximum that are finite vouch for all."""
        if not values.size:
            return
        flat = values.ravel()
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = flat[np.isfinite(flat)]
            self.non_finite += flat.size - finite.size
            if finite.size:
                self.add(finite)
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.square_sum += _square_sum(flat)
        self.count += flat.size

    def range(self) -> TensorRange:
        seen = self.count > 0
        return TensorRange(
            low=self.low if seen else 0.0,
            high=self.high if seen else 0.0,
            mean_square=self.square_sum / self.count if seen else 0.0,
            count=self.count,
            non_finite=self.non_finite,
        )


def _square_sum(flat: Array) -> float:
    """Sum of squares; in float64 only where float32 overflows, as at mask constants."""
    with np.errstate(over="ignore"):
        fast = float(np.dot(flat, flat))
    return fast if math.isfinite(fast) else float(np.square(flat, dtype=np.float64).sum())


def calibrate(config: CalibrateConfig, *, output: Path) -> CalibrateRecord:
    """Run the model on the samples and write the range of every float activation.

    Raises:
        SourceError: The model is no ONNX file.
        DataError: There are no samples.
        InputError: The samples do not fit the model.
    """
    rows = Rows(config.samples)
    settings = SessionSettings(threads=config.threads)
    with fs.scratch_directory() as folder:
        names = _save_with_outputs(config.model, folder / "augmented.onnx")
        running = {name: _Running() for name in names}
        open_session = session_opener("onnxruntime")
        with open_session(folder / "augmented.onnx", settings=settings) as session:
            for feeds in progress.track(rows, total=len(rows)):
                _add(running, {**feeds, **session.run(feeds)})
    ranges = Ranges(tensors={n: r.range() for n, r in running.items()}, samples=len(rows))
    fs.write_json(output / _FILE, ranges)
    return CalibrateRecord(samples=len(rows), tensors=len(names))


def _add(running: Mapping[str, _Running], arrays: Mapping[str, Array]) -> None:
    for name, statistics in running.items():
        statistics.add(arrays[name])


def _save_with_outputs(model: Path, path: Path) -> tuple[str, ...]:
    """Save ``model`` so that it also gives out its float activations; return their names.

    The weights are freed on return, before a session loads them once more.
    """
    onnx = extras.require("onnx")
    proto = onnxio.load_model(model)
    names = float_activations(proto)
    present = {value.name for value in [*proto.graph.input, *proto.graph.output]}
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in present
    )
    onnxio.save_model(proto, path)
    return names


def float_activations(model: Any) -> tuple[str, ...]:
    """Names of the float32 inputs and intermediate values of the main graph."""
    types = onnxio.value_types(model)
    produced = [name for node in model.graph.node for name in node.output if name]
    constants = onnxio.initializers(model)
    inputs = [value.name for value in model.graph.input if value.name not in constants]
    wanted = extras.require("onnx").TensorProto.FLOAT
    return tuple(name for name in [*inputs, *produced] if types.get(name) == wanted)
