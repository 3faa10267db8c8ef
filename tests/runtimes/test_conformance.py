"""Every runtime passes the conformance suite, and the suite finds what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise import testing
from equipoise.errors import UsageError
from equipoise.runtimes import registry

RUNTIMES = {"onnxruntime": True, "openvino": True, "reference": True, "null": False}
ON_GPUS = {"tensorrt", "tensorrt-rtx"}
"""Those that test_tensorrt.py puts through the suite, where there is a GPU."""
PAIRS = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name, computes in RUNTIMES.items()
    for case in testing.cases(computes=computes)
]


@pytest.mark.parametrize(("runtime", "case"), PAIRS)
def test_runtime_conforms(runtime: str, case: testing.Case, tmp_path: Path) -> None:
    """One case of the suite on one runtime of ours."""
    case.run(runtime, folder=tmp_path)


def test_every_runtime_of_ours_is_in_this_list() -> None:
    """A runtime that is added is tested."""
    ours = set(registry.BUILDERS.builtin)
    assert set(RUNTIMES) | ON_GPUS == ours == set(registry.SESSIONS.builtin)


@pytest.mark.parametrize("name", RUNTIMES)
def test_check_runtime_passes(name: str) -> None:
    """The whole suite in one call."""
    testing.check_runtime(name, computes=RUNTIMES[name])


def test_the_null_runtime_does_not_pass_as_one_that_computes() -> None:
    """The numeric cases look at numbers."""
    with pytest.raises(AssertionError, match=r"agrees-with-numpy.*off by"):
        testing.check_runtime("null")


def test_an_unknown_runtime_is_a_usage_error_that_lists_the_known() -> None:
    """For the builder, the session and the suite."""
    for ask in (registry.builder, registry.session_opener, testing.check_runtime):
        with pytest.raises(UsageError, match=r"unknown runtime 'onnxruntim'.*null") as caught:
            ask("onnxruntim")
        assert "'onnxruntime'" in caught.value.hint


FAULTY = """
import numpy as np
from equipoise.errors import InputError, SourceError
from equipoise.runtimes.protocol import Availability
from equipoise.runtimes.reference.builder import ReferenceBuilder
from equipoise.runtimes.reference.session import ReferenceSession


def runtime(name, **methods):
    session = type(name, (ReferenceSession,), methods)
    return lambda engine, *, settings: session(engine)


def twice(self, feeds, *, out=None):
    return {n: 2 * a for n, a in ReferenceSession.run(self, feeds, out=out).items()}


def ignores_out(self, feeds, *, out=None):
    return ReferenceSession.run(self, feeds)


def unchecked(self, feeds, *, out=None):
    feeds = {n: np.asarray(a) for n, a in feeds.items()}
    try:
        return ReferenceSession.run(self, feeds, out=out)
    except InputError as error:
        if "float64" in str(error):
            return ReferenceSession.run(self, {**feeds, "x": feeds["x"].astype(np.float32)})
        raise


class Reuses(ReferenceSession):
    buffers = None

    def run(self, feeds, *, out=None):
        results = super().run(feeds, out=out)
        if out is None and len(feeds["x"]) == 3:
            self.buffers = self.buffers or results
            for name in results:
                self.buffers[name][...] = results[name]
            return self.buffers
        return results


class Lax(ReferenceSession):
    def __init__(self, engine):
        try:
            super().__init__(engine)
        except SourceError:
            raise RuntimeError("vendor error 42") from None


class Silent(ReferenceBuilder):
    def availability(self):
        return Availability(available=False)


class Miscounts(ReferenceBuilder):
    def build(self, model, output, *, settings, options=None):
        from dataclasses import replace

        return replace(super().build(model, output, settings=settings), size_bytes=1)


GOOD, SILENT, MISCOUNTS = ReferenceBuilder(), Silent(), Miscounts()
good = runtime("Good")
twice = runtime("Twice", run=twice)
ignores_out = runtime("IgnoresOut", run=ignores_out)
unchecked = runtime("Unchecked", run=unchecked)
never_closes = runtime("NeverCloses", close=lambda self: None)
reuses = lambda engine, *, settings: Reuses(engine)
lax = lambda engine, *, settings: Lax(engine)
"""

FAULTS = {
    "twice": ("GOOD", "agrees-with-numpy-at-two-batch-sizes"),
    "ignores_out": ("GOOD", "fills-the-buffers-of-the-caller"),
    "unchecked": ("GOOD", "refuses-feeds-that-do-not-fit-and-goes-on"),
    "never_closes": ("GOOD", "refuses-to-run-once-closed"),
    "reuses": ("GOOD", "keeps-earlier-results-and-its-inputs-as-they-were"),
    "lax": ("GOOD", "refuses-an-engine-that-is-broken"),
    "silent": ("SILENT", "says-whether-it-is-available"),
    "miscounts": ("MISCOUNTS", "builds-an-engine-that-its-record-describes"),
}


@pytest.fixture
def outside_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package of somebody else that brings runtimes through entry points."""
    site = tmp_path / "site"
    info = site / "faulty_runtimes-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "faulty_runtimes.py").write_text(FAULTY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-runtimes\nVersion: 1.0\n")
    builders = {"good": "GOOD"} | {name: fault[0] for name, fault in FAULTS.items()}
    sessions = {name: name for name in builders} | {"silent": "good", "miscounts": "good"}
    lines = ["[equipoise.builders]"]
    lines += [f"{name} = faulty_runtimes:{value}" for name, value in builders.items()]
    lines += ["[equipoise.sessions]"]
    lines += [f"{name} = faulty_runtimes:{value}" for name, value in sessions.items()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(site)


@pytest.mark.usefixtures("outside_package")
def test_a_runtime_from_another_package_is_found_and_conforms() -> None:
    """Entry points open the table of runtimes."""
    assert "good" in registry.BUILDERS.names()
    testing.check_runtime("good")


@pytest.mark.usefixtures("outside_package")
@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_runtime_fails_the_case_about_its_fault(name: str, tmp_path: Path) -> None:
    """Each fault is found where it is expected."""
    case = next(c for c in testing.cases() if str(c) == FAULTS[name][1])
    with pytest.raises(AssertionError):
        case.run(name, folder=tmp_path)
