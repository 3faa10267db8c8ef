"""``equipoise explain`` from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.report.making import INFEASIBLE, RESULT

from equipoise import record


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The output directory of a search."""
    (tmp_path / "results.json").write_text(record.dumps(RESULT))
    return tmp_path


def test_it_says_what_was_chosen_why_and_what_is_in_the_way(finished: Path, equipoise) -> None:
    """In whole sentences, each beside its topic; the file does as well as the directory."""
    done = equipoise("explain", finished)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.replace("\xa0", " ").split())
    for words in (
        "models/minilm-conll, data conll:data/conll2003, target cpu",
        "choice int8-static is the fastest candidate",
        "on the same 3453 samples",
        "runner-up int8-static-tables is next: slower",
        "relaxing With 0.4 points more drop of entity-f1",
        "blocks 3 of 6 nodes compute in float",
        "The search ended: no recipe that is left is expected to be better.",
        "warning 3 labels occur fewer than 10 times",
    ):
        assert words in text
    assert equipoise("explain", finished / "results.json").stdout == done.stdout


def test_json_holds_the_facts(finished: Path, equipoise) -> None:
    """One document and nothing else."""
    facts = json.loads(equipoise("explain", finished, "--json").stdout)
    assert facts["choice"]["name"] == "int8-static"
    assert facts["evaluation_samples"] == 3453
    assert facts["prices"][0]["candidate"] == "int8-static-fused"


def test_no_engine_is_an_answer(tmp_path: Path, equipoise) -> None:
    """Explaining it is no failure: the search had the exit code."""
    (tmp_path / "results.json").write_text(record.dumps(INFEASIBLE))
    done = equipoise("explain", tmp_path)
    assert done.returncode == 0
    assert "No engine keeps all limits" in done.stdout


@pytest.mark.parametrize(
    ("command", "content", "words"),
    [
        ("explain", None, "no results.json in"),
        ("explain", "{", "is damaged"),
        ("report", '{"max_drop": 0.01}', "no result that this version of equipoise can read"),
    ],
)
def test_what_is_no_result_is_bad_input(
    command: str, content: str | None, words: str, tmp_path: Path, equipoise
) -> None:
    """Exit code 3, the name of the place, what to do; and nothing is written."""
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    done = equipoise(command, tmp_path)
    assert done.returncode == 3
    assert words in done.stderr
    assert str(tmp_path) in done.stderr
    assert "equipoise tune" in done.stderr or "tune command" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "report.html").exists()
