"""``equipoise quantize``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.quantize.schemes import Quantization


class Scheme(StrEnum):
    """The schemes by the names that ``tune`` gives its candidates."""

    WEIGHTS = "weights"
    DYNAMIC = "dynamic"
    STATIC = "static"
    GUARDED = "static-guarded"


def command(
    model: Annotated[Path, typer.Argument(help="Float .onnx file.")],
    data: options.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    scheme: Annotated[Scheme, typer.Option(help="How to quantise.")] = Scheme.GUARDED,
    reduce_range: Annotated[
        bool | None,
        typer.Option(help="Seven-bit weights; as this CPU needs when not given."),
    ] = None,
    task: options.Task = "",
    tokenizer: options.Tokenizer = None,
    labels: options.Labels = "",
    calibration_samples: options.CalibrationSamples = 128,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Quantise a float ONNX file to int8."""
    from equipoise import fs, onnxio
    from equipoise.tuning import TuneConfig, make_pipeline

    config = TuneConfig(
        source=str(model),
        data=data,
        output=output.parent,
        task=task,
        tokenizer=tokenizer,
        labels=options.names(labels),
        calibration_samples=calibration_samples,
        cache=cache_dir,
    )
    fs.check_writable(output.parent)
    with console.progress(quiet=quiet or json) as observer:
        pipeline = make_pipeline(config, observer=observer)
        saturates = pipeline.job.target.int8.saturates
        quantization = _quantization(scheme, saturates if reduce_range is None else reduce_range)
        made = pipeline.quantize(pipeline.float_model, quantization, label=str(scheme))
        onnxio.copy_model(made.files / made.record.file, output)
    if json:
        console.print_json(made.record)
        return
    added = ", ".join(f"{count} {op}" for op, count in made.record.quantized.items())
    console.print_lines(f"wrote {output}", f"added {added}", *made.record.notes)


def _quantization(scheme: Scheme, reduce_range: bool) -> Quantization:
    from equipoise.quantize.schemes import DynamicInt8, StaticInt8, WeightOnlyInt8

    if scheme is Scheme.WEIGHTS:
        return WeightOnlyInt8()
    if scheme is Scheme.DYNAMIC:
        return DynamicInt8(reduce_range=reduce_range)
    return StaticInt8(reduce_range=reduce_range, guarded=scheme is Scheme.GUARDED)
