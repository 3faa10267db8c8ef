"""``equipoise tune``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli import console, options


def command(
    source: options.Source,
    data: options.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for bundle/ and report.html.")
    ],
    target: options.Target = "cpu",
    metric: Annotated[
        str, typer.Option(help="Such as accuracy or entity-f1; found from the task if not given.")
    ] = "",
    max_drop: Annotated[
        float, typer.Option(help="Largest allowed drop of the metric; 0.01 is one point.")
    ] = 0.01,
    weights: options.Weights = None,
    task: options.Task = "",
    calibration: options.Calibration = None,
    calibration_samples: options.CalibrationSamples = 128,
    samples: options.Samples = None,
    max_length: options.MaxLength = 512,
    tokenizer: options.Tokenizer = None,
    labels: options.Labels = "",
    float_fallback: Annotated[
        bool,
        typer.Option(
            "--float-fallback", help="Pack the float engine too, for devices of another kind."
        ),
    ] = False,
    prune: Annotated[
        str, typer.Option(help="Speed-ups to prune to, such as 2 or 2,4: more candidates.")
    ] = "",
    prune_epochs: Annotated[float, typer.Option(help="Epochs that train a pruned model.")] = 3.0,
    prune_rate: Annotated[float, typer.Option(help="Learning rate of that.")] = 1e-4,
    train: Annotated[
        str | None,
        typer.Option(help="Data to train a pruned model on; a part of --data if not given."),
    ] = None,
    threads: options.Threads = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds per latency.")] = 60,
    time_limit: options.TimeLimit = 3600.0,
    cache_dir: options.CacheDir = None,
    fresh: options.Fresh = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Find the sweet spot of a trained model, prove it, pack it.

    Exports the model, makes every candidate, compares each with the source on the same samples,
    measures it on the target, and writes a bundle and a report. A run that is stopped goes on
    where it was when the same command is given again.
    """
    from equipoise.compress.cutting import Pruning
    from equipoise.tuning import TuneConfig, tune

    config = TuneConfig(
        source=source,
        data=data,
        output=output,
        weights=weights,
        task=task,
        calibration=calibration,
        target=target,
        metric=metric,
        max_drop=max_drop,
        samples=samples,
        calibration_samples=calibration_samples,
        max_length=max_length,
        tokenizer=tokenizer,
        labels=options.names(labels),
        threads=threads,
        rounds=rounds,
        time_limit_s=time_limit,
        cache=cache_dir,
        fresh=fresh,
        float_fallback=float_fallback,
        train=train,
        prune=options.factors(prune, option="--prune"),
        recovery=replace(Pruning().recovery, epochs=prune_epochs, learning_rate=prune_rate),
    )
    with console.progress(quiet=quiet or json) as observer:
        result = tune(config, observer=observer)
    if json:
        console.print_json(result)
        return
    from equipoise.report.rows import summary
    from equipoise.report.terminal import candidates_table, metric_reports

    out = console.out()
    out.print(candidates_table(result))
    if result.reference_report:
        out.print(metric_reports(result))
    for warning in result.warnings:
        out.print(f"warning: {warning}", style="yellow", markup=False)
    out.print(f"Sweet spot: {summary(result)}", markup=False)
    console.print_lines(
        "",
        f"bundle  {output / 'bundle'}",
        f"report  {output / 'report.html'}",
        "",
        *_snippet(output / "bundle"),
    )


def _snippet(bundle: Path) -> tuple[str, ...]:
    """The three lines of Python that run a bundle, and what they need."""
    from equipoise.bundle.reading import read_manifest

    manifest = read_manifest(bundle)
    feeds = ", ".join(f'"{spec.name}": {spec.name}' for spec in manifest.inputs)
    return (
        f"Run it on the device, with numpy and {manifest.engines[0].runtime} alone:",
        "",
        "    import equipoise",
        f'    session = equipoise.load("{bundle}")',
        f"    outputs = session.run({{{feeds}}})",
    )
