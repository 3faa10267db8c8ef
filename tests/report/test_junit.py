"""JUnit XML, read back by a real parser and held against what CI systems read."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from equipoise.report.gates import Gate
from equipoise.report.junit import junit

PASSED = Gate(name="logits: SQNR", group="m.onnx", passed=True, measured="41 dB", allowed="20 dB")
FAILED = Gate(
    name="size", group="lock", passed=False, measured="12 MB", allowed="11 MB", advice="Lock anew."
)

CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": {"testcase", "system-out"},
    "testcase": {"failure", "system-out"},
    "failure": set(),
    "system-out": set(),
}
REQUIRED = {
    "testsuites": {"tests", "failures", "errors", "time"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time"},
    "testcase": {"name", "classname", "time"},
    "failure": {"message", "type"},
    "system-out": set(),
}
ALLOWED = {**REQUIRED, "testsuites": REQUIRED["testsuites"] | {"name"}}


def parsed(*gates: Gate, verdict: str = "", suite: str = "s", seconds: float = 1.0) -> ET.Element:
    """Read it as UTF-8 bytes, as a CI system does; check the structure."""
    root = ET.fromstring(junit(gates, suite=suite, verdict=verdict, seconds=seconds).encode())
    assert root.tag == "testsuites"
    check(root)
    return root


def check(element: ET.Element) -> None:
    """The elements, their order of nesting and their attributes, as in the common schemas."""
    assert REQUIRED[element.tag] <= set(element.attrib) <= ALLOWED[element.tag]
    assert {child.tag for child in element} <= CHILDREN[element.tag]
    if element.tag == "testsuite":
        cases = element.findall("testcase")
        failed = [case for case in cases if case.find("failure") is not None]
        assert int(element.attrib["tests"]) == len(cases)
        assert int(element.attrib["failures"]) == len(failed)
        assert float(element.attrib["time"]) >= 0
    for child in element:
        check(child)


def test_a_failure_has_what_was_measured_what_is_allowed_and_advice() -> None:
    """The message is one line for lists; the text has everything."""
    root = parsed(PASSED, FAILED, verdict="Too large.", seconds=2.5)
    good, bad = root.iter("testcase")
    assert good.find("failure") is None
    assert bad.attrib["classname"] == "lock"
    failure = bad.find("failure")
    assert failure is not None
    assert failure.attrib["message"] == "12 MB; allowed 11 MB"
    assert (failure.text or "").splitlines() == ["measured: 12 MB", "allowed: 11 MB", "Lock anew."]
    suite = root.find("testsuite")
    assert suite is not None
    assert suite.attrib["time"] == "2.500"
    assert suite.findtext("system-out") == "Too large."


def test_no_gates_are_a_suite_without_cases() -> None:
    """Nothing was checked, and nothing failed."""
    suite = parsed().find("testsuite")
    assert suite is not None
    assert suite.attrib["tests"] == "0"


@pytest.mark.parametrize(
    "text",
    ["a \"quoted\" & <tagged> 'name'", "schräg – 漢字 – 🙂", "]]> <![CDATA[", "&#0; &amp;"],
)
def test_text_comes_back_as_it_went_in(text: str) -> None:
    """In attributes and in elements."""
    gate = Gate(name=text, group=text, passed=False, measured=text, allowed="", advice=text)
    root = parsed(gate, verdict=text, suite=text)
    case = next(root.iter("testcase"))
    assert case.attrib["name"] == case.attrib["classname"] == text
    assert text in (case.findtext("failure") or "")
    assert root.findtext("testsuite/system-out") == text


@pytest.mark.parametrize(
    "code", [*range(9), 0xB, 0xC, *range(0xE, 0x20), 0xD800, 0xDFFF, 0xFFFE, 0xFFFF]
)
def test_characters_that_xml_forbids_are_left_out(code: int) -> None:
    """A terminal's colours or a torn encoding in an error message make no broken report."""
    gate = Gate(name=f"a{chr(code)}b", group="", passed=False, measured=f"{chr(code)}x", allowed="")
    case = next(parsed(gate, verdict=f"v{chr(code)}").iter("testcase"))
    assert case.attrib["name"] == "ab"


@pytest.mark.parametrize("text", ["a\nb", "a\tb", "a\r\nb"])
def test_lines_stay_lines(text: str) -> None:
    """Attributes keep line breaks as references; a parser makes one line end of both kinds."""
    gate = Gate(name=text, group="g", passed=True, measured="", allowed="")
    name = next(parsed(gate).iter("testcase")).attrib["name"]
    assert name == text
