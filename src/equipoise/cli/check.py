"""``equipoise check``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from equipoise.cli import console, options
from equipoise.errors import ParityError, UsageError

if TYPE_CHECKING:
    from equipoise.checking import CheckRequest
    from equipoise.checks.verdict import CheckedSide, CheckRecord
    from equipoise.parity.compare import OutputParity
    from equipoise.parity.limits import Finding
    from equipoise.parity.precision import Precision
    from equipoise.report.gates import Gate

_PRECISIONS = ("float32", "float16", "bfloat16", "int8", "int4")


def command(
    engines: Annotated[
        list[Path],
        typer.Argument(help="Bundles, directories of engines, or .onnx files."),
    ],
    against: Annotated[
        str,
        typer.Option(
            "--against",
            "--source",
            help="The trained model; without it a bundle's own reference outputs serve.",
        ),
    ] = "",
    data: Annotated[
        str, typer.Option(help="Evaluation data; a bundle has a few golden samples of its own.")
    ] = "",
    weights: options.Weights = None,
    task: options.Task = "",
    samples: options.Samples = None,
    tokenizer: options.Tokenizer = None,
    labels: options.Labels = "",
    metric: Annotated[
        str, typer.Option(help="Task metric; with --max-drop that of the task by default.")
    ] = "",
    atol: Annotated[
        float | None, typer.Option(help="Largest allowed difference; 0 beside --rtol.")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="Allowed difference, as a part of the value itself.")
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="Smallest allowed cosine of a sample.")
    ] = None,
    min_sqnr: Annotated[
        float | None, typer.Option(help="Smallest allowed signal over noise, in dB.")
    ] = None,
    max_flips: Annotated[
        float | None, typer.Option(help="Largest allowed share of other arg-maxima: 0.01.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Largest allowed drop of the metric, at 95 % confidence.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of engines that do not say theirs: float32, float16, int8, ...")
    ] = "",
    repeat: Annotated[
        int, typer.Option(help="Make each engine so often, and run it so often each time.")
    ] = 1,
    blame: Annotated[
        bool | None,
        typer.Option(
            "--blame/--no-blame", help="Look for the guilty node; where an engine fails by default."
        ),
    ] = None,
    repro: Annotated[
        Path | None,
        typer.Option(help="Directory for the smallest graph that still departs, with a script."),
    ] = None,
    locked: Annotated[
        Path | None, typer.Option(help="Lock of accepted figures, as equipoise lock writes it.")
    ] = None,
    any_machine: Annotated[
        bool,
        typer.Option("--any-machine", help="Compare latencies though the lock is of another CPU."),
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    summary: Annotated[
        Path | None,
        typer.Option(help="Append Markdown to this file, such as $GITHUB_STEP_SUMMARY."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write everything as JSON to this file; - prints it.")
    ] = None,
    target: options.Target = "cpu",
    threads: options.Threads = None,
    cache_dir: options.CacheDir = None,
    time_limit: options.TimeLimit = 3600.0,
    quiet: options.Quiet = False,
) -> None:
    """Check the parity of engines with the model they were made from, step by step.

    What is allowed comes from the model's own float32 noise on this data, times a factor of the
    engine's precision; a limit given here takes its place. The exit code is 6 when something
    differs by more, 4 when an engine is not what its manifest says.
    """
    from equipoise.checking import CheckRequest, run_check
    from equipoise.parity.limits import Limits

    request = CheckRequest(
        engines=tuple(engines),
        against=against,
        data=data,
        weights=weights,
        task=task,
        samples=samples,
        tokenizer=tokenizer,
        labels=options.names(labels),
        metric=metric,
        limits=Limits(
            atol=atol,
            rtol=rtol,
            min_cosine=min_cosine,
            min_sqnr_db=min_sqnr,
            max_flips=max_flips,
            max_drop=max_drop,
        ),
        precision=_precision(precision),
        repeat=repeat,
        blame=blame,
        repro=repro,
        locked=locked,
        any_machine=any_machine,
        threads=threads,
        target=target,
        cache=cache_dir,
        time_limit_s=time_limit,
    )
    printed = json is not None and str(json) == "-"
    begin = time.monotonic()
    with console.progress(quiet=quiet or printed) as observer:
        found = run_check(request, observer=observer)
    _write(found, request, junit=junit, summary=summary, seconds=time.monotonic() - begin)
    if json is not None and not printed:
        _write_json(found, json)
    if printed:
        console.print_json(found)
    else:
        _print(found)
    if not found.passed:
        first, _, rest = _failures(found).partition("\n")
        raise ParityError(first, hint=rest)


def _precision(text: str) -> Precision | None:
    if text and text not in _PRECISIONS:
        raise UsageError(f"--precision is {text!r}; known: {', '.join(_PRECISIONS)}")
    return cast("Precision", text) if text else None


def _failures(found: CheckRecord) -> str:
    lines = found.verdict.splitlines()
    return "\n".join(line for line in lines if line.startswith("FAILED"))


def _write(
    found: CheckRecord,
    request: CheckRequest,
    *,
    junit: Path | None,
    summary: Path | None,
    seconds: float,
) -> None:
    """The reports of a pipeline; written whether the check passed or not."""
    from equipoise import fs
    from equipoise.checks.verdict import details
    from equipoise.report import junit as xml
    from equipoise.report import summary as markdown

    title = ", ".join(map(str, request.engines))
    if junit is not None:
        text = xml.junit(found.gates, suite=title, verdict=found.verdict, seconds=seconds)
        fs.write_text(junit, text)
    if summary is not None:
        text = markdown.summary(
            found.gates, title=title, verdict=found.verdict, details=details(found)
        )
        before = fs.read_text(summary, error=UsageError) if summary.is_file() else ""
        fs.write_text(summary, before + text)


def _write_json(found: CheckRecord, path: Path) -> None:
    from equipoise import fs

    fs.write_json(path, found)


def _print(found: CheckRecord) -> None:
    titles = ["side", "step", "output", "difference", "SQNR", "cosine", "flips", "allowed"]
    console.print_lines(
        f"against {found.reference} ({found.source}) on {found.samples} samples of {found.data}"
    )
    rows = [row for checked in found.sides for row in _rows(checked)]
    console.out().print(console.table(titles, rows))
    reasons = dict.fromkeys(f.why for checked in found.sides for f in checked.findings if f.why)
    if found.floor_by:
        console.print_lines(f"noise floor by {found.floor_by}")
    console.print_lines(*(f"allowed for {why}" for why in reasons))
    for checked in found.sides:
        console.print_lines(*_notes(checked))
    if found.locked:
        titles = ["against the lock", "measured", "allowed", ""]
        console.out().print(console.table(titles, map(_gate_row, found.locked)))
    if found.reproducer:
        console.print_lines(f"reproducer: {found.reproducer}")
    if found.passed:
        console.print_lines(found.verdict)


def _gate_row(gate: Gate) -> tuple[str, ...]:
    return gate.name, gate.measured, gate.allowed, "passed" if gate.passed else "FAILED"


def _rows(checked: CheckedSide) -> Iterator[tuple[str, ...]]:
    if checked.failed:
        yield checked.side.name, checked.side.step, "–", checked.failed, "–", "–", "–", "–"
    for parity in checked.outputs:
        yield (checked.side.name, checked.side.step, *_cells(parity), _verdict(checked, parity))


def _cells(parity: OutputParity) -> tuple[str, ...]:
    return (
        parity.name,
        f"{parity.max_abs:.3g}",
        "equal" if parity.sqnr_db is None else f"{parity.sqnr_db:.1f} dB",
        f"{parity.cosine:.6f}",
        "–" if parity.flips is None else f"{parity.flips:.2%}",
    )


def _verdict(checked: CheckedSide, parity: OutputParity) -> str:
    found = [f for f in checked.findings if f.output == parity.name]
    words = "; ".join(_limit(finding) for finding in found if not finding.passed)
    return f"FAILED: {words}" if words else "; ".join(map(_limit, found)) or "–"


def _limit(finding: Finding) -> str:
    if finding.measure == "largest difference":
        return finding.allowed
    return f"{finding.measure} {finding.allowed}"


def _notes(checked: CheckedSide) -> Iterator[str]:
    from equipoise.checks.verdict import describe

    for parity in checked.outputs if checked.side.given else ():
        yield f"{checked.side.name}: {parity.name}: {describe(parity)}"
    for spread in checked.spreads:
        yield (
            f"{checked.side.name}: {spread.output} differs by {spread.between_runs:.3g} between"
            f" {spread.runs} runs and by {spread.between_builds:.3g} between {spread.builds}"
            f" engines {spread.built} anew"
        )
    metric = checked.metric
    if metric is not None:
        yield (
            f"{checked.side.name}: {metric.name} {metric.value.value:.4f}"
            f" [{metric.value.low:.4f}, {metric.value.high:.4f}], drop {metric.drop.value:+.4f},"
            f" at most {metric.drop.high:.4f} at 95 %"
        )
