"""Gates as GitHub-flavoured Markdown, for the summary of a job or a comment."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Final

from equipoise.report.gates import Gate, failures_first

_SPECIAL: Final = re.compile(r"([\\`*_\[\]|~#@!])")
_NOT_TEXT: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def summary(gates: Sequence[Gate], *, title: str, verdict: str, details: Mapping[str, str]) -> str:
    """Markdown: the verdict, the gates with the failed ones first, the details folded away.

    Args:
        gates: What was checked.
        title: Heading.
        verdict: The outcome in words.
        details: Name -> value of what one may want to know, such as versions.
    """
    failed = sum(not gate.passed for gate in gates)
    mark = (
        f"❌ {failed} of {len(gates)} gates failed" if failed else f"✅ {len(gates)} gates passed"
    )
    parts = [f"## {_cell(title)}", f"**{mark}.** {_cell(verdict)}", _table(gates), _advice(gates)]
    return "\n\n".join(part for part in (*parts, _folded(details)) if part) + "\n"


def _table(gates: Sequence[Gate]) -> str:
    if not gates:
        return ""
    head = ["| | what | measured | allowed |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(_row(gate) for gate in failures_first(gates))])


def _row(gate: Gate) -> str:
    what = f"{gate.group}: {gate.name}" if gate.group else gate.name
    cells = ("✅" if gate.passed else "❌", what, gate.measured, gate.allowed)
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _advice(gates: Sequence[Gate]) -> str:
    """What to do, for what failed."""
    return "\n".join(
        f"- **{_cell(gate.name)}**: {_cell(gate.advice)}"
        for gate in gates
        if gate.advice and not gate.passed
    )


def _folded(details: Mapping[str, str]) -> str:
    if not details:
        return ""
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in details.items()]
    table = "\n".join(["| | |", "| --- | --- |", *rows])
    return f"<details>\n<summary>Details</summary>\n\n{table}\n\n</details>"


def _cell(text: str) -> str:
    """Text that stays text inside a table: no markup, no tags, no mention, one line."""
    plain = _NOT_TEXT.sub("", " ".join(text.splitlines()))
    return _SPECIAL.sub(r"\\\1", html.escape(plain, quote=False))
