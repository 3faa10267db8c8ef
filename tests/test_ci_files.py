"""What we hand to CI systems: read as they read it, its shell steps run as they run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
GITLAB = ROOT / "examples/ci/gitlab-ci.yml"
_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def read(path: Path) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def action_step(name: str) -> dict[str, Any]:
    steps = read(ROOT / "action.yml")["runs"]["steps"]
    return next(step for step in steps if step.get("name") == name)


def run_step(
    name: str, folder: Path, inputs: dict[str, str], *, first_on_path: Path
) -> subprocess.CompletedProcess[str]:
    """Run a step of the action as the runner does: env from the inputs, text from a file."""
    step = action_step(name)
    known = {
        key: value.get("default", "") for key, value in read(ROOT / "action.yml")["inputs"].items()
    }
    values = {f"inputs.{key}": value for key, value in {**known, **inputs}.items()}
    values["runner.temp"] = str(folder)
    own = {k: _EXPRESSION.sub(lambda m: values[m[1]], v) for k, v in step["env"].items()}
    script = folder / "step.sh"
    script.write_text(step["run"])
    environment = {
        **os.environ,
        **own,
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        "GITHUB_OUTPUT": str(folder / "output"),
        "PATH": f"{first_on_path}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


PYTHON = Path(sys.executable).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, linear_onnx: Path) -> Path:
    """A directory with a model, another one, and data."""
    import onnx
    from onnx import numpy_helper

    folder = tmp_path_factory.mktemp("ci models")  # with a space
    model = onnx.load(linear_onnx)
    onnx.save(model, folder / "model.onnx")
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor) * np.float32(1.1)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, folder / "other.onnx")
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.savez(folder / "data.npz", x=x)
    return folder


# What they are.


def test_no_text_from_outside_is_part_of_a_script() -> None:
    """An input or the title of a pull request reaches a shell through its environment alone."""
    actions = [read(ROOT / "action.yml")["runs"]["steps"]]
    jobs = [job["steps"] for path in WORKFLOWS for job in read(path)["jobs"].values()]
    scripts = [step["run"] for steps in (*actions, *jobs) for step in steps if "run" in step]
    assert len(scripts) >= 3
    assert not [script for script in scripts if "${{" in script]


def test_the_action_is_composite_and_uses_only_inputs_that_it_declares() -> None:
    """Every step that runs has a shell; every input is used."""
    action = read(ROOT / "action.yml")
    assert action["runs"]["using"] == "composite"
    used = set(re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text()))
    assert used == set(action["inputs"])
    assert all("shell" in step for step in action["runs"]["steps"] if "run" in step)
    for value in action["inputs"].values():
        assert value["description"]
        assert ("default" in value) is not value.get("required", False)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_complete_and_may_only_read(path: Path) -> None:
    """What GitHub needs to start it, and inputs that the action has."""
    workflow = read(path)
    assert workflow[True]  # YAML reads `on` as a truth value
    assert workflow["permissions"] == {"contents": "read"}
    declared = set(read(ROOT / "action.yml")["inputs"])
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert job["timeout-minutes"]
        ours = [step for step in job["steps"] if step.get("uses") == "./"]
        assert all(set(step["with"]) <= declared for step in ours)
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_the_gitlab_job_keeps_its_reports_when_it_fails() -> None:
    """The widget of a merge request reads them above all then."""
    job = read(GITLAB)["parity"]
    assert job["artifacts"]["when"] == "always"
    assert job["artifacts"]["reports"]["junit"] == "junit.xml"
    check = job["script"][-1]
    assert "--junit junit.xml" in check
    assert all(name in check for name in job["artifacts"]["paths"])


def test_options_in_the_files_exist() -> None:
    """A renamed option is noticed here, not in somebody's pipeline."""
    from equipoise.cli import check

    names = {name.replace("_", "-") for name in check.command.__annotations__}
    texts = [action_step("Check")["run"], read(GITLAB)["parity"]["script"][-1]]
    used = {name for text in texts for name in re.findall(r"--([a-z][a-z-]+)", text)}
    assert used >= {"junit", "json", "summary", "locked", "against", "data"}
    assert used <= names


# What they do.


def test_the_install_step_hands_over_words_and_runs_none(tmp_path: Path) -> None:
    """Packages with shell text in their names are arguments of pip."""
    stub = tmp_path / "bin/python"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done\n')
    stub.chmod(0o755)
    hostile = "x[$(touch pwned)]; touch pwned"
    inputs = {"package": hostile, "extra-packages": "a==1  *  b;touch"}
    done = run_step("Install", tmp_path, inputs, first_on_path=stub.parent)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\n")[:-1]
    wanted = ["-m", "pip", "install", "--quiet", "--", hostile, "a==1", "*", "b;touch"]
    assert words == [f"[{word}]" for word in wanted]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.slow
def test_the_check_step_passes_and_leaves_its_reports(tmp_path: Path, models: Path) -> None:
    """Paths with spaces, several engines, limits."""
    engine = str(models / "model.onnx")
    inputs = {
        "engine": f"{engine}\n{engine}\n",
        "against": engine,
        "data": str(models / "data.npz"),
        "limits": "--min-sqnr 40 --threads 1",
    }
    done = run_step("Check", tmp_path, inputs, first_on_path=PYTHON)
    assert done.returncode == 0, done.stderr
    reports = tmp_path / "equipoise-reports"
    output = dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())
    assert output == {
        "junit": str(reports / "junit.xml"), "json": str(reports / "check.json")
    }  # fmt: skip
    suite = ET.parse(output["junit"]).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["tests"]) > 0
    assert suite.attrib["failures"] == "0"
    assert "✅" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_the_check_step_fails_with_reports_that_say_why(tmp_path: Path, models: Path) -> None:
    """The exit code of the command is that of the step: 6."""
    inputs = {
        "engine": str(models / "other.onnx"),
        "against": str(models / "model.onnx"),
        "data": str(models / "data.npz"),
        "limits": "--threads 1 --no-blame",
    }
    done = run_step("Check", tmp_path, inputs, first_on_path=PYTHON)
    assert done.returncode == 6, done.stderr
    root = ET.parse(tmp_path / "equipoise-reports/junit.xml").getroot()
    assert root.find(".//failure") is not None
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "gates failed" in summary.splitlines()[2]


def test_hostile_inputs_of_the_check_step_are_names_of_files(tmp_path: Path, models: Path) -> None:
    """Nothing of them runs, and none becomes an option."""
    inputs = {
        "engine": "--help\n$(touch pwned)`touch pwned`;touch pwned",
        "against": '"; touch pwned; "',
        "data": str(models / "data.npz"),
        "metric": "$(touch pwned)",
        "lock": "--help",
        "limits": "; touch pwned",
    }
    done = run_step("Check", tmp_path, inputs, first_on_path=PYTHON)
    assert done.returncode in {2, 3}
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.slow
def test_lock_check_gitlab_and_pytest_on_one_model(tmp_path: Path, models: Path) -> None:
    """The walk of docs/ci.md: a lock, the action with it, the job of GitLab, the tests."""
    engine, data = str(models / "model.onnx"), str(models / "data.npz")
    lock = tmp_path / "equipoise.lock.json"
    made = subprocess.run(
        [sys.executable, "-m", "equipoise", "lock", engine, "--against", engine, "--data", data,
         "--threads", "1", "-q", "-o", lock],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    inputs = {"engine": engine, "against": engine, "data": data, "lock": str(lock)}
    inputs["limits"] = "--threads 1"
    done = run_step("Check", tmp_path, inputs, first_on_path=PYTHON)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "equipoise-reports/junit.xml").read_text(encoding="utf-8")
    assert 'classname="lock"' in text

    variables = {"ENGINE": engine, "AGAINST": engine, "DATA": data}
    job = read(GITLAB)["parity"]
    assert set(variables) <= set(job["variables"])
    path = f"{PYTHON}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", job["script"][-1]],
        cwd=tmp_path, env={**os.environ, **variables, "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # Locked with one thread; the job runs with all cores, so only latency is not compared.
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "junit.xml").is_file()

    variables = {"EQUIPOISE_ENGINE": engine, "EQUIPOISE_SOURCE": engine, "EQUIPOISE_DATA": data}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         str(ROOT / "examples/ci/test_parity.py")],
        cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
