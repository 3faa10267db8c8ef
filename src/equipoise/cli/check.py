"""``equipoise check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options
from equipoise.errors import ParityError, UsageError

if TYPE_CHECKING:
    from equipoise.checking import CheckedOutput, CheckRecord
    from equipoise.stages import Observer
    from equipoise.tuning import TuneConfig


def command(
    path: Annotated[Path, typer.Argument(help="A bundle directory or an .onnx file.")],
    source: Annotated[
        str,
        typer.Option(help="The trained model; without it a bundle's own reference outputs serve."),
    ] = "",
    data: Annotated[str, typer.Option(help="Evaluation data; needed for an .onnx file.")] = "",
    weights: options.Weights = None,
    task: options.Task = "",
    samples: options.Samples = None,
    tokenizer: options.Tokenizer = None,
    labels: options.Labels = "",
    atol: Annotated[
        float | None,
        typer.Option(help="Largest allowed difference; from the model's own noise if not given."),
    ] = None,
    cache_dir: options.CacheDir = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Check the parity of an engine with its source.

    The exit code is 6 when an output differs by more than is allowed. A bundle is first checked
    against its hashes (exit code 4).
    """
    from equipoise.tuning import TuneConfig

    config = TuneConfig(
        source=source,
        data=data,
        output=path.parent,
        weights=weights,
        task=task,
        samples=samples,
        tokenizer=tokenizer,
        labels=options.names(labels),
        cache=cache_dir,
    )
    with console.progress(quiet=quiet or json) as observer:
        check = _bundle if path.is_dir() else _onnx
        found = check(path, config, observer=observer, atol=atol)
    if json:
        console.print_json(found)
    else:
        _print(found)
    if not found.passed:
        worst = next(output for output in found.outputs if not output.passed)
        raise ParityError(
            f"{found.subject}: output {worst.parity.name!r} differs from {found.reference} by"
            f" {worst.parity.max_abs:.3g}; allowed {worst.allowed:.3g}",
            hint="It was made from other weights, or this device computes otherwise.",
        )


def _bundle(
    path: Path, config: TuneConfig, *, observer: Observer, atol: float | None
) -> CheckRecord:
    from equipoise.checking import check_bundle
    from equipoise.deploy import load
    from equipoise.export.source import parse_source
    from equipoise.stages import StageRunner, default_cache

    runner = StageRunner(config.cache or default_cache(), observer=observer)
    with load(path) as bundle:
        source = None
        if config.source:
            source = parse_source(config.source, weights=config.weights, task=config.task)
        return check_bundle(bundle, source=source, runner=runner, atol=atol)


def _onnx(path: Path, config: TuneConfig, *, observer: Observer, atol: float | None) -> CheckRecord:
    from equipoise.checking import check_onnx
    from equipoise.tuning import make_pipeline

    if not config.source or not config.data:
        raise UsageError(f"checking {path} needs --source and --data")
    return check_onnx(path, pipeline=make_pipeline(config, observer=observer), atol=atol)


def _print(found: CheckRecord) -> None:
    titles = ["output", "largest difference", "allowed", "cosine", "same top-1", "verdict"]
    console.print_lines(f"{found.subject} against {found.reference}, {found.samples} samples")
    console.out().print(console.table(titles, map(_row, found.outputs)))


def _row(output: CheckedOutput) -> tuple[str, ...]:
    p = output.parity
    top1 = "–" if p.top1_agreement is None else f"{p.top1_agreement:.2%}"
    verdict = "passed" if output.passed else "FAILED"
    return p.name, f"{p.max_abs:.3g}", f"{output.allowed:.3g}", f"{p.cosine:.6f}", top1, verdict
