"""Scores of slices: against their definitions, and what they are for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from equipoise.compress.importance import mean_squares, sample_losses, slice_scores
from equipoise.errors import DataError, NonFiniteError
from equipoise.sources.torch_model import NamedModule

MEASURES = ("l1", "l2", "taylor", "fisher", "activation")


class Small(torch.nn.Module):
    """A grouped convolution, a linear layer, and one of transformers' transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3, groups=2)
        self.linear = torch.nn.Linear(6, 5)
        self.transposed = Conv1D(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transposed(torch.relu(self.linear(torch.relu(self.conv(x)).mean((2, 3)))))


@pytest.fixture
def module() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 4, 5, 5, generator=generator) for _ in range(6)]


def losses(module, samples):
    """Squared outputs of each sample."""
    return (module(x).square().sum() for x in samples)


AXES = {
    "conv.weight": (0, 1), "conv.bias": (0,), "linear.weight": (0, 1), "transposed.weight": (0, 1),
}  # fmt: skip


@pytest.mark.parametrize("measure", MEASURES)
def test_every_slice_gets_a_score_and_the_model_is_as_before(module, samples, measure):
    """float64, not negative, one per index of the axis; weights and switches untouched."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.linear.weight.requires_grad_(requires_grad=False)
    scores = slice_scores(module, measure, axes=AXES, losses=losses(module, samples))
    assert {key: len(value) for key, value in scores.items()} == {
        ("conv.weight", 0): 6, ("conv.weight", 1): 2, ("conv.bias", 0): 6,
        ("linear.weight", 0): 5, ("linear.weight", 1): 6,
        ("transposed.weight", 0): 5, ("transposed.weight", 1): 3,
    }  # fmt: skip
    assert all(v.dtype == torch.float64 and (v >= 0).all() for v in scores.values())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not module.linear.weight.requires_grad
    assert module.conv.weight.requires_grad
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("measure", ["l1", "l2"])
def test_norms_are_those_of_the_weights(module, measure):
    """Against NumPy, along both axes."""
    weight = module.linear.weight.detach().double().numpy()
    found = slice_scores(module, measure, axes={"linear.weight": (0, 1)})
    elements = np.abs(weight) if measure == "l1" else weight**2
    assert np.allclose(found["linear.weight", 0], elements.sum(1), rtol=1e-12)
    assert np.allclose(found["linear.weight", 1], elements.sum(0), rtol=1e-12)


def test_taylor_and_fisher_are_those_of_each_samples_gradient(module, samples):
    """Against gradients taken by hand, one sample at a time."""
    products = []
    for x in samples:
        module.zero_grad()
        module(x).square().sum().backward()
        products.append((module.linear.weight * module.linear.weight.grad).detach().double())
    module.zero_grad()
    axes = {"linear.weight": (1,)}
    taylor = slice_scores(module, "taylor", axes=axes, losses=losses(module, samples))
    fisher = slice_scores(module, "fisher", axes=axes, losses=losses(module, samples))
    by_hand = torch.stack([p.sum(0).abs() for p in products]).mean(0)
    assert torch.allclose(taylor["linear.weight", 1], by_hand, rtol=1e-5)
    squares = torch.stack([p.square().sum(0) for p in products]).mean(0)
    assert torch.allclose(fisher["linear.weight", 1], squares, rtol=1e-5)


def test_taylor_foretells_what_the_loss_loses(module, samples):
    """The unit that it ranks last costs less than the one that it ranks first."""
    scores = slice_scores(
        module, "taylor", axes={"transposed.weight": (0,)}, losses=losses(module, samples)
    )["transposed.weight", 0]

    def change(unit: int) -> float:
        kept = module.transposed.weight.detach()[unit].clone()
        with torch.no_grad():
            whole = sum(float(loss) for loss in losses(module, samples))
            module.transposed.weight[unit] = 0
            left = sum(float(loss) for loss in losses(module, samples))
            module.transposed.weight[unit] = kept
        return abs(whole - left)

    assert change(int(scores.argmin())) < change(int(scores.argmax()))


def test_activation_scores_weigh_columns_by_their_inputs(module, samples):
    """Against the definition, for a plain, a transposed and a grouped layer."""
    squares = mean_squares(module, lambda: len([module(x) for x in samples]))
    scores = slice_scores(module, "activation", axes=AXES, losses=losses(module, samples))
    linear = module.linear.weight.detach().double().square() * squares["linear"]
    assert torch.allclose(scores["linear.weight", 1], linear.sum(0))
    assert torch.allclose(scores["linear.weight", 0], linear.sum(1))
    transposed = module.transposed.weight.detach().double().square()
    by_input = (transposed * squares["transposed"][:, None]).sum(1)
    assert torch.allclose(scores["transposed.weight", 0], by_input)
    conv = module.conv.weight.detach().double().square().sum((2, 3))
    inputs = squares["conv"].reshape(2, 2)
    by_hand = torch.cat([(conv[:3] * inputs[0]).sum(1), (conv[3:] * inputs[1]).sum(1)])
    assert torch.allclose(scores["conv.weight", 0], by_hand)
    assert not scores["conv.bias", 0].any()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=6, max_size=6), st.sampled_from(["l1", "l2"]))
def test_scores_of_an_axis_add_up_to_those_of_any_other(values, measure):
    """Both are sums over the same elements."""
    layer = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(values).reshape(2, 3))
    found = slice_scores(layer, measure, axes={"weight": (0, 1)})
    assert math.isclose(found["weight", 0].sum(), found["weight", 1].sum(), abs_tol=1e-9)


def test_a_tied_weight_counts_once():
    """Under its first name, with the axes of both."""
    tied = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    found = slice_scores(tied, "l2", axes={"a.weight": (0,), "b.weight": (1,), "nothing": (0,)})
    assert set(found) == {("a.weight", 0), ("a.weight", 1)}


@pytest.mark.parametrize("measure", ["taylor", "fisher", "activation"])
def test_measures_of_samples_need_samples(module, measure):
    """And say which do not."""
    with pytest.raises(DataError, match=rf"{measure}.*samples") as caught:
        slice_scores(module, measure, axes=AXES)
    assert "'l1'" in caught.value.hint


def test_a_loss_that_is_no_number_is_named(module, samples):
    """With the sample that made it."""
    samples[2] = samples[2] * float("nan")
    with pytest.raises(NonFiniteError, match="sample 2 is nan"):
        slice_scores(module, "fisher", axes=AXES, losses=losses(module, samples))
    assert all(p.grad is None for p in module.parameters())


# Losses of samples


def rows(samples):
    return [{"x": sample.numpy()} for sample in samples]


def test_losses_are_of_the_labels_where_there_are_any(module, samples):
    """Cross-entropy, in float32, one sample at a time."""
    model = NamedModule(module, names=["x"], source="small")
    labels = [{"label": np.array(i % 3)} for i in range(len(samples))]
    found = sample_losses(model, rows=rows(samples), labels=labels, kind="classification")
    by_hand = [
        torch.nn.functional.cross_entropy(module(x), torch.tensor([i % 3]))
        for i, x in enumerate(samples)
    ]
    assert torch.allclose(torch.stack(list(found)), torch.stack(by_hand))


def test_without_labels_the_model_says_what_is_right(module, samples):
    """Its likeliest class, whose loss is at most the log of the number of classes."""
    model = NamedModule(module, names=["x"], source="small")
    found = list(sample_losses(model, rows=rows(samples), labels=None, kind="classification"))
    assert all(0 < float(loss.detach()) <= math.log(3) for loss in found)
    assert all(loss.requires_grad for loss in found)


def test_outputs_that_are_no_classes_have_gradients_without_labels(module, samples):
    """In random directions, the same in every run."""
    model = NamedModule(module, names=["x"], source="small")
    first, second = (
        [
            float(loss.detach())
            for loss in sample_losses(model, rows=rows(samples), labels=None, kind=kind)
        ]
        for kind in ("embedding", None)
    )
    assert first == second
    assert len(set(first)) == len(samples)
