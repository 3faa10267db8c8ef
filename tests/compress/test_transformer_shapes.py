"""Which axes follow which size of the config, and which sizes fit together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compress.tiny_transformers import COUPLED, INDEPENDENT, KINDS, tiny

from equipoise.compress.transformer.attention import sample_inputs, trace
from equipoise.compress.transformer.axes import Axis, find_axes, require_cuttable
from equipoise.compress.transformer.proof import proven_axes
from equipoise.compress.transformer.scores import unit_scores
from equipoise.compress.transformer.shapes import (
    TransformerShape,
    config_of,
    read_shape,
    require_fits,
    with_layers,
)
from equipoise.compress.transformer.structure import transformer_structure, widened
from equipoise.errors import DataError, RecipeError, SourceError

SHAPE = TransformerShape(layers=(0, 1, 2), heads=4, key_value_heads=4, intermediate=48, hidden=32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_is_read_whatever_the_config_calls_its_sizes(kind):
    """``dim``, ``n_embd``, ``ffn_dim`` and an ``n_inner`` that is left out."""
    shape = read_shape(tiny(kind).config)
    expected = {
        "gpt2": dataclasses.replace(SHAPE, intermediate=128),
        "bloom": dataclasses.replace(SHAPE, intermediate=0),
        **dict.fromkeys(("llama", "qwen3", "phi3"), dataclasses.replace(SHAPE, key_value_heads=2)),
    }
    assert shape == expected.get(kind, SHAPE)


@pytest.mark.parametrize("kind", [*COUPLED, *INDEPENDENT, "albert"])
def test_axes_are_found_and_hold_when_channels_are_shuffled(kind):
    """Every width of every architecture, with nothing refused."""
    axes = proven_axes(tiny(kind))
    assert axes.refused == {}
    assert axes.coupled == (kind not in INDEPENDENT)
    assert {axis.width for axis in axes.axes} >= {"intermediate", "heads", "hidden"}
    assert bool(axes.prefix) == (kind != "albert")


def test_the_parts_of_a_fused_matrix_are_told_apart():
    """All queries, keys and values in turn; or head by head; or heads of two numbers."""
    fused = {
        kind: [
            (a.width, a.blocks, a.unit, a.offset)
            for a in proven_axes(tiny(kind)).axes
            if a.tensor == name
        ]
        for kind, name in {
            "modernbert": "model.layers.0.attn.Wqkv.weight",
            "gpt2": "transformer.h.0.attn.c_attn.bias",
            "gpt-neox": "gpt_neox.layers.0.attention.query_key_value.bias",
            "phi3": "model.layers.0.self_attn.qkv_proj.weight",
        }.items()
    }
    hidden = ("hidden", 1, 1, 0)
    assert fused["modernbert"] == [("heads", 3, 8, 0), hidden]
    assert fused["gpt2"] == [("heads", 3, 8, 0)]
    assert fused["gpt-neox"] == [("heads", 1, 24, 0)]
    assert fused["phi3"] == [("heads", 1, 8, 0), ("key_value_heads", 2, 8, 32), hidden]


def test_an_axis_that_is_missed_is_noticed():
    """Shuffling shows a map that is wrong: here queries and keys taken for hidden channels."""
    model = tiny("bert")
    wrong = [
        (tensor, axis)
        for tensor, axis in trace(model, sample_inputs(model)).axes(model)
        if "key" not in tensor
    ]
    found = find_axes(model, attention=wrong)
    from equipoise.compress.transformer.proof import _settled, _Trial

    trial = _Trial(model, sample_inputs(model))
    assert "hidden" in _settled(found, ("hidden",), trial=trial).refused
    right = find_axes(model, attention=trace(model, sample_inputs(model)).axes(model))
    assert _settled(right, ("hidden",), trial=trial).refused == {}


def test_a_module_that_does_not_run_is_not_believed():
    """Cross attention of a decoder that gets no encoder's states."""
    config = tiny("bert").config
    config.is_decoder, config.add_cross_attention = True, True
    axes = proven_axes(transformers.BertLMHeadModel(config).eval())
    assert "crossattention" in axes.refused["hidden"]


def test_a_fixed_multiple_of_the_hidden_width_is_refused():
    """BLOOM's feed-forward is four times the hidden width, whatever the config says."""
    axes = proven_axes(tiny("bloom"))
    assert "fixed multiple" in axes.refused["hidden"]
    assert "does not name" in axes.refused["intermediate"]
    shape = dataclasses.replace(axes.shape, hidden=16, heads=2, key_value_heads=2)
    with pytest.raises(RecipeError, match="hidden cannot be cut in this model"):
        require_cuttable(axes, shape)


@pytest.mark.parametrize("kind", COUPLED)
def test_heads_alone_are_refused_where_they_make_up_the_hidden_width(kind):
    """The hint says what goes with them."""
    axes = proven_axes(tiny(kind))
    shape = dataclasses.replace(axes.shape, heads=2, key_value_heads=2)
    with pytest.raises(RecipeError, match="hidden 32 with 2 heads") as caught:
        require_cuttable(axes, shape)
    assert "2 heads go with hidden 16" in caught.value.hint


def test_layers_that_share_their_weights_are_refused():
    """ALBERT has one."""
    axes = proven_axes(tiny("albert"))
    with pytest.raises(RecipeError, match="share their weights"):
        require_cuttable(axes, dataclasses.replace(axes.shape, layers=(0, 1)))


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"hidden": 33}, "hidden 33: the model has 32, so 1 to 32"),
        ({"intermediate": 0}, "intermediate 0"),
        ({"heads": -1, "key_value_heads": -1}, "heads -1"),
        ({"layers": ()}, "at least one"),
        ({"layers": (0, 3)}, r"layers \[0, 3\]: increasing indices from 0 to 2"),
        ({"layers": (1, 0)}, "increasing"),
        ({"layers": (1, 1)}, "increasing"),
        ({"heads": 3, "key_value_heads": 2}, "3 heads on 2 heads of keys and values"),
        ({"heads": 4, "key_value_heads": 1}, "at most 2 here"),
    ],
)
def test_a_shape_that_is_not_in_the_model_is_refused(sizes, told):
    """With what is allowed."""
    config = tiny("llama").config
    with pytest.raises(RecipeError, match=told):
        require_fits(config, dataclasses.replace(read_shape(config), **sizes))


def test_a_width_that_the_config_does_not_name_is_refused():
    """BLOOM's feed-forward."""
    config = tiny("bloom").config
    with pytest.raises(RecipeError, match="does not name"):
        require_fits(config, dataclasses.replace(read_shape(config), intermediate=8))


def test_sizes_that_transformers_refuses_are_refused_before_any_work():
    """Llama wants a hidden width that is a multiple of the heads."""
    config = tiny("llama").config
    shape = dataclasses.replace(read_shape(config), hidden=18)
    with pytest.raises(RecipeError, match=r"refuses a llama model of these sizes.*multiple"):
        config_of(config, shape)


@pytest.mark.parametrize("config", [transformers.T5Config(), transformers.CLIPConfig()])
def test_a_model_of_several_stacks_is_refused(config):
    """Encoder with decoder; text with picture."""
    with pytest.raises(SourceError, match="made of several transformers"):
        read_shape(config)


@pytest.mark.parametrize("config", [transformers.SwinConfig(), transformers.ResNetConfig()])
def test_a_model_that_is_no_stack_of_equal_layers_is_refused(config):
    """Stages of different widths; no attention at all."""
    with pytest.raises(SourceError, match="does not say its"):
        read_shape(config)


def test_lists_with_an_entry_per_layer_are_cut_too():
    """The kinds of attention go with their layers."""
    config = transformers.Qwen3Config(
        num_hidden_layers=4, layer_types=["full_attention", "sliding_attention"] * 2
    )
    new = with_layers(config, (1, 2, 3))
    assert new.num_hidden_layers == 3
    assert new.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config.num_hidden_layers == 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9), st.randoms())
def test_positions_are_a_division_of_the_axis(blocks, unit, width, offset, random):
    """Each index from the offset on belongs to exactly one channel, in their order."""
    axis = Axis(tensor="t", axis=0, width="heads", blocks=blocks, unit=unit, offset=offset)
    order = list(range(width))
    random.shuffle(order)
    found = axis.positions(torch.tensor(order), of=width)
    assert sorted(found.flatten().tolist()) == list(range(offset, offset + blocks * width * unit))
    whole = axis.positions(torch.arange(width), of=width)
    assert torch.equal(found, whole[:, order])


# Structure


@pytest.mark.parametrize(("kind", "group"), [("bert", "hidden"), ("llama", "heads")])
def test_a_structure_has_the_widths_and_operators_of_the_model(kind, group):
    """Layers are as large as the weights, attention stands before what it ends in."""
    model = tiny(kind)
    axes = proven_axes(model)
    structure = transformer_structure(
        model, axes, scores=unit_scores(model, "l2", axes=axes), sequence=10
    )
    widths = {g.name: g.width for g in structure.groups}
    names = ("intermediate", "heads", "hidden")
    expected = {"intermediate": 48, "hidden": 32} | ({"heads": 2} if kind == "llama" else {})
    assert widths == expected
    assert set(widths) <= set(names)
    weights = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    linear = {layer.name: layer for layer in structure.layers if layer.shape.kind == "linear"}
    assert {n: (x.shape.outputs, x.shape.inputs) for n, x in linear.items()} == weights
    for layer in structure.layers:
        for name, factor, size in (
            (layer.input_group, layer.input_factor, layer.shape.inputs),
            (layer.output_group, layer.output_factor, layer.shape.outputs),
        ):
            assert not name or widths[name] * factor == size
    attention = [layer for layer in structure.layers if layer.shape.kind == "attention"]
    assert [layer.block for layer in attention] == [0, 1, 2]
    assert {(a.input_group, a.shape.groups, a.shape.size) for a in attention} == {(group, 4, (10,))}
    assert all(g.scores == tuple(sorted(g.scores, reverse=True)) for g in structure.groups)


def test_a_layer_that_runs_on_one_position_is_measured_on_one():
    """The classifier behind the first token."""
    model = tiny("roberta")
    axes = proven_axes(model)
    scores = unit_scores(model, "l1", axes=axes)
    structure = transformer_structure(model, axes, scores=scores, sequence=64)
    sizes = {layer.name: layer.shape.size for layer in structure.layers}
    assert sizes["classifier.dense"] == (1,)
    assert sizes["roberta.encoder.layer.2.output.dense"] == (64,)


def test_widths_of_groups_make_a_shape():
    """Of the coupled kind heads follow the hidden width; of shared heads whole sets go."""
    bert, llama = proven_axes(tiny("bert")), proven_axes(tiny("llama"))
    narrow = widened(bert.shape, bert, widths={"hidden": 16, "intermediate": 24})
    assert (narrow.hidden, narrow.heads, narrow.key_value_heads, narrow.intermediate) == (
        16,
        2,
        2,
        24,
    )
    narrow = widened(llama.shape, llama, widths={"heads": 1, "hidden": 24})
    assert (narrow.hidden, narrow.heads, narrow.key_value_heads) == (24, 2, 1)
    assert widened(llama.shape, llama, widths={}) == llama.shape


def test_an_empty_sequence_is_refused():
    """It has no latency."""
    model = tiny("bert")
    axes = proven_axes(model)
    with pytest.raises(DataError, match="sequence 0"):
        transformer_structure(model, axes, scores={}, sequence=0)
