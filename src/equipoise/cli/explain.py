"""``equipoise explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.cli import console, options


def command(
    path: Annotated[
        Path, typer.Argument(help="Output directory of equipoise tune, or its results.json.")
    ],
    json: options.Json = False,
) -> None:
    """Say why a search ended as it did, in a few sentences.

    What was chosen and why, what it costs, how sure that is, what came next, which limits bind and
    what relaxing them would buy, which nodes stay in float, and why the search ended.
    """
    from equipoise.report.explain import explain
    from equipoise.report.write import read_result

    told = explain(read_result(path))
    if json:
        console.print_json(told)
        return
    from equipoise.report.terminal import explanation_grid
    from equipoise.report.words import plain

    heading = f"{plain(told.source)}, data {plain(told.data)}, target {plain(told.target)}"
    console.print_lines(heading, "")
    console.out().print(explanation_grid(told))
