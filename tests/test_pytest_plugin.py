"""The plugin of pytest, in runs of pytest of their own that find it by its entry point."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest_plugins = ["pytester"]

LIMIT_MS = 5.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, linear_onnx: Path) -> Path:
    """A directory with a model, an engine that is another one, and data."""
    import onnx
    from onnx import numpy_helper

    folder = tmp_path_factory.mktemp("models")
    model = onnx.load(linear_onnx)
    onnx.save(model, folder / "model.onnx")
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor) * np.float32(1.01)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, folder / "other.onnx")
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.savez(folder / "data.npz", x=x)
    return folder


def run(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    """Run the tests in ``source`` in a new process."""
    pytester.makepyfile(source)
    return pytester.runpytest_subprocess("--strict-markers", "-p", "no:cacheprovider", *options)


@pytest.mark.slow
def test_fixture_and_marker_let_an_equal_engine_through(
    pytester: pytest.Pytester, models: Path
) -> None:
    """Both give the record; a marker holds for a class as well."""
    found = run(
        pytester,
        f"""
        import pytest

        MODEL, DATA = {str(models / "model.onnx")!r}, {str(models / "data.npz")!r}
        equal = pytest.mark.equipoise_parity(engine=MODEL, against=MODEL, data=DATA, threads=1)

        def test_fixture(equipoise_parity):
            record = equipoise_parity(MODEL, against=MODEL, data=DATA, threads=1)
            assert record.passed
            assert record.samples == 40

        @equal
        class TestClass:
            def test_record(self, equipoise_record, tmp_path):
                assert equipoise_record.samples == 40
                assert tmp_path.is_dir()
        """,
    )
    found.assert_outcomes(passed=2)


def test_an_engine_that_differs_fails_with_the_verdict_and_the_body_does_not_run(
    pytester: pytest.Pytester, models: Path
) -> None:
    """One sentence instead of a traceback; limits decide."""
    found = run(
        pytester,
        f"""
        import pytest

        MODEL, OTHER = {str(models / "model.onnx")!r}, {str(models / "other.onnx")!r}
        DATA = {str(models / "data.npz")!r}
        options = dict(against=MODEL, data=DATA, threads=1)

        def test_fixture(equipoise_parity):
            equipoise_parity(OTHER, min_sqnr_db=60.0, **options)

        @pytest.mark.equipoise_parity(OTHER, min_sqnr_db=60.0, **options)
        def test_marker():
            print("the body ran")

        @pytest.mark.equipoise_parity(engine=OTHER, min_sqnr_db=30.0, **options)
        def test_loose():
            print("the loose body ran")
        """,
        "-s",
    )
    # A marker is checked while a test is set up, which pytest counts as an error of the test.
    found.assert_outcomes(passed=1, failed=1, errors=1)
    output = found.stdout.str()
    assert output.count("FAILED: ") >= 2
    assert "other.onnx" in output
    assert "the body ran" not in output
    assert "the loose body ran" in output
    assert "Traceback" not in output
    assert "pytest_plugin.py" not in output


def test_a_check_that_cannot_be_made_is_an_error_with_a_reason(
    pytester: pytest.Pytester, models: Path
) -> None:
    """A missing file, an option that does not exist, no engine, a record without a marker."""
    found = run(
        pytester,
        f"""
        import pytest

        MODEL = {str(models / "model.onnx")!r}

        def test_missing(equipoise_parity):
            equipoise_parity("none.onnx", against=MODEL, data="none.npz")

        @pytest.mark.equipoise_parity(engine=MODEL, min_snr=3)
        def test_unknown_option(): pass

        @pytest.mark.equipoise_parity(against=MODEL)
        def test_no_engine(): pass

        def test_no_marker(equipoise_record): pass
        """,
    )
    found.assert_outcomes(failed=1, errors=3)
    output = found.stdout.str()
    assert "min_snr" in output
    assert re.search(r"missing a required argument: 'engine'", output)
    assert "needs the marker equipoise_parity" in output


def test_who_does_not_use_it_notices_nothing(pytester: pytest.Pytester) -> None:
    """Warnings are errors, markers strict; no module of ours or of anybody heavy is loaded."""
    found = run(
        pytester,
        """
        import sys

        def test_nothing():
            ours = {n for n in sys.modules if n.partition(".")[0] == "equipoise"}
            assert ours == {"equipoise", "equipoise.pytest_plugin"}
            heavy = {"numpy", "onnx", "onnxruntime", "torch", "typer", "rich"}
            assert not heavy & set(sys.modules)
        """,
        "-W",
        "error",
    )
    found.assert_outcomes(passed=1)


def test_it_can_be_turned_off_and_describes_itself(pytester: pytest.Pytester) -> None:
    """By the name of the entry point; in the lists of markers and of fixtures."""
    found = run(pytester, "def test_a(equipoise_parity): pass", "-p", "no:equipoise")
    found.assert_outcomes(errors=1)
    found.stdout.fnmatch_lines(["*fixture 'equipoise_parity' not found*"])
    listed = run(pytester, "", "--markers").stdout.str()
    assert "@pytest.mark.equipoise_parity(engine=, against=, data=, ...)" in listed
    assert "equipoise_parity" in run(pytester, "", "--fixtures").stdout.str()


def test_importing_it_takes_a_few_milliseconds() -> None:
    """What every start of pytest pays; the best of three, because the machine is shared."""
    command = [sys.executable, "-X", "importtime", "-c", "import pytest, equipoise.pytest_plugin"]
    taken = []
    for _ in range(3):
        child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        lines = [line for line in child.stderr.splitlines() if re.search(r"\| +equipoise", line)]
        taken.append(sum(int(line.partition(":")[2].split("|")[0]) for line in lines) / 1000)
        assert len(lines) == 2
    assert min(taken) < LIMIT_MS
