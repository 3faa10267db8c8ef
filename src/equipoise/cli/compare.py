"""``equipoise compare``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options

if TYPE_CHECKING:
    from equipoise.engines import EngineComparison


def command(
    first: Annotated[Path, typer.Argument(help="A bundle, a directory of `build`, or .onnx file.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    inputs: options.Inputs = None,
    dim: options.Dims = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads per operator.")] = 1,
    rounds: options.Rounds = 100,
    json: options.Json = False,
) -> None:
    """Compare two engines: what they give, how fast, how large.

    Both run in one process in interleaved rounds. Without --inputs a bundle's golden inputs are
    taken, else ones, which say little about outputs.
    """
    from equipoise.engines import compare_engines, samples_for

    sizes = options.sizes(dim or (), option="--dim")
    samples = samples_for(first, inputs=inputs, sizes=sizes)
    found = compare_engines(first, second, samples=samples, threads=threads, rounds=rounds)
    if json:
        console.print_json(found)
        return
    console.out().print(console.latency_table(found.latencies))
    console.print_lines(*_lines(found), f"{rounds} rounds, {samples.kind}")


def _lines(found: EngineComparison) -> Iterator[str]:
    from equipoise.report.rows import size

    for output in found.outputs:
        kept = "equal" if output.sqnr_db is None else f"{output.sqnr_db:.1f} dB"
        top = output.top1_agreement
        agreed = "" if top is None else f", largest entry the same in {top:.1%}"
        yield (
            f"{output.name}: {kept}, cosine {output.cosine:.5f}, differs by at most"
            f" {output.max_abs:.3g} of {output.scale:.3g}{agreed}"
        )
    before, after = found.size_bytes
    yield f"size: {size(before)} and {size(after)}, {after / before:.2f} times"
