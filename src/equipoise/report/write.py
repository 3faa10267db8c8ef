"""``results.json`` and ``report.html``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from equipoise import fs, record
from equipoise.errors import InputError
from equipoise.report.html import render_html
from equipoise.search.result import TuneResult

RESULTS_FILE: Final = "results.json"
REPORT_FILE: Final = "report.html"


def write_report(result: TuneResult, *, output: Path) -> None:
    """Write both files into ``output``. Raises OutputError when it cannot be written."""
    fs.write_json(output / RESULTS_FILE, result)
    fs.write_text(output / REPORT_FILE, render_html(result))


def read_result(path: Path) -> TuneResult:
    """Read ``results.json``. Raises InputError when it is none."""
    text = fs.read_text(path, error=InputError)
    return record.loads(TuneResult, text, where=str(path), error=InputError)
