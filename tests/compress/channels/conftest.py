"""Networks with random weights as sources, digits to run them on, and one that is trained."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from equipoise.data.store import write_rows
from equipoise.sources.source import Source, parse_source

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def networks() -> Iterator[object]:
    """The module of factories, importable by name."""
    sys.path.insert(0, str(HERE))
    yield importlib.import_module("channel_networks")
    sys.path.remove(str(HERE))


@pytest.fixture(autouse=True)
def _children_find_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They look in the current directory."""
    monkeypatch.chdir(HERE)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures float32 [1, 1, 8, 8] of ten digits, with labels, in two parts."""
    folder = tmp_path_factory.mktemp("digits")
    loaded = load_digits()
    pictures = (loaded.images / 16).astype(np.float32)[:, None, None]
    order = np.random.default_rng(0).permutation(len(pictures))
    for part, chosen in (("training", order[:1200]), ("validation", order[1200:1500])):
        write_rows(folder / part, ({"x": pictures[i]} for i in chosen))
        labels = ({"label": np.array(loaded.target[i])} for i in chosen)
        write_rows(folder / f"{part}_labels", labels)
    return folder


@pytest.fixture(scope="session")
def source_of(
    networks: object, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Source]:
    """A network by name, with random weights, as a source."""
    folder = tmp_path_factory.mktemp("weights")

    def make(name: str) -> Source:
        file = folder / f"{name}.safetensors"
        if not file.exists():
            torch.manual_seed(0)
            save(random_norms(getattr(networks, name)()), file)
        return parse_source(
            f"module:channel_networks:{name}", weights=file, task="image-classification"
        )

    return make


def random_norms(module: torch.nn.Module) -> torch.nn.Module:
    """Batch norms as after training: not all 0 and 1."""
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return module


def save(module: torch.nn.Module, file: Path) -> None:
    """The weights, those of two names once."""
    seen: dict[int, str] = {}
    for name, tensor in module.state_dict().items():
        seen.setdefault(tensor.data_ptr() or id(tensor), name)
    save_file({name: module.state_dict()[name].clone() for name in seen.values()}, file)


@pytest.fixture(scope="session")
def trained(networks: object, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A residual network that knows the digits."""
    from equipoise.data.store import Rows

    torch.manual_seed(0)
    module = networks.Residual()
    inputs = torch.cat([torch.from_numpy(row["x"]) for row in Rows(digits / "training")])
    labels = torch.tensor([int(row["label"]) for row in Rows(digits / "training_labels")])
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    for _ in range(4):
        for index in torch.randperm(len(inputs)).split(48):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(inputs[index]), labels[index]).backward()
            optimizer.step()
    file = tmp_path_factory.mktemp("trained") / "residual.safetensors"
    save(module.eval(), file)
    return parse_source(
        "module:channel_networks:Residual", weights=file, task="image-classification"
    )
