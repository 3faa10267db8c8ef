"""Real exports, unoptimised, as the PyTorch exporter first writes them; made once per session."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An ONNX file, and inputs for it of any batch size and sequence length."""

    path: Path
    feeds: Callable[[int, int], Feeds]

    def check_equal(self, after: Path, *, shapes: tuple[tuple[int, int], ...]) -> None:
        """Both files compute the same on inputs of ``shapes``, up to the order of sums."""
        for shape in shapes:
            feeds = self.feeds(*shape)
            for wanted, found in zip(run(self.path, feeds), run(after, feeds), strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def run(path: Path, feeds: Feeds) -> list[np.ndarray]:
    """Outputs of ONNX Runtime without its own graph rewriting."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def _export(module: Any, inputs: dict[str, Any], dims: dict[int, str], path: Path) -> None:
    torch = pytest.importorskip("torch")
    names = {axis: torch.export.Dim(name) for axis, name in dims.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            optimize=False,
            dynamic_shapes=tuple(names for _ in inputs),
            input_names=list(inputs),
            opset_version=20,
            verbose=False,
        )
    program.save(path)


@pytest.fixture(scope="session")
def block(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Embeddings, one transformer layer with a padding mask, a head and a mean."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(50, 16), nn.Embedding(32, 16)
            self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
            self.head = nn.Linear(16, 5)

        def forward(self, ids: Any, mask: Any) -> tuple[Any, Any]:
            x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
            x = self.layer(x, src_key_padding_mask=mask == 0)
            return self.head(x), x.mean(1)

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("block") / "model.onnx"
    ids, mask = torch.randint(0, 50, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    _export(Block(), {"ids": ids, "mask": mask}, {0: "batch", 1: "sequence"}, path)

    def feeds(batch: int, sequence: int) -> Feeds:
        generator = np.random.default_rng(batch * sequence)
        mask = np.ones((batch, sequence), dtype=np.int64)
        mask[-1, sequence // 2 :] = 0
        return {"ids": generator.integers(0, 50, (batch, sequence)), "mask": mask}

    return Exported(path=path, feeds=feeds)


@pytest.fixture(scope="session")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Convolution, batch norm, depthwise convolution, pooling and a head."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("cnn") / "model.onnx"
    _export(module, {"image": torch.randn(2, 3, 32, 32)}, {0: "batch"}, path)

    def feeds(batch: int, _: int) -> Feeds:
        pictures = np.random.default_rng(batch).normal(size=(batch, 3, 32, 32))
        return {"image": pictures.astype(np.float32)}

    return Exported(path=path, feeds=feeds)
