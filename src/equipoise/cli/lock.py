"""``equipoise lock``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.locked import Lock


def command(
    engine: Annotated[
        Path, typer.Argument(help="A bundle, a directory of `build`, or an .onnx file.")
    ],
    against: Annotated[
        str, typer.Option("--against", "--source", help="The trained model, as tune takes it.")
    ],
    data: options.Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The lock, to be committed.")
    ] = Path("equipoise.lock.json"),
    weights: options.Weights = None,
    task: options.Task = "",
    samples: options.Samples = None,
    tokenizer: options.Tokenizer = None,
    labels: options.Labels = "",
    metric: Annotated[
        str,
        typer.Option(help="Task metric, of labelled data; the cosine of the outputs otherwise."),
    ] = "",
    target: options.Target = "cpu",
    threads: options.Threads = None,
    rounds: Annotated[int, typer.Option(min=4, help="Rounds of each opening.")] = 24,
    slowdown: Annotated[
        float, typer.Option(help="The slow-down that a check will have to see: 0.05 is 5 %.")
    ] = 0.05,
    cache_dir: options.CacheDir = None,
    time_limit: options.TimeLimit = 3600.0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Lock what an engine is accepted with, for `equipoise check --locked` to hold it to.

    Measured are the metric and its paired drop, the parity of every output, the latency against the
    float engine over many openings, the size, and the kernels that run. Nothing is judged here:
    what is locked is what is there.
    """
    from equipoise import fs
    from equipoise.engines import find_engine
    from equipoise.jobs import JobConfig, make_pipeline
    from equipoise.locking import LatencySettings, make_lock

    config = JobConfig(
        source=against,
        data=data,
        weights=weights,
        task=task,
        target=target,
        metric=metric or "accuracy",
        samples=samples,
        tokenizer=tokenizer,
        labels=options.names(labels),
        threads=threads,
        time_limit_s=time_limit,
        cache=cache_dir,
        labelled=bool(metric),
    )
    found = find_engine(engine)
    fs.check_writable(output.parent)
    settings = LatencySettings(rounds=rounds, slowdown=slowdown)
    with console.progress(quiet=quiet or json) as observer:
        pipeline = make_pipeline(config, observer=observer)
        lock = make_lock(found, pipeline, settings=settings, observer=observer)
    fs.write_json(output, lock)
    if json:
        console.print_json(lock)
    else:
        console.print_lines(*_lines(lock), f"Locked in {output}: commit it beside the model.")


def _lines(lock: Lock) -> Iterator[str]:
    from equipoise.report.rows import size

    figures, compared = lock.figures, lock.compared
    yield f"compared   {compared.samples} samples of {compared.data} with {compared.source}"
    yield (
        f"{compared.metric:<10} {figures.metric:.4f}, a drop of {figures.drop.value:+.4f}, at most"
        f" {figures.drop.high:.4f} at 95 %"
    )
    for output in figures.parity:
        noise = "equal" if output.sqnr_db is None else f"{output.sqnr_db:.1f} dB"
        yield f"parity     {output.name}: {noise}, differs by at most {output.max_abs:.3g}"
    latency = lock.latency
    openings = len(latency.openings.log_ratios)
    yield f"latency    {latency.ratio:.3f} of the float engine's, over {openings} openings"
    yield f"size       {size(figures.size_bytes)}"
    kernels = ", ".join(f"{count} {name}" for name, count in figures.kernels.items())
    yield f"kernels    {kernels or 'not named by this runtime'}"
