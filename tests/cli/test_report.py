"""``equipoise report`` from the shell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.report.making import INFEASIBLE, MACHINE, RESULT

from equipoise import record
from equipoise.report.html import render_html
from equipoise.search.result import TuneResult


def save(result: TuneResult, *, folder: Path) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(record.dumps(result))
    return folder


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return save(RESULT, folder=tmp_path / "new")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    other = replace(
        RESULT, chosen="int8-dynamic", machine=replace(MACHINE, cpu="Old CPU"),
        versions={**RESULT.versions, "onnxruntime": "1.31.0"},
    )  # fmt: skip
    return save(other, folder=tmp_path / "old")


def test_it_writes_the_page_again(new: Path, equipoise) -> None:
    """Beside the results, or where it is told to."""
    done = equipoise("report", new)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"report  {new / 'report.html'}"
    page = (new / "report.html").read_text(encoding="utf-8")
    assert page == render_html(RESULT)
    elsewhere = new / "sub" / "page.html"
    assert equipoise("report", new / "results.json", "-o", elsewhere).returncode == 0
    assert elsewhere.read_text(encoding="utf-8") == page


def test_it_says_what_changed(new: Path, old: Path, equipoise) -> None:
    """In the terminal and on the page; another machine is marked."""
    done = equipoise("report", new, "--compare", old)
    assert done.returncode == 0, done.stderr
    for words in (
        "The choice changed from int8-dynamic to int8-static.",
        "different machines",
        "1.31.0",
        "Old CPU",
        "better by 14.8\xa0% (measured on another machine)",
    ):
        assert words in done.stdout
    page = (new / "report.html").read_text(encoding="utf-8")
    assert "What changed" in page
    assert "The choice changed from int8-dynamic to int8-static." in page


def test_json_holds_the_comparison(new: Path, old: Path, equipoise) -> None:
    """None without another result."""
    facts = json.loads(equipoise("report", new, "--compare", old / "results.json", "--json").stdout)
    assert facts["report"] == str(new / "report.html")
    assert facts["comparison"]["same_machine"] is False
    assert {c["quantity"] for c in facts["comparison"]["figures"]} == {
        "metric", "latency", "size", "memory"
    }  # fmt: skip
    assert json.loads(equipoise("report", new, "--json").stdout)["comparison"] is None


def test_a_result_without_a_choice_has_a_page(tmp_path: Path, equipoise) -> None:
    """Which says how near it came."""
    folder = save(INFEASIBLE, folder=tmp_path / "none")
    assert equipoise("report", folder).returncode == 0
    assert "No engine keeps all limits" in (folder / "report.html").read_text(encoding="utf-8")


def test_results_are_never_overwritten(new: Path, old: Path, equipoise) -> None:
    """Neither those it shows nor those it compares with, by whatever name."""
    (new / "link.html").symlink_to(old / "results.json")
    for place in (new / "results.json", new / "link.html", new):
        before = (old / "results.json").read_bytes()
        done = equipoise("report", new, "--compare", old, "-o", place)
        assert done.returncode == 2, done.stderr
        assert "--output" in done.stderr
        assert (old / "results.json").read_bytes() == before


def test_an_old_result_that_cannot_be_read_leaves_the_page_alone(new: Path, equipoise) -> None:
    """Nothing is written before all is known."""
    (new / "report.html").write_text("kept")
    done = equipoise("report", new, "--compare", new / "nowhere")
    assert done.returncode == 3
    assert "nowhere" in done.stderr
    assert (new / "report.html").read_text() == "kept"


def test_a_file_where_a_directory_is_needed(new: Path, equipoise) -> None:
    """An error for outputs, which nothing comes of."""
    done = equipoise("report", new, "-o", new / "results.json" / "page.html")
    assert done.returncode == 7
    assert f"cannot write {new / 'results.json'}" in done.stderr
