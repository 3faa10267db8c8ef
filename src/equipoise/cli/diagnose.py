"""``equipoise diagnose``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.quantize.diagnose import DiagnoseConfig, Diagnosis
    from equipoise.stages import Observer


def command(
    model: Annotated[Path, typer.Argument(help="Float .onnx file.")],
    quantized: Annotated[Path, typer.Argument(help="Its quantised form, as .onnx file.")],
    data: options.Data,
    metric: Annotated[
        str, typer.Option(help="Metric to measure besides SQNR, if the data has labels.")
    ] = "",
    samples: Annotated[int, typer.Option(help="Use the first so many samples.")] = 16,
    budget: Annotated[str, typer.Option(help="Time for the sweeps, such as 5m.")] = "60s",
    html: Annotated[Path | None, typer.Option(help="Write a page with every row.")] = None,
    task: options.Task = "",
    tokenizer: options.Tokenizer = None,
    labels: options.Labels = "",
    threads: options.Threads = None,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Find out why a quantised model lost accuracy or gained no speed."""
    from equipoise import fs
    from equipoise.jobs import JobConfig, make_pipeline
    from equipoise.quantize.diagnose import DiagnoseConfig

    if html is not None:
        fs.check_writable(html.parent)
    config = JobConfig(
        source=str(model),
        data=data,
        task=task,
        tokenizer=tokenizer,
        labels=options.names(labels),
        threads=threads,
        cache=cache_dir,
        labelled=bool(metric),
    )
    with console.progress(quiet=quiet or json) as observer:
        pipeline = make_pipeline(config, observer=observer)
        prepared = pipeline.data
        settings = DiagnoseConfig(
            model=model,
            quantized=quantized,
            samples=pipeline.evaluation,
            labels=prepared.files / "labels" if metric else None,
            metric=metric,
            label_names=prepared.record.labels,
            count=samples,
            budget_s=options.seconds(budget, option="--budget"),
            threads=pipeline.job.threads,
        )
        found = _run(settings, observer=observer)
    if html is not None:
        _write_page(html, found)
    if json:
        console.print_json(found)
    else:
        _print(found)


def _run(config: DiagnoseConfig, *, observer: Observer) -> Diagnosis:
    """Diagnose in this process; its loops advance the bar."""
    from equipoise import progress
    from equipoise.quantize.diagnose import diagnose

    observer.started("diagnose")
    progress.listen(observer.advanced)
    try:
        found = diagnose(config)
    except Exception:
        observer.failed("diagnose")
        raise
    observer.ended("diagnose", cached=False)
    return found


def _write_page(path: Path, found: Diagnosis) -> None:
    from equipoise import fs
    from equipoise.report.diagnosis import render_diagnosis

    fs.write_text(path, render_diagnosis(found))


def _print(found: Diagnosis) -> None:
    from equipoise.report.diagnosis import exclusion, headline, parts

    console.print_lines(*headline(found))
    for part in parts(found):
        shown = len(part.rows)
        more = f" ({shown} of {part.total})" if part.total > shown else ""
        console.print_lines("", f"{part.title}{more}", part.note)
        console.out().print(console.table(part.columns, part.rows))
    console.print_lines(*exclusion(found))
