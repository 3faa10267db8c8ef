"""Directories that say what was changed of a module: read strictly, applied strictly."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from equipoise import record
from equipoise.errors import NonFiniteError, SourceError
from equipoise.sources.derived import Derivation, read_derivation, stored_shapes
from equipoise.sources.saving import save_source
from equipoise.sources.source import Source, parse_source
from equipoise.sources.torch_model import build_module, load_module

MODULES = '''
import torch
from torch import nn

class Net(nn.Module):
    """Sizes of many kinds."""
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.n = nn.BatchNorm2d(8)
        self.d = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.u = nn.ConvTranspose2d(8, 6, 2, 2)
        self.g = nn.GroupNorm(2, 6)
        self.l = nn.LayerNorm(6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.extra = nn.Dropout(0.1)
        self.f = nn.Linear(6, 4)
        self.heads = 2
        self.ratio = 0.5
        self.flag = True
        self.shape = (3, None)
        self.code = "eval"
    def forward(self, x):
        x = self.g(self.u(self.d(torch.relu(self.n(self.a(x))))))
        x = self.l(x.mean((2, 3)))
        for block in self.blocks:
            x = x + block(x)
        x = x if self.extra is None else self.extra(x)
        return self.f(x)

def looks():
    """Reads a number while it is built, which there is none of on the meta device."""
    net = Net()
    net.heads = int(torch.ones(1).sum())
    return net
'''


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("shop")
    (folder / "derived_shop.py").write_text(MODULES)
    sys.path.insert(0, str(folder))
    import derived_shop

    torch.manual_seed(0)
    save_file(derived_shop.Net().state_dict(), folder / "w.safetensors")
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def base(shop: Path) -> Source:
    weights = shop / "w.safetensors"
    return parse_source("module:derived_shop:Net", weights=weights, task="image-classification")


@pytest.fixture
def directory(base: Source, tmp_path: Path) -> Path:
    """The network with its first two layers cut to six channels."""
    module = load_module(base)
    module.a = torch.nn.Conv2d(3, 6, 3, padding=1)
    module.n = torch.nn.BatchNorm2d(6)
    module.d = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    module.u = torch.nn.ConvTranspose2d(6, 6, 2, 2)
    save_source(module.eval(), base=base, directory=tmp_path / "made")
    return tmp_path / "made"


def edit(directory: Path, **changes: object) -> None:
    file = directory / "source.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def sizes(directory: Path, module: str, **changes: object) -> None:
    held = json.loads((directory / "source.json").read_text())["sizes"]
    edit(directory, sizes=held | {module: held.get(module, {}) | changes})


def tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Put tensors into the file, or take them out; ``__`` stands for a dot."""
    held = load_file(directory / "model.safetensors")
    for key, value in changes.items():
        held.pop(key.replace("__", "."), None)
        if value is not None:
            held[key.replace("__", ".")] = value
    save_file(held, directory / "model.safetensors")


def test_directory_is_found_out_and_keeps_what_the_base_said(directory: Path, base: Source) -> None:
    """Its task, its factory and the code beside that, before what a transformers directory has."""
    (directory / "config.json").write_text("{}")
    source = parse_source(str(directory))
    assert (source.kind, source.path) == ("derived", directory.resolve())
    assert (source.factory, source.task) == ("derived_shop:Net", "image-classification")
    assert source.code_sha256 == base.code_sha256 != ""
    assert parse_source(str(directory), task="encoder").task == "encoder"
    assert record.from_json(Source, record.to_json(source)) == source
    with pytest.raises(SourceError, match="--weights goes with"):
        parse_source(str(directory), weights=directory / "model.safetensors")


def test_sizes_alone_are_described(directory: Path) -> None:
    """What is as the base has it is not said again."""
    assert read_derivation(directory).sizes == {
        "a": {"out_channels": 6},
        "n": {"num_features": 6},
        "d": {"in_channels": 6, "out_channels": 6, "groups": 6},
        "u": {"in_channels": 6},
    }


def test_module_without_weights_has_the_shapes(directory: Path) -> None:
    """On the meta device, for whoever asks about the signature."""
    module = build_module(parse_source(str(directory)))
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == stored_shapes(
        directory / "model.safetensors"
    )
    assert all(parameter.is_meta for parameter in module.parameters())


def test_base_that_looks_at_numbers_is_built_all_the_same(shop: Path, tmp_path: Path) -> None:
    """Off the meta device, and drawing no random number of the caller's."""
    source = parse_source("module:derived_shop:looks", weights=shop / "w.safetensors")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert build_module(source).heads == 1
    save_source(load_module_without_draws(source), base=source, directory=tmp_path / "made")
    assert torch.equal(torch.rand(3), expected)
    assert load_module(parse_source(str(tmp_path / "made"))).heads == 1


def load_module_without_draws(source: Source) -> torch.nn.Module:
    with torch.random.fork_rng():
        return load_module(source)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, r"has the format 2; 1 is known"),
        ({"format": True}, "has the format True"),
        ({"format": None}, "has the format None"),
        ({"formt": 1}, "unknown key 'formt'"),
        ({"base": "derived_shop:Net"}, r"the base 'derived_shop:Net' is none of module:\.\.\."),
        ({"base": "/tmp/model.pt2"}, "is none of"),
        ({"base": "module:derived_shop"}, "names no function"),
        (
            {"base": "module:gone.away:make"},
            r"its base 'module:gone\.away:make': .*cannot be found",
        ),
        ({"base": 3}, "expected str"),
        ({"sizes": {"a": {"out_channels": "6"}}}, "fits no form"),
        ({"sizes": {"a": {"out_channels": 6.0}}}, "fits no form"),
        ({"sizes": {"a": 6}}, "expected dict"),
        ({"removed": "a"}, "expected a list"),
    ],
)
def test_description_that_cannot_be_read(
    changes: dict[str, object], words: str, directory: Path
) -> None:
    """Before PyTorch is asked for anything; the file is named."""
    edit(directory, **changes)
    with pytest.raises(SourceError, match=words) as raised:
        parse_source(str(directory))
    assert str(directory) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1, "format": 1}', "\ufeff{}"])
def test_description_that_is_no_object(text: str, directory: Path) -> None:
    """Cut off, of another type, with a key twice."""
    (directory / "source.json").write_text(text)
    with pytest.raises(SourceError, match=r"source\.json"):
        parse_source(str(directory))


def test_files_that_are_missing_or_none(directory: Path) -> None:
    """Weights that are not there, and some that are no tensors."""
    (directory / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(SourceError, match="no valid safetensors file"):
        load_module(parse_source(str(directory)))
    (directory / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has no model\.safetensors"):
        parse_source(str(directory))


@pytest.mark.parametrize(
    ("module", "change", "words"),
    [
        ("b", {"out_channels": 6}, "the base has no module 'b'"),
        ("a", {"outchannels": 6}, r"a \(Conv2d\) has no size called 'outchannels'"),
        ("a", {"training": False}, "no size called 'training'"),
        ("a", {"_parameters": 3}, "no size called '_parameters'"),
        ("a", {"forward": 3}, "no size called 'forward'"),
        ("a", {"weight": 3}, "no size called 'weight'"),
        ("a", {"padding_mode": 3}, "no size called 'padding_mode'"),
        ("", {"code": 3}, r"the model \(Net\) has no size called 'code'"),
        ("", {"ratio": 1}, "no size called 'ratio'"),
        ("", {"heads": True}, "'heads' is an integer, not True"),
        ("", {"heads": None}, "'heads' is an integer, not None"),
        ("", {"heads": [1]}, r"'heads' is an integer, not \(1,\)"),
        ("", {"flag": 0}, "'flag' is true or false, not 0"),
        ("", {"shape": 3}, "'shape' is a list, not 3"),
        ("a", {"out_channels": 7}, r"'a' has out_channels 7, but its tensors are for 6"),
        ("d", {"groups": 3}, r"'d' has in_channels 6, but its tensors are for 3"),
        ("n", {"num_features": 5}, "'n' has num_features 5, but its tensors are for 6"),
        ("u", {"in_channels": 5}, "'u' has in_channels 5"),
        ("g", {"num_channels": 8}, "'g' has num_channels 8"),
        ("l", {"normalized_shape": [5]}, "'l' has normalized_shape"),
        ("f", {"out_features": 5}, "'f' has out_features 5"),
    ],
)
def test_sizes_that_cannot_be_set(
    module: str, change: dict[str, object], words: str, directory: Path
) -> None:
    """Only what was a size before, to a value of the same kind, that fits the tensors."""
    sizes(directory, module, **change)
    source = parse_source(str(directory))
    for build in (load_module, build_module):
        with pytest.raises(SourceError, match=words) as raised:
            build(source)
        assert str(directory) in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a__weight": None}, r"missing: a\.weight"),
        ({"other__weight": torch.ones(2)}, r"no place: other\.weight"),
        ({"f__other": torch.ones(2)}, r"no place: f\.other"),
        ({"code": torch.ones(2)}, "no place: code"),
        ({"a__weight": torch.ones(6, 3, 3)}, r"'a\.weight' has the shape \[6, 3, 3\]"),
        ({"a__weight": torch.ones(0, 3, 3, 3)}, r"which \[8, 3, 3, 3\] of the base cannot"),
        ({"a__weight": torch.ones(4, 3, 3, 3)}, r"'a' has out_channels 6, but .* for 4"),
        ({"n__running_mean": torch.ones(1, 6)}, r"n\.running_mean.* cannot have become"),
    ],
)
def test_tensors_that_do_not_fit(
    changes: dict[str, torch.Tensor | None], words: str, directory: Path
) -> None:
    """Missing, extra, of a shape that no cut leaves."""
    tensors(directory, **changes)
    with pytest.raises(SourceError, match=words):
        load_module(parse_source(str(directory)))


def test_weights_must_be_finite(directory: Path) -> None:
    """As of any source."""
    tensors(directory, f__bias=torch.full((4,), float("nan")))
    with pytest.raises(NonFiniteError, match=r"'f\.bias'"):
        load_module(parse_source(str(directory)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"removed": ["blocks.9"]}, r"no module 'blocks\.9'"),
        ({"removed": [""]}, "the model itself cannot be left out"),
        ({"identities": [""]}, "the model itself cannot be left out"),
        ({"identities": ["gone"]}, "no module 'gone'"),
        ({"removed": ["blocks.2"]}, r"no place: blocks\.2\.bias, blocks\.2\.weight"),
    ],
)
def test_modules_that_cannot_be_left_out(
    changes: dict[str, object], words: str, directory: Path
) -> None:
    """They are not there, or are the model, or their weights are there still."""
    edit(directory, **changes)
    with pytest.raises(SourceError, match=words):
        load_module(parse_source(str(directory)))


NAMES = st.sampled_from(["", "a", "a.b", "é", '"'])
SETTINGS = st.none() | st.booleans() | st.integers(-5, 5)


@settings(max_examples=25, deadline=None)
@given(
    st.builds(
        Derivation,
        format=st.just(1),
        base=st.sampled_from(["module:a.b:c", "timm:resnet18"]),
        task=NAMES,
        labels=st.lists(NAMES, max_size=3).map(tuple),
        sizes=st.dictionaries(
            NAMES,
            st.dictionaries(NAMES, SETTINGS | st.lists(SETTINGS, max_size=3).map(tuple)),
            max_size=3,
        ),
        identities=st.lists(NAMES, max_size=2).map(tuple),
        removed=st.lists(NAMES, max_size=2).map(tuple),
    )
)
def test_description_comes_back_as_it_was(derivation: Derivation) -> None:
    """Through its text, booleans and integers apart."""
    back = record.loads(Derivation, record.dumps(derivation), where="x")
    assert back == derivation
    assert record.dumps(back) == record.dumps(derivation)
