"""The counting itself: every verdict can be reached, and a bad one fails the family."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.malformed.counting import Case, Worker, every_cut

WORDS = {
    "die": "crashed", "raise": "crashed", "nameless": "crashed", "refuse": "typed",
    "open": "escaped", "run": "escaped", "answer": "silent",
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_every_verdict_can_be_reached(word: str, worker: Worker, tmp_path: Path) -> None:
    """A signal, a foreign exception, no name, a file outside, a child, another answer."""
    folder = tmp_path / "case"
    folder.mkdir()
    (tmp_path / "outside").write_text("secret")
    for name in (word, "refuse"):
        (folder / name).write_text(name)
    cases = [
        Case(name=name, subject="control", folder=folder, file=name, target=name)
        for name in (word, "refuse")
    ]
    outcome = worker.run(cases)
    assert outcome.run == 2, "the case after a death is run as well"
    assert outcome.counts[WORDS[word]] >= 1
    if word != "refuse":
        with pytest.raises(AssertionError, match=WORDS[word]):
            outcome.check(least=1)


def test_a_cut_that_changes_the_answer_is_silent(worker: Worker, tmp_path: Path) -> None:
    """And the file is whole again for the next one who wants it."""
    (tmp_path / "word").write_text("answer")
    case = Case(name="word", subject="control", folder=tmp_path, file="word", target="word")
    outcome = worker.run(every_cut(case))
    assert outcome.counts == {"silent": len("answer")}
    assert (tmp_path / "word").read_text() == "answer"
