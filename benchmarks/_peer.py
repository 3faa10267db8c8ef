"""One peer's quantiser on one model: the child that benchmarks/quantize.py runs in their venv.

    python benchmarks/_peer.py WAY MODEL.onnx SAMPLES.npz OUTPUT.onnx transformer|cnn

Each peer gets the settings that its own documentation recommends for the kind of model, and one
sample at a time. The first axis of every array in SAMPLES counts samples.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to quantise, with what, into what; kind is ``transformer`` or ``cnn``."""

    model: str
    samples: str
    output: str
    kind: str


def read_samples(file: str) -> list[Feeds]:
    """The samples, each with a batch of one."""
    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "label"}
    count = len(next(iter(arrays.values())))
    return [{name: a[i : i + 1] for name, a in arrays.items()} for i in range(count)]


class Reader:
    """What ONNX Runtime's calibrators, and those that follow them, take samples from."""

    def __init__(self, samples: list[Feeds]) -> None:
        self._samples = samples
        self._left: Iterator[Feeds] = iter(samples)

    def get_next(self) -> Feeds | None:
        """The next sample; None after the last."""
        return next(self._left, None)

    def rewind(self) -> None:
        """Start again."""
        self._left = iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)


def ort_static(
    job: Job, *, method: str = "MinMax", weight: str = "QInt8", reduce_range: bool = False
) -> None:
    """ONNX Runtime: pre-processed as its guide says, QDQ, uint8 activations, per channel."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quantization.CalibrationDataReader.register(Reader)
    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        # Its symbolic shape inference fails on transformers; it says itself to skip it for them.
        quant_pre_process(job.model, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            job.output,
            Reader(read_samples(job.samples)),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=getattr(quantization.QuantType, weight),
            calibrate_method=getattr(quantization.CalibrationMethod, method),
            per_channel=True,
            reduce_range=reduce_range,
        )


def ort_dynamic(job: Job, *, weight: str = "QInt8") -> None:
    """ONNX Runtime: activation ranges anew in every run, so that it needs no samples."""
    from onnxruntime import quantization

    kind = getattr(quantization.QuantType, weight)
    quantization.quantize_dynamic(job.model, job.output, weight_type=kind)


def nncf(job: Job) -> None:
    """NNCF's ONNX back end with its default presets."""
    import nncf as tool  # type: ignore[import-not-found]
    import onnx

    rows = read_samples(job.samples)
    quantized = tool.quantize(
        onnx.load(job.model),
        tool.Dataset(rows),
        subset_size=len(rows),
        model_type=tool.ModelType.TRANSFORMER if job.kind == "transformer" else None,
    )
    onnx.save(quantized, job.output)


def quark(job: Job) -> None:
    """AMD Quark's default int8 configuration for the kind of model."""
    from quark.onnx import ModelQuantizer  # type: ignore[import-not-found]
    from quark.onnx.quantization.config import Config, get_default_config  # type: ignore[import-not-found]

    name = "INT8_TRANSFORMER_DEFAULT" if job.kind == "transformer" else "INT8_CNN_DEFAULT"
    quantizer = ModelQuantizer(Config(global_quant_config=get_default_config(name)))
    quantizer.quantize_model(job.model, job.output, Reader(read_samples(job.samples)))


WAYS: dict[str, Callable[[Job], None]] = {
    "ort-minmax": ort_static,
    "ort-minmax-reduced": functools.partial(ort_static, reduce_range=True),
    "ort-minmax-u8u8": functools.partial(ort_static, weight="QUInt8"),
    "ort-entropy": functools.partial(ort_static, method="Entropy"),
    "ort-percentile": functools.partial(ort_static, method="Percentile"),
    "ort-dynamic-s8": ort_dynamic,
    "ort-dynamic-u8": functools.partial(ort_dynamic, weight="QUInt8"),
    "nncf": nncf,
    "quark": quark,
}

if __name__ == "__main__":
    way, model, samples, output, kind = sys.argv[1:]
    WAYS[way](Job(model=model, samples=samples, output=output, kind=kind))
