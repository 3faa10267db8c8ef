"""The Markdown of a job's summary."""

from __future__ import annotations

import re

import pytest

from equipoise.report.gates import Gate, failures_first
from equipoise.report.summary import summary


def gate(name: str, *, passed: bool, **words: str) -> Gate:
    """A gate with some words."""
    given = {"measured": "1", "allowed": "2", **words}
    return Gate(name=name, group=given.pop("group", ""), passed=passed, **given)


def rows(text: str) -> list[list[str]]:
    """Cells of the table rows; a pipe that is escaped parts nothing."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_verdict_comes_before_the_table_and_failures_before_the_rest() -> None:
    """What a reader looks for stands first."""
    gates = [gate("a", passed=True), gate("b", passed=False), gate("c", passed=True)]
    text = summary([*gates, gate("d", passed=False)], title="T", verdict="V.", details={})
    assert text.startswith("## T\n\n**❌ 2 of 4 gates failed.** V.\n")
    assert text.index("V.") < text.index("| --- |")
    assert [row[1] for row in rows(text)[2:]] == ["b", "d", "a", "c"]
    assert [g.name for g in failures_first(gates)] == ["b", "a", "c"]


def test_a_pass_says_so() -> None:
    """With the number of gates."""
    text = summary([gate("a", passed=True)], title="T", verdict="Fine.", details={})
    assert "✅ 1 gates passed" in text
    assert "❌" not in text


def test_advice_is_given_for_what_failed_alone() -> None:
    """What passed needs none."""
    gates = [gate("a", passed=True, advice="keep"), gate("b", passed=False, advice="Do this.")]
    text = summary(gates, title="T", verdict="", details={})
    assert "- **b**: Do this." in text
    assert "keep" not in text


def test_details_are_folded() -> None:
    """In a block that GitHub draws as a triangle; with the blank line that its tables need."""
    text = summary([], title="T", verdict="", details={"onnxruntime": "1.32.0"})
    assert "<details>\n<summary>Details</summary>\n\n| | |" in text
    assert "| onnxruntime | 1.32.0 |" in text
    assert text.rstrip().endswith("</details>")
    assert "<details>" not in summary([], title="T", verdict="", details={})


@pytest.mark.parametrize(
    ("words", "cell"),
    [
        ("a|b", r"a\|b"),
        ("a\nb\r\nc", "a b c"),
        ("a\u2028b", "a b"),
        ("<script>x</script>", "&lt;script&gt;x&lt;/script&gt;"),
        ("</details>", "&lt;/details&gt;"),
        ("[x](http://y)", r"\[x\](http://y)"),
        ("@someone", r"\@someone"),
        ("a*b_c`d`", r"a\*b\_c\`d\`"),
        ("a\\|b", r"a\\\|b"),
        ("a\x1b\x00b", "ab"),
    ],
)
def test_words_stay_words_in_a_cell(words: str, cell: str) -> None:
    """No column more, no markup, no tag, no mention: names come from models and files."""
    text = summary([gate("n", passed=False, measured=words)], title="T", verdict="", details={})
    row = next(line for line in text.splitlines() if line.startswith("| ❌"))
    assert row == f"| ❌ | n | {cell} | 2 |"
    assert f"## {cell}" in summary([], title=words, verdict="", details={})
