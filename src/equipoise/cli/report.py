"""``equipoise report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli import console, options
from equipoise.errors import UsageError

if TYPE_CHECKING:
    from equipoise.report.compare import Comparison


@dataclass(frozen=True, kw_only=True)
class Written:
    """What ``--json`` prints.

    Attributes:
        report: The page.
        comparison: What changed since the other result, if one was named.
    """

    report: str
    comparison: Comparison | None


def command(
    path: Annotated[
        Path, typer.Argument(help="Output directory of equipoise tune, or its results.json.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page; report.html beside the results if not given."
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="Another output directory or results.json: show what changed since."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Write the report page again, and compare with another result."""
    from equipoise import fs
    from equipoise.report.compare import compare as compare_results
    from equipoise.report.html import render_html
    from equipoise.report.write import REPORT_FILE, read_result, results_file

    read = [results_file(p) for p in (path, compare) if p is not None]
    page = read[0].with_name(REPORT_FILE) if output is None else output
    _require_other(page, read=read)
    result = read_result(path)
    found = None if compare is None else compare_results(read_result(compare), result)
    fs.write_text(page, render_html(result, compared=found))
    if json:
        console.print_json(Written(report=str(page), comparison=found))
        return
    if found is not None:
        _print(found)
    console.print_lines(f"report  {page}")


def _require_other(page: Path, *, read: list[Path]) -> None:
    """Raise UsageError for a page that would take the place of what it is made from."""
    if page.is_dir():
        raise UsageError(
            f"--output {page} is a directory; it must name a file",
            hint=f"For example {page / 'report.html'}",
        )
    if page.resolve() in {file.resolve() for file in read}:
        raise UsageError(f"--output {page} would overwrite the results that the page is made from")


def _print(found: Comparison) -> None:
    from equipoise.report.comparing import verdict_lines
    from equipoise.report.terminal import comparison_tables

    console.print_lines(*verdict_lines(found))
    for table in comparison_tables(found):
        console.out().print(table)
