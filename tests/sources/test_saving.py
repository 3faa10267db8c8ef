"""Altered modules are written as sources that give the same numbers again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from equipoise.errors import NonFiniteError, OutputError, SourceError
from equipoise.sources.derived import read_derivation
from equipoise.sources.saving import save_source
from equipoise.sources.source import Source, parse_source
from equipoise.sources.torch_model import load_module

TIMM = os.environ.get("EQUIPOISE_TEST_TIMM", "")
MODULES = '''
import torch
from torch import nn

class Stack(nn.Module):
    """Blocks that may be left out, tied weights, a buffer of a size of its own."""
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.side = nn.Linear(4, 4)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("grid", torch.arange(4.0), persistent=False)
        self.width = 4
    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        if self.side is not None:
            x = x + self.side(x)
        return self.out(self.tail(x) + self.grid)

def local():
    """Its class is another one each time."""
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 5)
            self.b = nn.Linear(5, 2)
        def forward(self, x):
            return self.b(self.a(x))
    return Inner()
'''
IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def stall(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("stall")
    (folder / "saving_stall.py").write_text(MODULES)
    sys.path.insert(0, str(folder))
    import saving_stall

    torch.manual_seed(0)
    for name in ("Stack", "local"):
        state = getattr(saving_stall, name)().state_dict()
        state.pop("out.weight", None)  # tied
        save_file(state, folder / f"{name}.safetensors")
    yield folder
    sys.path.remove(str(folder))


def stacked(stall: Path, name: str = "Stack") -> Source:
    return parse_source(f"module:saving_stall:{name}", weights=stall / f"{name}.safetensors")


def reopened(module: torch.nn.Module, base: Source, directory: Path) -> torch.nn.Module:
    save_source(module, base=base, directory=directory)
    return load_module(parse_source(str(directory)))


def test_retrained_weights_come_back_with_ties(stall: Path, tmp_path: Path) -> None:
    """One tensor for two names, and still one after loading."""
    base = stacked(stall)
    module = load_module(base)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    again = reopened(module, base, tmp_path / "made")
    assert torch.equal(again(IDS), module(IDS))
    assert again.out.weight is again.embed.weight
    found = read_derivation(tmp_path / "made")
    assert (found.sizes, found.removed, found.identities) == ({}, (), ())
    assert sorted(f.name for f in (tmp_path / "made").iterdir()) == [
        "model.safetensors", "source.json"
    ]  # fmt: skip


def test_modules_that_are_left_out_stay_out(stall: Path, tmp_path: Path) -> None:
    """A block of a list, one that is None, one in a sequence that does nothing any more."""
    base = stacked(stall)
    module = load_module(base)
    del module.blocks[1]
    module.side = None
    module.tail[0] = torch.nn.Identity()
    again = reopened(module, base, tmp_path / "made")
    assert torch.equal(again(IDS), module(IDS))
    assert len(again.blocks) == 2
    assert again.side is None
    found = read_derivation(tmp_path / "made")
    assert (found.removed, found.identities) == (("blocks.2", "side"), ("tail.0",))


def test_bias_that_was_not_there_may_come(stall: Path, tmp_path: Path) -> None:
    """As when a norm is folded into the layer before it."""
    base = stacked(stall)
    module = load_module(base)
    module.blocks[0].bias = torch.nn.Parameter(torch.ones(4))
    again = reopened(module, base, tmp_path / "made")
    assert torch.equal(again(IDS), module(IDS))


def test_classes_made_anew_are_told_by_their_names(stall: Path, tmp_path: Path) -> None:
    """A factory may define them inside."""
    base = stacked(stall, "local")
    module = load_module(base)
    module.a = torch.nn.Linear(3, 4)
    module.b = torch.nn.Linear(4, 2)
    x = torch.rand(2, 3)
    assert torch.equal(reopened(module, base, tmp_path / "made")(x), module(x))


def test_source_that_is_derived_already_keeps_its_first_base(stall: Path, tmp_path: Path) -> None:
    """Whatever directory it was opened from may go."""
    base = stacked(stall, "local")
    module = load_module(base)
    module.a, module.b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    save_source(module, base=base, directory=tmp_path / "one")
    one = parse_source(str(tmp_path / "one"))
    again = load_module(one)
    again.a, again.b = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    save_source(again, base=one, directory=tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        file.unlink()
    two = load_module(parse_source(str(tmp_path / "two")))
    assert torch.equal(two(torch.ones(1, 3)), again(torch.ones(1, 3)))
    assert read_derivation(tmp_path / "two").base == "module:saving_stall:local"


def test_what_cannot_be_described_is_refused(stall: Path, tmp_path: Path) -> None:
    """Other classes, added modules, buffers and biases that the base has otherwise."""
    base = stacked(stall)

    def refused(words: str) -> None:
        with pytest.raises(SourceError, match=words):
            save_source(module, base=base, directory=tmp_path / "none")
        assert not (tmp_path / "none").exists()

    module = load_module(base)
    module.side = torch.nn.Bilinear(4, 4, 4)
    refused(r"side is Bilinear; module:saving_stall:Stack builds Linear there")
    module = load_module(base)
    module.more = torch.nn.Linear(4, 4)
    refused("modules that module:saving_stall:Stack does not build: more")
    module = load_module(base)
    module.grid = torch.arange(3.0)
    refused("does not build in this shape: grid")
    module = load_module(base)
    module.side.bias = None
    refused(r"has not got what module:saving_stall:Stack builds: side\.bias")
    module = load_module(base)
    module.side.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"'side\.weight'"):
        save_source(module, base=base, directory=tmp_path / "none")


def test_place_that_cannot_be_written(stall: Path, tmp_path: Path) -> None:
    """A file where a directory is needed."""
    (tmp_path / "file").write_text("")
    base = stacked(stall)
    with pytest.raises(OutputError, match="cannot write"):
        save_source(load_module(base), base=base, directory=tmp_path / "file" / "made")


def test_sources_of_fixed_sizes_say_what_to_give_instead(tmp_path: Path) -> None:
    """Programs and ONNX files."""
    for kind in ("program", "onnx"):
        source = Source(kind=kind, name=f"model.{kind}", path=tmp_path)  # type: ignore[arg-type]
        with pytest.raises(SourceError, match=f"of kind '{kind}' cannot be saved") as raised:
            save_source(torch.nn.Linear(2, 2), base=source, directory=tmp_path / "made")
        assert "module:package.mod:factory" in raised.value.hint


# transformers


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=3, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    blob = folder.parent / "blob"
    blob.write_text('{"model": {}}')
    (folder / "tokenizer.json").symlink_to(blob)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text("{}")
    (folder / "vocab.txt").write_text("[PAD]")
    (folder / "training.log").write_text("")
    return folder


def test_transformers_model_is_a_plain_directory(bert: Path, tmp_path: Path) -> None:
    """That transformers opens, with copies of the tokenizer's files and the settings as before."""
    source = parse_source(str(bert))
    module = load_module(source)
    with torch.no_grad():
        module.classifier.weight.add_(1)
    save_source(module, base=source, directory=tmp_path / "made")
    made = tmp_path / "made"
    assert sorted(f.name for f in made.iterdir()) == [
        "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip
    assert not (made / "tokenizer.json").is_symlink()
    before, after = (json.loads((d / "config.json").read_text()) for d in (bert, made))
    assert before == after
    plain = transformers.AutoModelForTokenClassification.from_pretrained(made).eval()
    assert plain.config.use_cache is True
    assert torch.equal(plain(IDS).logits, module(IDS).logits)
    again = parse_source(str(made))
    assert (again.kind, again.task, again.labels) == (source.kind, source.task, source.labels)
    assert torch.equal(load_module(again)(IDS).logits, module(IDS).logits)


def test_transformers_model_of_other_sizes_takes_them_from_its_config(
    bert: Path, tmp_path: Path
) -> None:
    """The config that the module has, not that of the directory it came from."""
    source = parse_source(str(bert))
    config = load_module(source).config
    config.intermediate_size = 8
    module = transformers.BertForTokenClassification(config).eval()
    again = reopened(module, source, tmp_path / "made")
    assert again.config.intermediate_size == 8
    assert torch.equal(again(IDS).logits, module(IDS).logits)


def test_model_behind_an_adapter_is_saved_whole(tmp_path: Path) -> None:
    """A decoder is a view of an encoder-decoder; an encoder alone is no model of transformers."""
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "generation_config.json").write_text('{"max_length": 7}')
    decoder = parse_source(str(tmp_path / "t5"), task="decoder")
    module = load_module(decoder)
    save_source(module, base=decoder, directory=tmp_path / "made")
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "made")
    assert all(torch.equal(v, module.model.state_dict()[k]) for k, v in plain.state_dict().items())
    assert json.loads((tmp_path / "made" / "generation_config.json").read_text()) == {
        "max_length": 7
    }
    encoder = parse_source(str(tmp_path / "t5"), task="encoder")
    with pytest.raises(SourceError, match=r"'encoder' shows a part of the model, a T5Stack"):
        save_source(load_module(encoder), base=encoder, directory=tmp_path / "none")


@pytest.mark.slow
@pytest.mark.skipif(not TIMM, reason="EQUIPOISE_TEST_TIMM names no directory with timm")
def test_narrow_model_of_timm_comes_back(tmp_path: Path) -> None:
    """Cut through its graph, saved, opened by name, with how it was trained."""
    code = f"""
import sys
sys.path.append({TIMM!r})
import numpy as np
import torch
from pathlib import Path
from safetensors.torch import save_file
from equipoise.compress.channels.narrow import NarrowConfig, narrow
from equipoise.compress.channels.structure import ChannelsConfig, read_structure, uniform
from equipoise.data.store import write_rows
from equipoise.sources.source import parse_source
from equipoise.sources.timm_model import build_timm
from equipoise.sources.torch_model import load_module
random = np.random.default_rng(0)
rows = [{{"x": random.random((1, 3, 64, 64), dtype=np.float32)}} for _ in range(4)]
write_rows(Path("data/training"), rows)
for name, least in (("mobilenetv3_small_050", 20), ("vit_tiny_patch16_224", 13)):
    size = 224 if "vit" in name else 64
    write_rows(Path("data/training"), [
        {{"x": random.random((1, 3, size, size), dtype=np.float32)}} for _ in range(2)])
    save_file(build_timm(name).state_dict(), "w.safetensors")
    source = parse_source("timm:" + name, weights=Path("w.safetensors"))
    config = ChannelsConfig(source=source, data=Path("data"), names=("x",))
    found = read_structure(config, output=Path("."))
    assert len(found.structure.groups) >= least, found.notes
    widths = uniform(found.structure, ratio=0.5)
    cut = NarrowConfig(source=source, data=Path("data"), names=("x",), widths=widths)
    made = narrow(cut, output=Path("out"))
    assert made.parameters_after < 0.6 * made.parameters_before
    module = load_module(parse_source("out/model"))
    assert module.pretrained_cfg["architecture"] == name
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
