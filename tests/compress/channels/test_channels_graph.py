"""Which channels go together, in networks of every form; what cannot be cut says why."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.compress.channels.coupling import Coupling, best
from equipoise.compress.channels.cutting import cut_, mask_
from equipoise.compress.channels.graph import read_graph
from equipoise.compress.channels.heads import head_couplings, with_heads
from equipoise.compress.channels.verifying import verified
from equipoise.errors import SourceError
from equipoise.sources.source import Source
from equipoise.sources.torch_model import load_module

X = [torch.linspace(0, 1, 64).reshape(1, 1, 8, 8).clone()]
WIDTHS: dict[str, dict[str, tuple[int, int]]] = {
    "Plain": {"conv1": (16, 1), "conv2": (32, 1), "fc1": (24, 1)},
    "Residual": {
        "stem": (16, 1),
        "layers.0.conv1": (16, 1),
        "layers.1.conv1": (32, 1),
        "layers.1.conv2": (32, 1),
        "layers.2.conv1": (32, 1),
    },
    "Mobile": {
        "stem": (16, 1),
        "blocks.0.expand.0": (64, 1),
        "blocks.0.reduce": (16, 1),
        "blocks.1.expand.0": (64, 1),
        "blocks.1.reduce": (16, 1),
        "blocks.1.project.0": (24, 1),
        "head": (64, 1),
    },
    "Dense": {"stem": (16, 1), "convs.0": (8, 1), "convs.1": (8, 1), "convs.2": (8, 1)},
    "Grouped": {"a": (32, 4), "b": (32, 2), "c": (16, 1)},
    "Gated": {"a": (16, 1), "glu": (16, 1)},
    "Upward": {"a": (16, 1), "b": (24, 1), "c": (8, 1)},
    "Tokens": {"embed": (16, 1), "up": (32, 1)},
    "Attending": {"embed": (16, 1), "attn": (4, 1)},
    "Odd": {"b": (16, 1)},
    "Shuffled": {"a": (16, 1)},
}
"""Network -> group -> its width, and into how many equal parts it falls."""
STATISTICS = {"Grouped", "Tokens"}
"""Networks whose norms look at several channels, so that cutting is more than not looking."""


def found(module: torch.nn.Module) -> tuple[tuple[Coupling, ...], tuple[str, ...]]:
    graph = read_graph(module, names=["x"], tensors=X, source="net")
    every = with_heads(graph.couplings, head_couplings(module))
    couplings, notes = verified(module, every, names=["x"], tensors=X)
    return couplings, (*graph.notes, *notes)


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_groups_of_a_network(name: str, source_of: Callable[[str], Source]) -> None:
    """Named by the layer that makes them; the module itself stays as it was."""
    module = load_module(source_of(name))
    before = copy.deepcopy(module.state_dict())
    couplings, _ = found(module)
    widths = {c.name: (c.width, c.part_count) for c in couplings}
    assert {n: widths.get(n) for n in WIDTHS[name]} == WIDTHS[name]
    assert set(widths) == set(WIDTHS[name])
    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "group", "reason"),
    [
        ("Odd", "a", "an input of the model"),
        ("Odd", "fc", "an output of the model"),
        ("Odd", "c", "weights of 'd' that another layer has too"),
        ("Odd", "d", "weights of 'd' that another layer has too"),
        ("Plain", "fc2", "an output of the model"),
        ("Shuffled", "b", "what comes out depends on more than its weights"),
        ("Upward", "d", "an output of the model"),
    ],
)
def test_what_cannot_be_cut_says_why(
    name: str, group: str, reason: str, source_of: Callable[[str], Source]
) -> None:
    """Also where the wrong indices would not have shown in the weights as they are."""
    couplings, notes = found(load_module(source_of(name)))
    assert group not in {c.name for c in couplings}
    assert any(note.startswith(f"{group}: cannot be cut; ") and reason in note for note in notes)


def test_heads_that_are_none_are_left(source_of: Callable[[str], Source]) -> None:
    """A module that looks as if it could have fewer, and sets their number itself."""
    couplings, notes = found(load_module(source_of("Fixed")))
    assert {c.name for c in couplings} == {"embed"}
    assert any(note.startswith("attn: cannot be cut") for note in notes)


def test_size_in_the_code_is_told_with_what_forward_said(networks: object) -> None:
    """A reshape to a number that was right for all channels."""

    class Sized(networks.Plain):  # type: ignore[name-defined, misc]
        def forward(self, x):
            x = torch.relu(self.bn2(self.conv2(torch.relu(self.conv1(x)))))
            return self.fc2(torch.relu(self.fc1(x.view(-1, 512))))

    couplings, notes = found(Sized().eval())
    assert {c.name for c in couplings} == {"conv1", "fc1"}
    assert any("conv2: cannot be cut; forward fails on fewer channels" in n for n in notes)


@pytest.mark.parametrize("name", sorted(set(WIDTHS) - STATISTICS))
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_cut_module_is_the_whole_one_without_looking(
    name: str, source_of: Callable[[str], Source], data: st.DataObject
) -> None:
    """Whichever channels go, of however many groups."""
    module = load_module(source_of(name))
    couplings, _ = found(module)
    scores = np.random.default_rng(data.draw(st.integers(0, 99)))
    kept = {}
    for coupling in couplings:
        steps = st.integers(1, coupling.width // coupling.part_count)
        width = data.draw(steps, label=coupling.name) * coupling.part_count
        kept[coupling.name] = best(coupling, scores=scores.random(coupling.width), width=width)
    cut, masked = copy.deepcopy(module), copy.deepcopy(module)
    cut_(cut, couplings, kept)
    mask_(masked, couplings, kept)
    with torch.no_grad():
        left, right = cut(*X), masked(*X)
    assert torch.allclose(left, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
    for coupling in couplings:
        layer = cut.get_submodule(coupling.name)
        counts = ("out_channels", "out_features", "num_heads")
        made = next(getattr(layer, count) for count in counts if hasattr(layer, count))
        ratio = 2 if name == "Gated" and coupling.name == "glu" else 1
        assert made == ratio * kept[coupling.name].sum()


def test_parts_keep_equal_numbers_of_the_best() -> None:
    """The groups of a convolution stay of one size, whatever the scores."""
    coupling = Coupling(name="a", width=8, members=(), parts=(0, 0, 0, 0, 1, 1, 1, 1))
    kept = best(coupling, scores=np.array([9, 8, 7, 6, 1, 2, 3, 4.0]), width=4)
    assert kept.tolist() == [True, True, False, False, False, False, True, True]


def test_module_that_does_not_run_is_refused(source_of: Callable[[str], Source]) -> None:
    """With what it said."""
    module = load_module(source_of("Plain"))
    with pytest.raises(SourceError, match=r"net does not run on a sample: .*channels"):
        read_graph(module, names=["x"], tensors=[torch.rand(1, 3, 8, 8)], source="net")


def test_graph_that_cannot_be_followed_is_an_error_of_the_tree(
    monkeypatch: pytest.MonkeyPatch, source_of: Callable[[str], Source]
) -> None:
    """Whatever torch-pruning raises, and the part is named."""
    import torch_pruning

    def broken(*_: object, **__: object) -> None:
        raise KeyError("strange")

    module = load_module(source_of("Plain"))
    monkeypatch.setattr(torch_pruning.DependencyGraph, "get_pruning_group", broken)
    with pytest.raises(SourceError, match=r"from layer 'conv1' on: KeyError: 'strange'"):
        read_graph(module, names=["x"], tensors=X, source="net")
    monkeypatch.setattr(torch_pruning.DependencyGraph, "_trace", broken)
    with pytest.raises(SourceError, match=r"the run as a whole: KeyError"):
        read_graph(module, names=["x"], tensors=X, source="net")
