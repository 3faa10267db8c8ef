"""Quantise an ONNX file: what ``equipoise quantize`` calls."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from equipoise import fs, onnxio
from equipoise.data.config import DataConfig
from equipoise.data.preprocessing import ImagePreprocessing, read_processor
from equipoise.data.readers.base import split_form
from equipoise.data.store import write_rows
from equipoise.errors import DataError, UsageError
from equipoise.pipeline import CALIBRATE, EQUALIZE, PREPARE, quantized
from equipoise.quantize.calibrate import CalibrateConfig
from equipoise.quantize.convergence import convergence
from equipoise.quantize.coverage import measure_coverage
from equipoise.quantize.equalize import EqualizeConfig
from equipoise.quantize.observe import ObserveSettings
from equipoise.quantize.quantize import QuantizeConfig, QuantizeRecord
from equipoise.quantize.ranges import ChosenRanges, choose_ranges, data_sha256, save_ranges
from equipoise.quantize.schemes import Quantization, StaticInt8
from equipoise.quantize.statistics import read_statistics
from equipoise.quantize.synthetic import synthetic_rows
from equipoise.spec import TensorSpec
from equipoise.stages import Observer, StageRunner, default_cache
from equipoise.targets.machine import detect_machine
from equipoise.targets.profile import Target
from equipoise.targets.profiles import get_target

_FREE_BYTES: Final = 64 << 20


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What to quantise, on what data, for what.

    Attributes:
        model: Float ``.onnx`` file.
        output: The ``.onnx`` file to write; external data, if any, goes beside it.
        data: Calibration data, as ``tune`` takes it; labels are not needed.
        synthetic: Calibrate on so many random samples instead of data.
        evaluation: Data that the model will meet, to be compared with what calibration saw.
        quantization: How.
        equalize: Balance the weights of neighbouring layers first (cross-layer equalisation). It
            pays where the target has one scale for a whole weight.
        target: Name of a target profile.
        samples: Most calibration samples.
        tokenizer: ``tokenizer.json`` for text.
        preprocessing: ``preprocessor_config.json`` for pictures.
        task: Head of the model, where the form of the data leaves it open.
        labels: Class names in index order, for data whose labels are names.
        max_length: Most tokens per text.
        save_ranges: Write the chosen ranges of all activations to this file.
        ranges: Take the ranges of activations from such a file; it has to be of this model and
            this data. What a remedy changes gets its range anew.
        threads: Threads per operator; all usable cores when None.
        cache: Directory of stage results; the user's cache when None.
        time_limit_s: Limit for one stage.
        fresh: Run every stage again.
    """

    model: Path
    output: Path
    data: str | None = None
    synthetic: int | None = None
    evaluation: str | None = None
    quantization: Quantization = field(default_factory=StaticInt8)
    equalize: bool = False
    target: str = "cpu"
    samples: int = 128
    tokenizer: Path | None = None
    preprocessing: Path | None = None
    task: str = ""
    labels: tuple[str, ...] = ()
    max_length: int = 512
    save_ranges: Path | None = None
    ranges: Path | None = None
    threads: int | None = None
    cache: Path | None = None
    time_limit_s: float = 3600.0
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What ``equipoise quantize`` did.

    Attributes:
        quantized: What became of the model.
        target: Name of the target.
        samples: Number of calibration samples.
        synthetic: Whether they were random numbers.
        notes: What a user should know, in words: of the data, of calibration, of the result.
        float_bytes: Size of the float model.
        size_bytes: Size of the result.
        wall_s: Time that it took.
    """

    quantized: QuantizeRecord
    target: str
    samples: int
    synthetic: bool
    notes: tuple[str, ...]
    float_bytes: int
    size_bytes: int
    wall_s: float


def quantize_model(request: QuantizeRequest, *, observer: Observer | None = None) -> QuantizeResult:
    """Quantise the model and write the result.

    Raises:
        UsageError: Neither data nor a number of random samples, or both.
        DataError: The data cannot be read, or does not fit.
        SourceError: The model is no ONNX file, or is quantised already.
        RecipeError: Nothing in it can be quantised so.
        ParityError: The runtime makes something else of the result than it says.
    """
    begin = time.perf_counter()
    return _Job(request, observer=observer).run(begin)


class _Job:
    def __init__(self, request: QuantizeRequest, *, observer: Observer | None) -> None:
        _check(request)
        self._request = request
        cache = request.cache or default_cache()
        for place in (cache, request.output.parent):
            fs.check_writable(place, needed_bytes=_FREE_BYTES)
        self._machine = detect_machine()
        self._target: Target = get_target(request.target, machine=self._machine)
        self._threads = request.threads or self._machine.cores
        self._inputs, _ = onnxio.file_specs(request.model)
        self._runner = StageRunner(
            cache, observer=observer, time_limit_s=request.time_limit_s, fresh=request.fresh
        )
        self._model = request.model
        self._notes: list[str] = []

    def run(self, begin: float) -> QuantizeResult:
        request = self._request
        if request.equalize:
            self._equalize()
        with fs.scratch_directory() as folder:
            samples, count = self._samples(folder)
            statistics = None
            if isinstance(request.quantization, StaticInt8):
                statistics = self._statistics(samples)
            record, files = self._quantize(samples, statistics)
        onnxio.copy_model(files / record.file, request.output)
        return QuantizeResult(
            quantized=record,
            target=request.target,
            samples=count,
            synthetic=request.synthetic is not None,
            notes=(*self._notes, *record.notes),
            float_bytes=onnxio.file_bytes(request.model),
            size_bytes=onnxio.file_bytes(request.output),
            wall_s=time.perf_counter() - begin,
        )

    def _equalize(self) -> None:
        config = EqualizeConfig(model=self._model)
        done = self._runner.run(EQUALIZE, config, label="equalise")
        self._model = done.files / done.record.file
        count = len(done.record.done.streams)
        skipped = len(done.record.done.skipped)
        self._notes.append(
            f"equalised the channels between layers in {count} places"
            + (f"; in {skipped} others something else reads them" if skipped else "")
        )

    def _samples(self, folder: Path) -> tuple[Path, int]:
        """Directory of calibration inputs, and how many there are."""
        request = self._request
        if request.synthetic is not None:
            self._notes.append(
                f"calibrated on {request.synthetic} samples of random numbers, not on data:"
                " ranges of real activations may differ widely"
            )
            model = onnxio.load_model(request.model)
            write_rows(folder / "synthetic", synthetic_rows(model, count=request.synthetic))
            return folder / "synthetic", request.synthetic
        prepared = self._prepared(request.data or "")
        return prepared / "calibration", self._count

    def _prepared(self, data: str) -> Path:
        request = self._request
        config = DataConfig(
            data=data,
            files=split_form(data)[1],
            task=request.task,
            tokenizer=request.tokenizer,
            labels=request.labels,
            calibration_samples=request.samples,
            max_length=request.max_length,
            accepted=tuple(spec.name for spec in self._inputs),
            labelled=False,
            preprocessing=_preprocessing(request.preprocessing),
            input_name=_picture_input(self._inputs),
        )
        found = self._runner.run(PREPARE, config, label="prepare data")
        self._count = found.record.calibration_samples
        self._notes += found.record.warnings
        return found.files

    def _statistics(self, samples: Path) -> Path:
        config = CalibrateConfig(
            model=self._model,
            samples=samples,
            threads=self._threads,
            scheme=self._target.int8,
        )
        found = self._runner.run(CALIBRATE, config, label="calibrate")
        self._notes += [note for note in found.record.notes if note not in self._notes]
        self._tell_of(found.files, samples)
        return found.files

    def _tell_of(self, files: Path, samples: Path) -> None:
        """Convergence, coverage, and the ranges as a file."""
        request, scheme = self._request, self._target.int8
        assert isinstance(request.quantization, StaticInt8)  # noqa: S101  the caller has asked
        method = request.quantization.method
        statistics = read_statistics(files)
        if not any("are the same" in note for note in self._notes):
            settled = convergence(statistics, method, symmetric=scheme.symmetric)
            self._notes.append(settled.sentence)
        if request.evaluation is not None:
            evaluation = self._prepared(request.evaluation) / "calibration"
            settings = ObserveSettings(threads=self._threads)
            self._notes.append(
                measure_coverage(
                    self._model, evaluation, statistics=statistics, settings=settings
                ).sentence
            )
        if request.save_ranges is not None:
            chosen = ChosenRanges(
                model_sha256=fs.sha256_file(self._model),
                data_sha256=data_sha256(samples),
                method=method,
                bits=16 if "16" in scheme.activation else 8,
                symmetric=scheme.symmetric,
                ranges=choose_ranges(statistics.tensors, method, symmetric=scheme.symmetric),
            )
            save_ranges(request.save_ranges, chosen)

    def _quantize(self, samples: Path, statistics: Path | None) -> tuple[QuantizeRecord, Path]:
        config = QuantizeConfig(
            model=self._model,
            quantization=self._request.quantization,
            scheme=self._target.int8,
            samples=samples,
            statistics=statistics,
            ranges=self._request.ranges,
            threads=self._threads,
        )
        found = quantized(config, runner=self._runner, machine=self._machine)
        return found.record, found.files


def _check(request: QuantizeRequest) -> None:
    if (request.data is None) == (request.synthetic is None):
        raise UsageError(
            "calibration needs --data, or --synthetic with a number of random samples, not both"
        )
    for name, value in (("--samples", request.samples), ("--synthetic", request.synthetic)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    if request.output.resolve() == request.model.resolve():
        raise UsageError(f"{request.output} is the model itself: give another output")


def _preprocessing(file: Path | None) -> ImagePreprocessing | None:
    if file is None:
        return None
    found = read_processor(file)
    if found is None:
        raise DataError(f"{file} describes no image processor")
    return found


def _picture_input(inputs: tuple[TensorSpec, ...]) -> str:
    """Name of the one input with four dimensions; empty when there is none."""
    return next((spec.name for spec in inputs if len(spec.shape) == 4), "")
