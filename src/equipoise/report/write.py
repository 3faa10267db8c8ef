"""``results.json`` and ``report.html``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from equipoise import fs, record
from equipoise.errors import InputError
from equipoise.report.html import render_html
from equipoise.search.result import TuneResult

RESULTS_FILE: Final = "results.json"
REPORT_FILE: Final = "report.html"

_WANTED: Final = "Give the --output directory of equipoise tune, or the results.json in it."


def write_report(result: TuneResult, *, output: Path) -> None:
    """Write both files into ``output``. Raises OutputError when it cannot be written."""
    fs.write_json(output / RESULTS_FILE, result)
    fs.write_text(output / REPORT_FILE, render_html(result))


def results_file(path: Path) -> Path:
    """The file that holds the result: ``path``, or ``results.json`` in it."""
    return path / RESULTS_FILE if path.is_dir() else path


def read_result(path: Path) -> TuneResult:
    """Read what ``tune`` found.

    Args:
        path: The output directory of ``tune``, or the file itself.

    Raises:
        InputError: There is none, it is damaged, or another version of equipoise wrote it.
    """
    file = results_file(path)
    if not file.is_file():
        raise InputError(f"no {RESULTS_FILE} in {path}", hint=_WANTED)
    text = fs.read_text(file, error=InputError)
    try:
        data = record.parse(text)
    except ValueError as error:
        raise InputError(
            f"{file} is damaged: it is no JSON ({error})",
            hint="Run equipoise tune again: what it has done before is not done twice.",
        ) from error
    return _result(data, file=file)


def _result(data: record.Json, *, file: Path) -> TuneResult:
    try:
        result = record.from_json(TuneResult, data)
        json.dumps(record.to_json(result), ensure_ascii=False).encode()  # a half of a character
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is no result that this version of equipoise can read: {error}",
            hint=f"{_WANTED} One of another version is made anew by the same tune command.",
        ) from error
    return result
