"""Weights that are set to zero: two of four along the inputs, or a share of each layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from equipoise.compress.samples import read_samples
from equipoise.compress.sparsity import (
    SparsifyConfig,
    SparsifyRecord,
    sparsify,
    sparsity_masks,
    zero_,
)
from equipoise.data.store import write_rows
from equipoise.errors import DataError, SourceError, UsageError
from equipoise.sources.source import Source, parse_source
from equipoise.sources.torch_model import load_module

MODULES = '''
import torch
from torch import nn

class Mixed(nn.Module):
    """Layers that divide by four, and some that do not."""
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.two = nn.Conv2d(16, 8, 1, groups=2)
        self.fc = nn.Linear(8, 5)
    def forward(self, x):
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        return self.fc(self.two(self.depth(x)).mean((2, 3)))

class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.never = nn.Linear(4, 4)
    def forward(self, x):
        return self.fc(x.mean((2, 3)))
'''


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mill")
    (folder / "sparse_mill.py").write_text(MODULES)
    sys.path.insert(0, str(folder))
    import sparse_mill

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    scale = np.array([0.1, 1, 4], np.float32).reshape(1, 3, 1, 1)
    pictures = [random.normal(size=(1, 3, 6, 6)).astype(np.float32) * scale for _ in range(40)]
    for name in ("Mixed", "Three"):
        module = getattr(sparse_mill, name)()
        save_file(module.state_dict(), folder / f"{name}.safetensors")
    mixed = load_module(of(folder, "Mixed"))
    with torch.no_grad():
        classes = [mixed(torch.from_numpy(x)).argmax(1).numpy()[0] for x in pictures]
    for part, chosen in (("training", range(24)), ("validation", range(24, 40))):
        write_rows(folder / "data" / part, ({"x": pictures[i]} for i in chosen))
        labels = ({"label": np.array(classes[i])} for i in chosen)
        write_rows(folder / "data" / f"{part}_labels", labels)
    yield folder
    sys.path.remove(str(folder))


def of(folder: Path, name: str) -> Source:
    weights = folder / f"{name}.safetensors"
    return parse_source(f"module:sparse_mill:{name}", weights=weights, task="image-classification")


def made(folder: Path, output: Path, name: str = "Mixed", **changes: object) -> SparsifyRecord:
    config = SparsifyConfig(source=of(folder, name), data=folder / "data", names=("x",), **changes)  # type: ignore[arg-type]
    return sparsify(config, output=output)


@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_two_of_every_four_inputs_are_zero(mill: Path, tmp_path: Path, importance: str) -> None:
    """At each position of a kernel, after saving and loading; other layers are as they were."""
    record = made(mill, tmp_path, importance=importance)
    assert record.layers == ("wide", "two", "fc")
    assert record.notes == (
        "stem: 3 inputs (of a group) do not divide by 4",
        "depth: 1 inputs (of a group) do not divide by 4",
    )
    module = load_module(parse_source(str(tmp_path / "model")))
    before = load_module(of(mill, "Mixed")).state_dict()
    for name in record.layers:
        weight = module.get_submodule(name).weight
        fours = weight.movedim(1, -1).reshape(-1, 4)
        assert ((fours == 0).sum(1) == 2).all()
        kept = weight != 0
        assert torch.equal(weight[kept], before[f"{name}.weight"][kept])
    assert torch.equal(module.stem.weight, before["stem.weight"])
    assert (record.zeros, record.weights) == (record.weights // 2, 8 * 16 * 9 + 64 + 40)
    assert record.parameters == sum(p.numel() for p in module.parameters())
    assert record.loss_samples == "validation"
    assert record.loss_after != record.loss_before


def test_largest_two_stay() -> None:
    """Of equal ones the first; by magnitude, whatever the sign."""
    from equipoise.compress.sparsity import _mask

    config = SparsifyConfig(
        source=Source(kind="factory", name="x"), data=Path(), names=(), importance="magnitude"
    )
    layer = torch.nn.Linear(8, 1, bias=False)
    scores = torch.tensor([[3.0, -9, 1, 4, 2, 2, 2, 2]]).abs().double()
    assert _mask(layer, scores, config=config).int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.95), st.sampled_from(["magnitude", "activation"]))
def test_share_of_every_layer_is_zero(mill: Path, share: float, importance: str) -> None:
    """Its least weights, anywhere in it."""
    module = load_module(of(mill, "Mixed"))
    config = SparsifyConfig(
        source=of(mill, "Mixed"), data=mill / "data", names=("x",), pattern="unstructured",
        share=share, importance=importance,
    )  # type: ignore[arg-type] # fmt: skip
    samples = read_samples(
        mill / "data", part="training", names=("x",), task="image-classification", count=4
    )
    masks, notes = sparsity_masks(module, config=config, samples=samples)
    assert (sorted(masks), notes) == (["depth", "fc", "stem", "two", "wide"], ())
    before = {name: module.get_submodule(name).weight.detach().clone() for name in masks}
    zero_(module, masks)
    for name, mask in masks.items():
        weight = module.get_submodule(name).weight
        zeros = int((weight == 0).sum())
        assert abs(zeros - share * weight.numel()) <= 1
        if importance == "magnitude":
            assert before[name][~mask].abs().max() <= before[name][mask].abs().min()


def test_what_inputs_are_like_counts(mill: Path) -> None:
    """A channel that is forty times as loud keeps its weights before those of a silent one."""
    module = load_module(of(mill, "Mixed"))
    config = SparsifyConfig(
        source=of(mill, "Mixed"), data=mill / "data", names=("x",), pattern="unstructured",
        share=0.3,
    )  # fmt: skip
    samples = read_samples(
        mill / "data", part="training", names=("x",), task="image-classification", count=24
    )
    masks, _ = sparsity_masks(module, config=config, samples=samples)
    silent, loud = masks["stem"][:, 0], masks["stem"][:, 2]
    assert float(loud.float().mean()) > 0.9
    assert float(silent.float().mean()) < 0.3


def test_transposed_weights_of_transformers_and_tied_embeddings(tmp_path: Path) -> None:
    """The inputs are the first axis of its Conv1D; an embedding is no product."""
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    rows = [{"input_ids": np.arange(i, i + 6)[None] % 16} for i in range(6)]
    write_rows(tmp_path / "data" / "training", rows)
    source = parse_source(str(tmp_path / "gpt2"))
    chosen = SparsifyConfig(source=source, data=tmp_path / "data", names=("input_ids",))
    record = sparsify(chosen, output=tmp_path)
    module = load_module(parse_source(str(tmp_path / "model")))
    assert "lm_head" not in record.layers
    weight = module.transformer.h[0].mlp.c_fc.weight
    assert tuple(weight.shape) == (8, 32)
    assert ((weight.T.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert int((module.lm_head.weight == 0).sum()) == 0
    assert record.loss_after is not None


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_share_out_of_range(mill: Path, tmp_path: Path, share: float) -> None:
    """Names the number."""
    with pytest.raises(UsageError, match=f"share {share} has to lie between 0 and 1"):
        made(mill, tmp_path, pattern="unstructured", share=share)


def test_model_without_a_layer_of_that_form(mill: Path, tmp_path: Path) -> None:
    """Each with its reason; layers that never run cannot be judged by their inputs."""
    with pytest.raises(DataError, match="layer 'never' is never run"):
        made(mill, tmp_path, name="Three")
    record = made(mill, tmp_path, name="Three", importance="magnitude")
    assert record.layers == ("never",)


def test_source_whose_layers_never_divide(mill: Path, tmp_path: Path) -> None:
    """Nothing is written."""
    import sparse_mill

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(3, 5)

    sparse_mill.Odd = Odd
    save_file(Odd().state_dict(), mill / "Odd.safetensors")
    with pytest.raises(SourceError, match=r"(?s)no layer can be 2:4 sparse:.*fc: 3 inputs"):
        made(mill, tmp_path / "none", name="Odd", importance="magnitude")
    assert not (tmp_path / "none").exists()
