"""Distances from a teacher agree with their formulas; layers and maps are found in real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.compress.objective.divergences import (
    added,
    attention_divergence,
    class_divergence,
    map_divergence,
)
from equipoise.compress.objective.inner import (
    features,
    maps,
    record_attention,
    record_features,
    record_states,
    states,
)
from equipoise.compress.objective.layers import spaced, transformer_layers
from equipoise.compress.objective.points import feature_points
from equipoise.errors import SourceError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT = {**SIZES, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def draw(*shape: int, seed: int = 0):
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(values: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# The formulas, in NumPy and float64.


@settings(deadline=None, max_examples=40)
@given(st.floats(0.5, 8), st.integers(0, 1000))
def test_class_divergence_is_its_formula(temperature: float, seed: int) -> None:
    """T^2 sum_i p_i log(p_i / q_i), at the decisions that count."""
    ours, theirs = draw(2, 3, 5, seed=seed) * 3, draw(2, 3, 5, seed=seed + 1) * 3
    counted = torch.tensor([[True, False, True], [False, True, True]])
    p, q = (softmax(side.double().numpy() / temperature) for side in (theirs, ours))
    expected = (p * np.log(p / q)).sum(-1)[counted.numpy()].sum() * temperature**2
    total, count = class_divergence(ours, theirs, temperature=temperature, counted=counted)
    assert total.item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert count.item() == 4


def test_gradients_keep_their_size_at_any_temperature() -> None:
    """That is what T squared is for; without it the ratio would be 1 / 16 squared."""
    sizes = []
    for temperature in (50.0, 800.0):
        ours = draw(4, 6).requires_grad_()
        class_divergence(ours, draw(4, 6, seed=1), temperature=temperature)[0].backward()
        sizes.append(ours.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_attention_divergence_is_its_formula() -> None:
    """Per query that is no padding, mean over heads; keys that nobody sees give no NaN."""
    ours, theirs = (torch.softmax(draw(2, 4, 3, 3, seed=s), -1) for s in (0, 1))
    ours[..., 2], theirs[..., 2] = 0, 0
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    p, q = theirs.double().numpy()[..., :2], ours.double().numpy()[..., :2]
    expected = (p * np.log(p / q)).sum(-1).mean(1)[mask.numpy() == 1].sum()
    ours.requires_grad_()
    total, count = attention_divergence(ours, theirs, mask=mask)
    total.backward()
    assert total.item() == pytest.approx(expected, rel=1e-4)
    assert count.item() == 5
    assert torch.isfinite(ours.grad).all()


def test_other_numbers_of_heads_are_compared_by_their_means() -> None:
    """Heads that are the mean of two each are no different from them."""
    theirs = torch.softmax(draw(2, 4, 3, 3), -1)
    ours = theirs.reshape(2, 2, 2, 3, 3).mean(2)
    total, count = attention_divergence(ours, theirs)
    assert total.item() == pytest.approx(0, abs=1e-5)
    assert count.item() == 6


def test_map_divergence_is_its_formula() -> None:
    """The sum of squares over the channels, at norm 1; of any numbers of channels."""
    ours, theirs = draw(3, 4, 5, 6), draw(3, 9, 5, 6, seed=1)
    energies = [(side.double().numpy() ** 2).sum(1).reshape(3, -1) for side in (ours, theirs)]
    a, b = (e / np.sqrt((e**2).sum(1, keepdims=True)) for e in energies)
    total, count = map_divergence(ours, theirs)
    assert total.item() == pytest.approx(((a - b) ** 2).sum(), rel=1e-4)
    assert count.item() == 3
    assert map_divergence(theirs * 7, theirs)[0].item() == pytest.approx(0, abs=1e-9)
    assert torch.isfinite(map_divergence(torch.zeros(3, 4, 5, 6), theirs)[0])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(0, 6))
def test_distances_of_parts_add_up(samples: int, cut: int) -> None:
    """No divisor comes from the batch."""
    ours, theirs = draw(samples, 2, 3, 3, seed=1), draw(samples, 2, 3, 3, seed=2)
    distances: list[Callable[[Any, Any], Any]] = [
        map_divergence,
        lambda a, b: class_divergence(a, b, temperature=2),
        lambda a, b: attention_divergence(torch.softmax(a, -1), torch.softmax(b, -1)),
    ]
    for distance in distances:
        whole = distance(ours, theirs)
        parts = added([distance(ours[:cut], theirs[:cut]), distance(ours[cut:], theirs[cut:])])
        for one, other in zip(whole, parts, strict=True):
            assert one.item() == pytest.approx(other.item(), rel=1e-4, abs=1e-5)


def test_layers_are_evenly_spaced_and_end_together() -> None:
    """The layers of TinyBERT over BERT, and a student that is deeper than its teacher."""
    assert spaced(4, over=12) == [3, 6, 9, 12]
    assert spaced(3, over=12) == [4, 8, 12]
    assert spaced(5, over=5) == [1, 2, 3, 4, 5]
    assert spaced(4, over=2) == [1, 1, 2, 2]
    assert spaced(1, over=6) == [6]


@given(st.integers(1, 60), st.integers(1, 60))
def test_spacing_is_in_order_and_in_range(count: int, over: int) -> None:
    """Whatever the depths."""
    found = spaced(count, over=over)
    assert found == sorted(found)
    assert found[-1] == over
    assert found[0] >= 1 or count > over


# What is found in real models.

MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=16, n_layers=3, n_heads=2, hidden_dim=32, vocab_size=50)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=16, n_layer=3, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "albert": lambda: transformers.AlbertModel(transformers.AlbertConfig(**TEXT, embedding_size=8)),
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(d_model=16, num_layers=3, num_heads=2, d_ff=32, d_kv=8, vocab_size=50)
    ),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(**SIZES, image_size=16, patch_size=8)
    ),
}


def feeds(name: str) -> dict[str, Any]:
    """One batch for a model of ``MODELS``."""
    if name == "vit":
        return {"pixel_values": draw(2, 3, 16, 16)}
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    tokens = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_that_transformers_gives(name: str) -> None:
    """Before the first layer and behind each; a final norm is no layer of the list."""
    model = MODELS[name]().eval()
    recorder = record_states(model)
    with torch.no_grad():
        with recorder:
            model(**feeds(name))
        found = states(recorder.take(), module=model)
        recorder.close()
        expected = model(**feeds(name), output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_attention_maps_are_those_that_transformers_gives(name: str) -> None:
    """From fused kernels there are none, so they are not used; closed, they are again."""
    model = MODELS[name]().eval()
    before = model.config._attn_implementation
    recorder = record_attention(model)
    with recorder, torch.no_grad():
        model(**feeds(name))
    found = maps(recorder.take(), module=model)
    assert model.config._attn_implementation == "eager"
    expected = model(**feeds(name), output_attentions=True).attentions
    recorder.close()
    assert model.config._attn_implementation == before
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_attention_is_recorded_without_its_dropout(name: str) -> None:
    """Rows sum to 1 in training mode too; closed, everything is as it was."""
    sizes = {"attention_dropout": 0.5} if name == "llama" else {}
    made = {
        "bert": lambda: transformers.BertModel(
            transformers.BertConfig(**TEXT, attention_probs_dropout_prob=0.5)
        ),
        "gpt2": lambda: transformers.GPT2Model(
            transformers.GPT2Config(
                n_embd=16, n_layer=3, n_head=2, attn_pdrop=0.5, vocab_size=50, bos_token_id=0,
                eos_token_id=0,
            )
        ),
        "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**TEXT, **sizes)),
    }  # fmt: skip
    model = made[name]().train()
    before = str(model), [vars(m).get("attention_dropout") for m in model.modules()]
    recorder = record_attention(model)
    with recorder:
        model(**feeds(name))
    for found in maps(recorder.take(), module=model):
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
    recorder.close()
    assert (str(model), [vars(m).get("attention_dropout") for m in model.modules()]) == before


def test_closed_recorders_leave_no_hook_and_open_ones_keep_nothing_outside() -> None:
    """A step holds its graph only as long as it runs."""
    model = MODELS["bert"]()
    recorders = [record_states(model), record_attention(model)]
    model(**feeds("bert"))
    assert [recorder.take() for recorder in recorders] == [{}, {}]
    with recorders[0]:
        model(**feeds("bert"))
    assert recorders[0].take()
    assert recorders[0].take() == {}
    for recorder in recorders:
        recorder.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_failed_run_kept_is_forgotten() -> None:
    """Half of the layers would be taken for all of them."""
    model = MODELS["bert"]()
    transformer_layers(model)[2].register_forward_hook(lambda *_: 1 / 0)
    recorder = record_states(model)
    with pytest.raises(ZeroDivisionError), recorder:
        model(**feeds("bert"))
    assert recorder.take() == {}


def test_models_without_layers_or_maps_are_named() -> None:
    """A convolutional network, and DeBERTa, whose attention keeps its weights to itself."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    with pytest.raises(SourceError, match="Sequential has no hidden states"):
        states(record_states(network)._kept, module=network)
    model = transformers.DebertaV2Model(transformers.DebertaV2Config(**TEXT))
    recorder = record_attention(model)
    with recorder:
        model(**feeds("deberta"))
    with pytest.raises(SourceError, match="DebertaV2Model gives no attention maps") as told:
        maps(recorder.take(), module=model)
    assert "BERT" in told.value.hint


class Block(torch.nn.Module):
    """A bottleneck, its ReLU in place and called often; the stride is behind a map of old size."""

    def __init__(self, ours: int, out: int, stride: int) -> None:
        super().__init__()
        nn = torch.nn
        self.first = nn.Conv2d(ours, out, 1)
        self.second = nn.Conv2d(out, out, 3, stride=stride, padding=1)
        self.short = nn.Conv2d(ours, out, 1, stride=stride)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x))) + self.short(x))


class Network(torch.nn.Module):
    """Three sizes of feature maps, pooled to one position in the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, width, 3, padding=1)
        self.stages = torch.nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        )
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.head = torch.nn.Linear(4 * width, 10)

    def forward(self, x):
        return self.head(self.pool(self.stages(self.stem(x))).flatten(1))


def test_feature_maps_are_taken_where_their_size_changes() -> None:
    """What the last block of each size gives, not a map inside of it or a pooled one."""
    network = Network(4)
    picture = draw(2, 3, 16, 16)
    points = feature_points(network, run=lambda: network(picture))
    assert list(points) == [(16, 16), (8, 8), (4, 4)]
    assert list(points.values()) == [("stages.0", 0), ("stages.1", 0), ("stages", 0)]
    assert not any(module._forward_hooks for module in network.modules())
    recorder = record_features(network, points=list(points.values()))
    with recorder:
        network(picture)
    expected = network.stem(picture)
    for found, block in zip(
        features(recorder.take(), points=list(points.values())), network.stages, strict=True
    ):
        expected = block(expected)
        torch.testing.assert_close(found, expected)


def test_what_comes_before_the_first_weight_is_no_feature_map() -> None:
    """A padded picture is the same for student and teacher."""
    pad, network = torch.nn.ZeroPad2d(1), Network(4)
    padded = torch.nn.Sequential(pad, network.stem, torch.nn.Flatten())
    picture = draw(2, 3, 16, 16)
    points = feature_points(padded, run=lambda: padded(picture))
    assert points == {(18, 18): ("1", 0)}


def test_feature_maps_of_a_module_that_runs_often_are_those_of_the_right_call() -> None:
    """One convolution for all sizes."""
    shared = torch.nn.Conv2d(3, 3, 3, padding=1)
    pool = torch.nn.MaxPool2d(2)

    class Pyramid(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x):
            return self.shared(pool(self.shared(pool(self.shared(x))))).mean((2, 3))

    network, picture = Pyramid(), draw(1, 3, 8, 8)
    points = feature_points(network, run=lambda: network(picture))
    assert list(points.values()) == [("shared", 0), ("shared", 1), ("shared", 2)]
    recorder = record_features(network, points=[points[4, 4]])
    with recorder:
        network(picture)
    (found,) = features(recorder.take(), points=[points[4, 4]])
    torch.testing.assert_close(found, shared(pool(shared(picture))))
