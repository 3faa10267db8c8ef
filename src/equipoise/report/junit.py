"""Gates as JUnit XML, the form in which CI systems read test results.

There is no standard. What is written here is what the readers of Jenkins, GitLab and GitHub have in
common: ``testsuites`` around a ``testsuite``, a ``testcase`` for each gate with its group as
``classname``, and a ``failure`` in those that failed. The counts are those of the cases.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final
from xml.etree import ElementTree as ET

from equipoise.report.gates import Gate

_NOT_XML: Final = re.compile(
    "[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]",
)
"""Characters that XML 1.0 forbids, even as references: section 2.2, production [2]."""

_DECLARATION: Final = '<?xml version="1.0" encoding="UTF-8"?>\n'


def junit(gates: Sequence[Gate], *, suite: str, verdict: str, seconds: float) -> str:
    """JUnit XML of ``gates``.

    Args:
        gates: What was checked.
        suite: Name of the test suite.
        verdict: The outcome in words; stands in ``system-out``.
        seconds: How long all of it took. It stands at the suite: gates share their measurements.
    """
    counts = {
        "name": _text(suite),
        "tests": str(len(gates)),
        "failures": str(sum(not gate.passed for gate in gates)),
        "errors": "0",
        "time": f"{max(seconds, 0.0):.3f}",
    }
    root = ET.Element("testsuites", counts)
    tests = ET.SubElement(root, "testsuite", {**counts, "skipped": "0"})
    for gate in gates:
        _add_case(tests, gate)
    ET.SubElement(tests, "system-out").text = _text(verdict)
    ET.indent(root)
    return f"{_DECLARATION}{ET.tostring(root, encoding='unicode')}\n"


def _add_case(tests: ET.Element, gate: Gate) -> None:
    names = {"name": _text(gate.name), "classname": _text(gate.group), "time": "0.000"}
    case = ET.SubElement(tests, "testcase", names)
    if gate.passed:
        ET.SubElement(case, "system-out").text = _text(_lines(gate))
        return
    message = _text(f"{gate.measured}; allowed {gate.allowed}")
    failure = ET.SubElement(case, "failure", {"message": message, "type": "gate"})
    failure.text = _text(_lines(gate))


def _lines(gate: Gate) -> str:
    lines = [f"measured: {gate.measured}", f"allowed: {gate.allowed}", gate.advice]
    return "\n".join(line for line in lines if line)


def _text(text: str) -> str:
    """``text`` without the characters that XML forbids; a lone surrogate is one of them."""
    return _NOT_XML.sub("", text)
