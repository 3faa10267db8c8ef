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
        finite = values[np.isfinite(values)]
        self.non_finite += values.size - finite.size
        if finite.size:
            self.low = min(self.low, float(finite.min()))
            self.high = max(self.high, float(finite.max()))
            self.square_sum += float(np.square(finite, dtype=np.float64).sum())
            self.count += finite.size

    def range(self) -> TensorRange:
        seen = self.count > 0
        return TensorRange(
            low=self.low if seen else 0.0,
            high=self.high if seen else 0.0,
            mean_square=self.square_sum / self.count if seen else 0.0,
            count=self.count,
            non_finite=self.non_finite,
        )


def calibrate(config: CalibrateConfig, *, output: Path) -> CalibrateRecord:
    """Run the model on the samples and write the range of every float activation.

    Raises:
        SourceError: The model is no ONNX file.
        DataError: There are no samples.
        InputError: The samples do not fit the model.
    """
    rows = Rows(config.samples)
    model = onnxio.load_model(config.model)
    floats = float_activations(model)
    running = {name: _Running() for name in floats}
    settings = SessionSettings(threads=config.threads)
    with fs.scratch_directory() as folder:
        augmented = folder / "augmented.onnx"
        onnxio.save_model(_with_outputs(model, floats), augmented)
        with session_opener("onnxruntime")(augmented, settings=settings) as session:
            for feeds in progress.track(rows, total=len(rows)):
                _add(running, {**feeds, **session.run(feeds)})
    ranges = Ranges(tensors={n: r.range() for n, r in running.items()}, samples=len(rows))
    fs.write_json(output / _FILE, ranges)
    return CalibrateRecord(samples=len(rows), tensors=len(floats))


def _add(running: Mapping[str, _Running], arrays: Mapping[str, Array]) -> None:
    for name, statistics in running.items():
        statistics.add(arrays[name])


def float_activations(model: Any) -> tuple[str, ...]:
    """Names of the float32 inputs and intermediate values of the main graph."""
    onnx = extras.require("onnx")
    inferred = onnx.shape_inference.infer_shapes(model)
    values = [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]
    floats = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    produced = [name for node in model.graph.node for name in node.output if name]
    constants = onnxio.initializers(model)
    inputs = [v.name for v in model.graph.input if v.name not in constants]
    return tuple(name for name in [*inputs, *produced] if name in floats)


def _with_outputs(model: Any, names: tuple[str, ...]) -> Any:
    """A copy of ``model`` that also gives out the activations ``names``."""
    onnx = extras.require("onnx")
    augmented = onnx.ModelProto()
    augmented.CopyFrom(model)
    present = {v.name for v in [*model.graph.input, *model.graph.output]}
    for name in names:
        if name not in present:
            augmented.graph.output.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
    return augmented
