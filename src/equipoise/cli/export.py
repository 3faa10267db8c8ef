"""``equipoise export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli import console, options


def command(
    source: options.Source,
    data: options.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    weights: options.Weights = None,
    task: options.Task = "",
    max_length: options.MaxLength = 512,
    tokenizer: options.Tokenizer = None,
    labels: options.Labels = "",
    target: options.Target = "cpu",
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Export a model to ONNX, proved on real inputs.

    Without parity at batch 1 and at a larger batch no file is written, and the exit code is 6.
    """
    from equipoise import fs
    from equipoise.tuning import TuneConfig, make_pipeline

    config = TuneConfig(
        source=source,
        data=data,
        output=output.parent,
        weights=weights,
        task=task,
        target=target,
        max_length=max_length,
        tokenizer=tokenizer,
        labels=options.names(labels),
        cache=cache_dir,
    )
    fs.check_writable(output.parent)
    with console.progress(quiet=quiet or json) as observer:
        pipeline = make_pipeline(config, observer=observer)
        exported = pipeline.exported.record
        fs.copy_model(pipeline.float_model, output)
    if json:
        console.print_json(exported)
        return
    console.print_lines(
        f"wrote    {output} (opset {exported.opset}, IR {exported.ir_version},"
        f" exporter {exported.exporter})",
        *(f"input    {spec}" for spec in exported.inputs),
        *(f"output   {spec}" for spec in exported.outputs),
        *(
            f"parity   {parity.name} differs by {parity.max_abs:.3g}; allowed {limit.atol:.3g}"
            for parity, limit in zip(exported.parity, exported.tolerances, strict=True)
        ),
    )
