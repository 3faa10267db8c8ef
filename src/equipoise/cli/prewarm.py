"""``equipoise prewarm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli import console, options


def command(
    path: Annotated[Path, typer.Argument(help="A bundle, a directory of `build`, or .onnx file.")],
    inputs: options.Inputs = None,
    dim: options.Dims = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads per operator.")] = 1,
    json: options.Json = False,
) -> None:
    """Open an engine and run it, so that what it compiles or caches is there before it is needed.

    Says what opening, the first inference and a later one take.
    """
    from equipoise.engines import prewarm, samples_for

    samples = samples_for(path, inputs=inputs, sizes=options.sizes(dim or (), option="--dim"))
    found = prewarm(path, samples=samples, threads=threads)
    if json:
        console.print_json(found)
        return
    console.print_lines(
        f"open     {found.open_ms:.1f} ms",
        f"first    {found.first_ms:.2f} ms",
        f"later    {found.later_ms:.2f} ms, the fastest of a few ({samples.kind})",
    )
