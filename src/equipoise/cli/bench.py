"""``equipoise bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.measure.bench import BenchRecord
    from equipoise.spec import Array


def command(
    path: Annotated[Path, typer.Argument(help="A bundle directory or an .onnx file.")],
    against: Annotated[
        Path | None, typer.Option(help="Another bundle or .onnx file to compare with.")
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help=".npz with one array per input; a bundle's golden inputs otherwise."),
    ] = None,
    threads: Annotated[str, typer.Option(help="Thread counts, comma separated.")] = "1",
    rounds: Annotated[int, typer.Option(min=10, help="Number of rounds.")] = 100,
    json: options.Json = False,
) -> None:
    """Measure the latency of one engine or two.

    Two engines run in interleaved rounds in one process; the speed-up is the latency of --against
    divided by the latency of PATH.
    """
    from equipoise.measure.bench import bench

    paths = [against, path] if against else [path]
    samples, kind = _samples(path, inputs)
    engines = [_engine(p) for p in paths]
    records: list[BenchRecord] = []
    for count in _counts(threads):
        records += bench(engines, samples, threads=count, rounds=rounds)
    if json:
        console.print_json(records)
        return
    _print(records, kind=kind)


def _counts(text: str) -> list[int]:
    from equipoise.errors import UsageError

    counts = [int(part) for part in options.names(text) if part.isdigit() and int(part) > 0]
    if not counts or len(counts) != len(options.names(text)):
        raise UsageError(f"--threads {text!r}: give whole numbers above 0, such as 1,2")
    return counts


def _engine(path: Path) -> tuple[Path, str]:
    """Engine file and runtime of a bundle or of an ONNX file."""
    if not path.is_dir():
        return path, "onnxruntime"
    from equipoise.bundle.manifest import read_manifest, verify

    manifest = read_manifest(path)
    verify(path, manifest)
    return path / manifest.engine.file, manifest.engine.runtime


def _samples(path: Path, inputs: Path | None) -> tuple[list[dict[str, Array]], str]:
    """Inputs to run, and what they are."""
    if inputs is not None:
        from equipoise.data.readers.npz import read_arrays

        return [read_arrays(inputs)], f"inputs from {inputs}"
    if path.is_dir():
        from equipoise.bundle.golden import GOLDEN_FILE, read_golden

        return [dict(g.inputs) for g in read_golden(path / GOLDEN_FILE)], "golden inputs"
    from equipoise.runtimes.protocol import SessionSettings
    from equipoise.runtimes.registry import session_opener
    from equipoise.spec import ones

    with session_opener("onnxruntime")(path, settings=SessionSettings()) as session:
        return [ones(session.inputs)], "synthetic inputs: ones, dynamic sizes 1, sequences 16"


def _print(records: list[BenchRecord], *, kind: str) -> None:
    from equipoise.report.rows import interval

    titles = ["engine", "threads", "median, ms", "p95, ms", "speed-up"]
    rows = [
        (
            r.engine,
            str(r.threads),
            interval(r.latency_ms, digits=3),
            f"{r.p95_ms:.3f}",
            interval(r.speedup, digits=2, unit="x") if r.speedup else "–",
        )
        for r in records
    ]
    console.out().print(console.table(titles, rows))
    console.print_lines(f"{records[0].rounds} rounds, {kind}; 95 % intervals of the median")
