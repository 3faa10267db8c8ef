"""Progress of stages, in a terminal or a file."""

from __future__ import annotations

import pytest

from equipoise.cli.console import progress


def test_stages_of_one_label_may_run_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Two trials calibrate at the same time: each ends its own bar, and the search goes on."""
    with progress(quiet=False) as observer:
        observer.started("calibrate")
        observer.started("calibrate")
        observer.advanced(1, 2)
        observer.ended("calibrate", cached=False)
        observer.failed("calibrate")
        observer.say("int8-static: accepted [best]")
    told = capsys.readouterr().err
    assert "calibrate: not possible" in told
    assert "int8-static: accepted [best]" in told


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as observer:
        observer.started("calibrate")
        observer.ended("calibrate", cached=False)
        observer.say("a line")
    assert capsys.readouterr().err == ""
