"""Prune, distil and fine-tune a small network of handwritten digits, from the shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from equipoise.cli.grouped import grouped
from equipoise.sources.source import parse_source
from equipoise.sources.torch_model import load_module

NETWORKS = """
from torch import nn

def network(width, classes=10):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(width),
        nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    )

def large():
    return network(96)

def small():
    return network(16)

def other():
    return network(16, classes=7)
"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder with the networks and their weights; commands run in it."""

    folder: Path

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "equipoise", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def source(self, name: str, *, option: str = "--weights") -> tuple[str, str, Path]:
        return f"module:networks:{name}", option, self.folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The large network is trained, the small ones are not."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("compress")
    (folder / "networks.py").write_text(NETWORKS)
    made: dict[str, object] = {}
    exec(NETWORKS, made)
    torch.manual_seed(0)
    for name in ("large", "small", "other"):
        module = made[name]()  # type: ignore[operator]
        if name == "large":
            train(module)
        save_file(module.state_dict(), folder / f"{name}.safetensors")
    return Place(folder=folder)


def train(module) -> None:
    """Twelve passes over the half of the digits that training may use."""
    import torch

    from equipoise.data.readers import digits

    images, labels = (torch.from_numpy(array) for array in digits.load())
    inside, _ = digits.split(labels.numpy())
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(12):
        for batch in torch.from_numpy(inside)[torch.randperm(len(inside))].split(64):
            loss = torch.nn.functional.cross_entropy(module(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# The options that come as groups.


@dataclass(frozen=True, kw_only=True)
class Group:
    """Two options."""

    rate: Annotated[float, typer.Option(help="Rate.")] = 0.5
    name: Annotated[str, typer.Option(help="Name.")] = ""


def test_a_dataclass_becomes_options() -> None:
    seen: list[object] = []

    @grouped
    def command(first: Annotated[str, typer.Argument()], group: Group, last: int = 3) -> None:
        seen.append((first, group, last))

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["x", "--rate", "2", "--last", "4"])
    assert done.exit_code == 0, done.output
    assert seen == [("x", Group(rate=2.0), 4)]


# Finetune and distil.


def test_a_network_learns_from_labels_and_its_files_open(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = place.run(
        "finetune", *place.source("small"), "--data", "digits", "--epochs", "8", "--learning-rate",
        "0.01", "--threads", "1", "-o", place.folder / "tuned", "-q",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (place.folder / "tuned").iterdir()) == ["model", "results.json"]
    result = json.loads((place.folder / "tuned" / "results.json").read_text())
    assert result["after"]["value"] > 0.9 > result["before"]["value"]
    assert "samples that nobody trained on" in done.stdout
    monkeypatch.syspath_prepend(str(place.folder))
    monkeypatch.chdir(place.folder)
    module = load_module(parse_source(str(place.folder / "tuned" / "model")))
    assert sum(p.numel() for p in module.parameters()) == 5018


def test_a_student_learns_without_labels(place: Place) -> None:
    done = place.run(
        "distill", *place.source("large", option="--teacher-weights"), "module:networks:small",
        "--weights", place.folder / "small.safetensors", "--data", "digits", "--unlabelled",
        "--task", "image-classification", "--epochs", "8", "--learning-rate", "0.01",
        "--features-weight", "0.2", "--threads", "1", "-o", place.folder / "distilled", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metric"] == "cosine"
    assert result["after"]["value"] > result["before"]["value"] + 0.5
    assert set(result["training"]["parts"]) == {"logits", "features"}


@pytest.mark.slow
def test_two_processes_and_a_search_of_settings(place: Place) -> None:
    done = place.run(
        "finetune", *place.source("small"), "--data", "digits", "--epochs", "2", "--learning-rate",
        "0.003", "--trials", "3", "--processes", "2", "-o", place.folder / "searched", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["training"]["processes"] == 2
    assert (place.folder / "searched" / "study.db").is_file()


@pytest.mark.slow
def test_training_with_the_int8_engine_simulated(place: Place) -> None:
    done = place.run(
        "finetune", *place.source("large"), "--data", "digits", "--epochs", "1", "--learning-rate",
        "0.0003", "--quantize-aware", "--threads", "1", "-o", place.folder / "aware", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["training"]["simulated"]


# Prune.


@pytest.fixture(scope="module")
def pruned(place: Place) -> subprocess.CompletedProcess[str]:
    return place.run(
        "prune", *place.source("large"), "--data", "digits", "--speedup", "1.8", "--steps", "2",
        "--step-epochs", "2", "--epochs", "4", "--learning-rate", "0.002", "--max-drop", "0.05",
        "--stock", "module:networks:small", "--stock-weights", place.folder / "small.safetensors",
        "--threads", "1", "--rounds", "12", "-o", place.folder / "pruned", "--json",
    )  # fmt: skip


@pytest.mark.slow
def test_pruning_reaches_a_measured_goal(pruned) -> None:
    assert pruned.returncode == 0, pruned.stderr
    result = json.loads(pruned.stdout)
    assert result["reached"]
    sides = {side["name"]: side for side in result["sides"]}
    assert set(sides) == {"original", "pruned", "stock", "stock, trained"}
    assert sides["pruned"]["parameters"] < 0.7 * sides["original"]["parameters"]
    assert sides[result["chosen"]]["speedup"]["value"] >= 1.8
    assert any(step["taken"] for step in result["steps"])
    assert all(step["estimated"] > 1 for step in result["steps"])


@pytest.mark.slow
def test_what_was_pruned_is_exported(place: Place, pruned, tmp_path: Path) -> None:
    assert pruned.returncode == 0, pruned.stderr
    done = place.run(
        "export", place.folder / "pruned" / "model", "--data", "digits", "-o",
        tmp_path / "model.onnx",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_pruned_models_are_candidates_of_tune(place: Place) -> None:
    done = place.run(
        "tune", *place.source("large"), "--data", "digits", "--metric", "accuracy", "--max-drop",
        "0.05", "--threads", "1", "--rounds", "12", "--prune", "1.5", "--prune-epochs", "2",
        "--prune-rate", "0.002", "--trials", "12", "-o", place.folder / "swept", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    candidates = {c["recipe"]["name"]: c for c in json.loads(done.stdout)["candidates"]}
    pruned = candidates["pruned-1.5x"]
    assert pruned["verdict"] in {"accepted", "outraced"}
    assert (pruned["measurement"] or pruned["sketch"])["speedup"]["value"] > 1.2
    assert candidates["pruned-1.5x-int8-static"]["verdict"] in {"accepted", "outraced"}
    done = place.run("check", place.folder / "swept" / "bundle")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_with_a_budget_pruned_models_are_proposed_by_themselves(place: Place) -> None:
    """The digits have a training part; how long to train follows from the budget, and is told."""
    options = (
        "tune", *place.source("large"), "--data", "digits", "--metric", "accuracy", "--max-drop",
        "0.05", "--threads", "1", "--rounds", "12", "--budget", "60s", "--prune-rate", "0.002",
    )  # fmt: skip
    done = place.run(*options, "-o", place.folder / "by-itself", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "pruned-1.6x" in {c["recipe"]["name"] for c in found["candidates"]}
    assert any("trained for 3 epochs, as the budget allows" in step for step in found["steps"])
    done = place.run(
        *options, "--trials", "2", "--prune", "none", "-o", place.folder / "not", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert not any("runed" in step for step in json.loads(done.stdout)["steps"])


@pytest.mark.slow
def test_zeros_that_gain_nothing_are_refused_with_the_figure(place: Place, tmp_path: Path) -> None:
    done = place.run(
        "prune", *place.source("large"), "--data", "digits", "--sparsity", "2:4", "--threads", "1",
        "-o", tmp_path,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "2:4 zeros gain nothing on target cpu: measured" in done.stderr
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_speedup_out_of_reach_says_how_far_it_got(place: Place, tmp_path: Path) -> None:
    done = place.run(
        "prune", *place.source("large"), "--data", "digits", "--speedup", "500", "--steps", "1",
        "--step-epochs", "1", "--epochs", "1", "--threads", "1", "--rounds", "12", "-o", tmp_path,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert "a speed-up of 500" in done.stderr
    assert (tmp_path / "results.json").is_file()


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--layers", "3", "module:networks:small"], 2, "give a student or --layers"),
        (["module:networks:small", "--processes", "0"], 2, "--processes is 0"),
        (["module:networks:small", "--optimizer", "adam"], 2, "'adam' is not one of"),
        (["module:networks:small", "--precision", "int8"], 2, "'int8' is not one of"),
        (["module:networks:small", "--training-samples", "2"], 2, "--training-samples is 2"),
    ],
)
def test_options_that_cannot_be(place: Place, arguments, code: int, words: str) -> None:
    done = place.run(
        "distill", *place.source("large", option="--teacher-weights"), *arguments, "--weights",
        place.folder / "small.safetensors", "--data", "digits", "-o", place.folder / "bad",
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert not (place.folder / "bad" / "model").exists()


def test_teacher_and_student_that_do_not_fit(place: Place, tmp_path: Path) -> None:
    done = place.run(
        "distill", *place.source("large", option="--teacher-weights"),
        *place.source("other"), "--data", "digits", "--unlabelled", "--task",
        "image-classification", "-o", tmp_path,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "10" in done.stderr
    assert "7" in done.stderr
    assert not (tmp_path / "model").exists()


def test_a_loss_that_is_no_number_any_more_names_its_step(place: Place, tmp_path: Path) -> None:
    done = place.run(
        "finetune", *place.source("small"), "--data", "digits", "--learning-rate", "1e30",
        "--optimizer", "sgd", "--clip", "0", "--warmup", "0", "--threads", "1", "-o", tmp_path,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "step" in done.stderr
    assert not (tmp_path / "model").exists()


def test_pruning_is_not_for_a_launcher(place: Place, tmp_path: Path) -> None:
    done = place.run(
        "prune", *place.source("large"), "--data", "digits", "-o", tmp_path, RANK="0",
        WORLD_SIZE="2",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "give --processes" in done.stderr


def test_missing_labels(place: Place, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", image=np.zeros((40, 1, 8, 8), np.float32))
    done = place.run(
        "finetune", *place.source("small"), "--data", tmp_path / "x.npz", "-o", tmp_path / "out"
    )
    assert done.returncode == 3, done.stderr
    assert "label" in done.stderr


def test_checkpoints_that_cannot_be_written(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = place.run(
        "finetune", *place.source("small"), "--data", "digits", "--threads", "1", "--checkpoints",
        tmp_path / "file" / "inside", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert "file" in done.stderr
