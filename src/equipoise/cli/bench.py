"""``equipoise bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.measure.bench import BenchRecord


def command(
    paths: Annotated[
        list[Path], typer.Argument(help="Bundles, directories of `build`, or .onnx files.")
    ],
    inputs: options.Inputs = None,
    dim: options.Dims = None,
    threads: Annotated[str, typer.Option(help="Thread counts, comma separated.")] = "1",
    rounds: options.Rounds = 100,
    json: options.Json = False,
) -> None:
    """Measure the latency of engines side by side.

    All run in interleaved rounds in one process; a speed-up is the latency of the first divided by
    that of the engine.
    """
    from equipoise.engines import find_engine, samples_for
    from equipoise.measure.bench import bench

    counts = options.counts(threads, option="--threads")
    samples = samples_for(paths[0], inputs=inputs, sizes=options.sizes(dim or (), option="--dim"))
    engines = [find_engine(path) for path in paths]
    records: list[BenchRecord] = []
    for count in counts:
        records += bench(engines, samples.feeds, threads=count, rounds=rounds)
    if json:
        console.print_json(records)
        return
    console.out().print(console.latency_table(records))
    console.print_lines(
        f"{rounds} rounds, {samples.kind}; 95 % intervals over openings",
        *dict.fromkeys(note for record in records for note in record.drift.notes),
    )
