"""The search from the shell: limits, recipe files, signals, kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

FEW = ("--metric", "accuracy", "--max-drop", "0.03", "--threads", "1", "--rounds", "12", "--quiet")


@pytest.fixture
def tune(equipoise, workbench, tmp_path: Path):
    """Tune the classifier with a few trials and more options."""

    def run(*options: object) -> subprocess.CompletedProcess[str]:
        out = tmp_path / "out"
        return equipoise(
            "tune", workbench.model, "--data", workbench.data, *FEW, "-o", out, *options
        )

    return run


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_no_engine_keeps_all_limits(tune, tmp_path: Path) -> None:
    """Infeasible is an answer: exit code 6, a report, which limit binds, no bundle."""
    done = tune("--trials", 2, "--max-size", "10B")
    assert done.returncode == 6, done.stderr
    assert "no engine keeps all limits" in done.stderr
    assert "size" in done.stderr
    found = results(tmp_path / "out")
    assert found["chosen"] == ""
    assert {limit["quantity"] for limit in found["binding"]} == {"size"}
    assert (tmp_path / "out/report.html").exists()
    assert not (tmp_path / "out/bundle").exists()


@pytest.mark.slow
def test_recipe_file_makes_the_result_again(tune, equipoise, tmp_path: Path) -> None:
    """Saved, read back, and the same recipe chosen without a search; the file may be overridden."""
    file = tmp_path / "found.toml"
    done = tune("--trials", 5, "--save-recipe", file)
    assert done.returncode == 0, done.stderr
    first = results(tmp_path / "out")
    words = tomllib.loads(file.read_text())
    assert words["tune"]["max-drop"] == 0.03
    assert words["recipe"]["name"] == first["chosen"]
    again = equipoise("tune", "--recipe", file, "-o", tmp_path / "again", "--quiet")
    assert again.returncode == 0, again.stderr
    second = results(tmp_path / "again")
    assert {c["recipe"]["name"] for c in second["candidates"]} <= {"float32", first["chosen"]}
    changed = equipoise(
        "tune", "--recipe", file, "-o", tmp_path / "third", "--max-size", "1B", "--quiet"
    )
    assert changed.returncode == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--minimise", "speed"), "unknown cost 'speed'"),
        (("--max-latency", "fast"), "--max-latency 'fast': say 5ms"),
        (("--max-latency", "5"), "--max-latency '5': say 5ms"),
        (("--max-size", "8 apples"), "--max-size '8 apples': say 800kB"),
        (("--max-memory", "50"), "--max-memory '50': say 800kB"),
        (("--confidence", "2"), "--confidence is 2"),
        (("--budget", "0s"), "--budget"),
        (("--trials", "0"), "--trials is 0"),
        (("--repeat", "0"), "--repeat is 0"),
        (("--prune", "half"), "such as 2 or 2,4; or auto, or none"),
    ],
)
def test_options_that_make_no_sense(tune, tmp_path: Path, options: tuple, words: str) -> None:
    done = tune(*options)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_recipe_file_with_an_unknown_key(equipoise, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("format = 1\n[tune]\nmax-drip = 0.1\n")
    done = equipoise("tune", "--recipe", file, "-o", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert "did you mean 'max-drop'" in done.stderr


def started(workbench, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "equipoise", "tune", str(workbench.model), "--data",
        str(workbench.data), *FEW, "-o", str(out), "--cache-dir", str(out.parent / "cache"),
        *options,
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended_trials(out: Path) -> int:
    query = "SELECT COUNT(*) FROM trials WHERE seconds IS NOT NULL"
    for path in (out.parent / "cache/search").glob("*.sqlite"):
        with contextlib.suppress(sqlite3.Error), sqlite3.connect(path) as journal:
            return int(journal.execute(query).fetchone()[0])
    return 0


def wait_for_trials(out: Path, count: int, child: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while ended_trials(out) < count:
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_interrupt_gives_the_best_so_far(workbench, tmp_path: Path) -> None:
    """Ctrl-C to the whole process group, as a terminal sends it: a bundle, a report, 130."""
    out = tmp_path / "out"
    child = started(workbench, out)
    wait_for_trials(out, 2, child)
    os.killpg(child.pid, signal.SIGINT)
    _, told = child.communicate(timeout=120)
    assert child.returncode == 130, told
    found = results(out)
    assert found["chosen"]
    assert "SIGINT" in found["stopped"]
    assert (out / "bundle/manifest.json").exists()


@pytest.mark.slow
def test_a_killed_search_goes_on(workbench, tmp_path: Path) -> None:
    """SIGKILL in the middle: the same command takes up what was tried and ends as if alone."""
    out = tmp_path / "out"
    child = started(workbench, out, "--trials", "6")
    wait_for_trials(out, 3, child)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait(timeout=60)
    assert not (out / "results.json").exists()
    again = started(workbench, out, "--trials", "6")
    _, told = again.communicate(timeout=240)
    assert again.returncode == 0, told
    assert len(results(out)["candidates"]) == 6
    assert ended_trials(out) == 6


@pytest.mark.slow
def test_repeat_tells_how_stable_the_choice_is(tune, tmp_path: Path) -> None:
    done = tune("--trials", 4, "--repeat", 2)
    assert done.returncode == 0, done.stderr
    (repeat,) = results(tmp_path / "out")["repeats"]
    assert repeat["trials"] == 4
    assert repeat["chosen"]


@pytest.mark.slow
def test_workers_try_several_at_once(tune, tmp_path: Path) -> None:
    """The same outputs, and no trial twice."""
    done = tune("--trials", 6, "--workers", 2)
    assert done.returncode == 0, done.stderr
    names = [c["recipe"]["name"] for c in results(tmp_path / "out")["candidates"]]
    assert len(set(names)) == len(names) == 6


def test_a_least_metric_takes_the_place_of_the_usual_drop(equipoise, workbench, tmp_path) -> None:
    """No drop is limited then but by --max-drop."""
    done = equipoise(
        "tune", workbench.model, "--data", workbench.data, "--metric", "accuracy", "--threads", "1",
        "--rounds", "12", "--trials", "1", "--min-metric", "0.5", "-q", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    goal = results(tmp_path / "out")["goal"]
    assert (goal["max_drop"], goal["min_metric"]) == (None, 0.5)
