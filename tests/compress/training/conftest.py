"""Small models with random weights, labelled samples for them, and trainings of both."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from equipoise.compress.settings import Objective, TrainSettings
from equipoise.compress.train import TrainConfig, TrainRecord, train
from equipoise.data.store import write_rows
from equipoise.sources.source import Source, parse_source

MODELS = """
import torch


class Tagger(torch.nn.Module):
    '''Tags tokens by themselves and by the mean of the sentence: logits [batch, n, 3].'''

    def __init__(self, width=16):
        super().__init__()
        self.embedding = torch.nn.Embedding(40, width)
        self.norm = torch.nn.LayerNorm(width)
        self.dropout = torch.nn.Dropout(0.2)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range(2)])
        self.head = torch.nn.Linear(2 * width, 3)
        self.unused = torch.nn.Linear(width, width)

    def forward(self, input_ids, attention_mask):
        states = self.dropout(self.norm(self.embedding(input_ids)))
        for block in self.blocks:
            states = states + torch.relu(block(states))
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return {"logits": self.head(torch.cat([states, mean.expand_as(states)], -1))}


class Pictures(torch.nn.Module):
    '''A CNN with batch normalisation: logits [batch, 4].'''

    def __init__(self, width=12):
        super().__init__()
        self.convolution = torch.nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(width)
        self.dropout = torch.nn.Dropout(0.3)
        self.head = torch.nn.Linear(width, 4)

    def forward(self, pixel_values):
        maps = torch.relu(self.norm(self.convolution(pixel_values)))
        return self.head(self.dropout(maps.mean((2, 3))))


def tagger():
    return Tagger()


def pictures():
    return Pictures()
"""
WORDS = ("input_ids", "attention_mask")


def sentences(count: int, *, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sentences of 3 to 14 tokens; a tag follows from the token, and a fifth has none."""
    random = np.random.default_rng(seed)
    inputs, labels = [], []
    for _ in range(count):
        tokens = random.integers(1, 40, (1, random.integers(3, 15)))
        tags = np.where(random.random(tokens.shape[1]) < 0.2, -100, tokens[0] % 3)
        inputs.append({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
        labels.append({"label": tags})
    return inputs, labels


def pictures(count: int, *, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pictures of lines across, lines down, squares, or nothing; in noise."""
    random = np.random.default_rng(seed)
    rows, columns = np.indices((6, 6))
    patterns = np.stack([rows % 2, columns % 2, (rows + columns) % 2, np.full((6, 6), 0.5)])
    classes = random.integers(0, 4, count)
    images = patterns[classes] + random.normal(0, 0.2, (count, 6, 6))
    inputs = [{"pixel_values": image[None, None].astype(np.float32)} for image in images]
    return inputs, [{"label": np.array(c)} for c in classes]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For several processes, which a machine with one GPU has no GPUs for."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Trains in a directory of its own.

    Attributes:
        folder: It; the models and the data lie there.
        models: The module ``training_models`` that builds them.
    """

    folder: Path
    models: ModuleType

    def source(self, name: str = "tagger", *, seed: int = 0) -> Source:
        """A model with weights of a seed."""
        import safetensors.torch
        import torch

        torch.manual_seed(seed)
        file = self.folder / f"{name}-{seed}.safetensors"
        safetensors.torch.save_file(getattr(self.models, name)().state_dict(), file)
        task = "token-classification" if name == "tagger" else "image-classification"
        return parse_source(f"module:training_models:{name}", weights=file, task=task)

    def config(self, name: str = "tagger", *, settings: Any = None, **changes: Any) -> TrainConfig:
        """A small training; ``settings`` and ``changes`` replace fields."""
        base = TrainSettings(epochs=2, batch_size=16, learning_rate=3e-2, weight_decay=0.1)
        config = TrainConfig(
            student=self.source(name),
            teacher=None,
            data=self.folder / name,
            names=WORDS if name == "tagger" else ("pixel_values",),
            metric="accuracy",
            label_names=(),
            settings=dataclasses.replace(base, **(settings or {})),
            checkpoints=self.folder / "checkpoints",
            threads=1,
        )
        return dataclasses.replace(config, **changes)

    def taught(self, name: str = "tagger", *, settings: Any = None, **changes: Any) -> TrainConfig:
        """The same beside a teacher, with two parts of the loss that count differently."""
        objective = Objective(task=1.0, logits=0.5)
        settings = {"objective": objective, **(settings or {})}
        return self.config(name, settings=settings, teacher=self.source(name, seed=1), **changes)

    def train(self, config: TrainConfig, *, place: str = "out") -> TrainRecord:
        """Train into ``place``, with checkpoints of its own."""
        config = dataclasses.replace(config, checkpoints=self.folder / f"checkpoints-{place}")
        output = self.folder / place
        output.mkdir(exist_ok=True)
        return train(config, output=output)

    def weights(self, place: str = "out") -> dict[str, Any]:
        """The tensors of what was trained into ``place``."""
        import safetensors.numpy

        return dict(safetensors.numpy.load_file(self.folder / place / "model/model.safetensors"))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """See Bench; models lie in the current directory, where children find them too."""
    pytest.importorskip("accelerate")
    (tmp_path / "training_models.py").write_text(MODELS)
    for name, made in (("tagger", sentences), ("pictures", pictures)):
        for part, count in (("training", 70), ("validation", 30)):
            inputs, labels = made(count, seed=count)
            write_rows(tmp_path / name / part, inputs)
            write_rows(tmp_path / name / f"{part}_labels", labels)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield Bench(folder=tmp_path, models=importlib.import_module("training_models"))
    del sys.modules["training_models"]
