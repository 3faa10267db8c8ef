"""Transformers cut by their config: what is left computes what it should, and loads as it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.compress.tiny_transformers import (
    COUPLED,
    INDEPENDENT,
    KINDS,
    VOCABULARY,
    names_of,
    save,
    tiny,
    write_samples,
)

from equipoise import record
from equipoise.compress.samples import read_samples
from equipoise.compress.transformer.cut import cut_tensors, reduce_module
from equipoise.compress.transformer.proof import proven_axes
from equipoise.compress.transformer.reduce import ReduceConfig, ReduceRecord, reduce_transformer
from equipoise.compress.transformer.refit import refitted
from equipoise.compress.transformer.scores import (
    block_influence,
    choose_channels,
    choose_layers,
    loss_increases,
    unit_scores,
)
from equipoise.compress.transformer.shapes import read_shape
from equipoise.data.store import write_rows
from equipoise.errors import DataError, OutputError, RecipeError, SourceError
from equipoise.sources.source import Source, parse_source

MINILM = Path("/work/shared/models/minilm-conll2003")
HALF = {"heads": 2, "key_value_heads": 2}
OFTEN = ("bert", "modernbert", "gpt2", "qwen3", "vit")
"""What is cut in every run of the tests: separate and fused, both ways round, shared, pictures."""


def each(*cases: object) -> list:
    """Cases whose first part is a kind; the less common ones are slow."""
    named = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(
            *case,
            marks=() if case[0] in OFTEN else pytest.mark.slow,
            id="-".join(str(part) for part in case),
        )
        for case in named
    ]


def config_for(kind: str, directory: Path, **settings: object):
    """The stage's config for a tiny model saved in ``directory``, with data."""
    source = save(tiny(kind), directory / "source")
    data = write_samples(directory / "data", kind)
    settings.setdefault("importance", "l2")
    return ReduceConfig(source=source, data=data, names=names_of(kind), **settings)


def reloaded(directory: Path, kind: str):
    """The result as plain transformers loads it."""
    return type(tiny(kind)).from_pretrained(directory / "model").eval()


def inputs_of(kind: str) -> dict:
    generator = torch.Generator().manual_seed(3)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 9), generator=generator)}


def outputs(model, kind: str):
    with torch.no_grad():
        return model(**inputs_of(kind)).logits


# Every architecture and every width


@pytest.mark.parametrize("kind", each(*KINDS))
def test_keeping_everything_changes_nothing(kind, tmp_path):
    """Bit for bit, in the files too."""
    config = config_for(kind, tmp_path, shape=read_shape(tiny(kind).config))
    made = reduce_transformer(config, output=tmp_path)
    assert made.parameters_after == made.parameters_before
    assert made.loss_after == made.loss_before
    assert torch.equal(outputs(reloaded(tmp_path, kind), kind), outputs(tiny(kind), kind))


CASES = [
    *((kind, {"intermediate": 24}) for kind in (*COUPLED, *INDEPENDENT, "albert")),
    *((kind, {"hidden": 16, **HALF}) for kind in (*COUPLED, "albert") if kind != "electra"),
    ("electra", {"hidden": 8, "heads": 1, "key_value_heads": 1}),
    *((kind, {"hidden": 24}) for kind in ("qwen3", "phi3", "vit", "llama")),
    *((kind, {"heads": 2, "key_value_heads": 1}) for kind in ("llama", "qwen3", "phi3")),
    *((kind, {"heads": 2}) for kind in ("llama", "qwen3", "phi3")),
    ("vit", HALF),
    *((kind, {"layers": (0, 2)}) for kind in KINDS if kind not in ("albert", "modernbert")),
    (
        "bert",
        {"intermediate": 16, "hidden": 24, "heads": 3, "key_value_heads": 3, "layers": (1, 2)},
    ),
    ("qwen3", {"intermediate": 16, "hidden": 16, "heads": 2, "key_value_heads": 1, "layers": (2,)}),
]


@pytest.mark.parametrize(("kind", "sizes"), each(*CASES))
def test_what_is_cut_loads_with_plain_transformers(kind, sizes, tmp_path):
    """The config says the new sizes, and its record the numbers that are left."""
    shape = dataclasses.replace(read_shape(tiny(kind).config), **sizes)
    made = reduce_transformer(config_for(kind, tmp_path, shape=shape), output=tmp_path)
    model = reloaded(tmp_path, kind)
    renumbered = dataclasses.replace(shape, layers=tuple(range(len(shape.layers))))
    assert read_shape(model.config) == renumbered == made.shape_after
    assert made.parameters_after == sum(p.numel() for p in model.parameters())
    assert made.parameters_after < made.parameters_before
    assert outputs(model, kind).isfinite().all()
    assert record.loads(ReduceRecord, record.dumps(made), where="record") == made


def test_modernbert_keeps_the_kinds_of_its_layers(tmp_path):
    """Global and local attention go with the layers that have them."""
    shape = dataclasses.replace(read_shape(tiny("modernbert").config), layers=(0, 2))
    reduce_transformer(config_for("modernbert", tmp_path, shape=shape), output=tmp_path)
    assert reloaded(tmp_path, "modernbert").config.layer_types == [
        tiny("modernbert").config.layer_types[index] for index in (0, 2)
    ]


def test_a_layer_that_is_built_unlike_the_others_must_stay_in_place(tmp_path):
    """ModernBERT's first has no norm before its attention."""
    shape = dataclasses.replace(read_shape(tiny("modernbert").config), layers=(1, 2))
    with pytest.raises(RecipeError, match="has other parts") as caught:
        reduce_transformer(config_for("modernbert", tmp_path, shape=shape), output=tmp_path)
    assert "layer 0" in caught.value.hint
    assert not (tmp_path / "model").exists()


def test_a_projection_that_would_vanish_is_named(tmp_path):
    """ELECTRA has none between embeddings and layers of one width."""
    shape = dataclasses.replace(
        read_shape(tiny("electra").config), hidden=12, heads=1, key_value_heads=1
    )
    config = config_for("electra", tmp_path, shape=shape)
    with pytest.raises(RecipeError, match="hidden 12 with 1 heads"):
        reduce_transformer(config, output=tmp_path)
    model = tiny("electra")
    model.config.embedding_size = 16
    wider = type(model)(model.config).eval()
    source = save(wider, tmp_path / "wider")
    shape = dataclasses.replace(shape, hidden=16, heads=2, key_value_heads=2)
    with pytest.raises(RecipeError, match=r"has other parts.*embeddings_project"):
        reduce_transformer(dataclasses.replace(config, source=source, shape=shape), output=tmp_path)


def test_tied_weights_stay_tied(tmp_path):
    """GPT-2's head is its embeddings, after the cut too, and generation settings stay."""
    shape = dataclasses.replace(read_shape(tiny("gpt2").config), hidden=16, **HALF)
    reduce_transformer(config_for("gpt2", tmp_path, shape=shape), output=tmp_path)
    model = reloaded(tmp_path, "gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.generation_config.eos_token_id == 1


# What is left computes what it should


def cut(model, sizes: dict, scores: dict):
    axes = proven_axes(model)
    shape = dataclasses.replace(axes.shape, **sizes)
    kept = choose_channels(scores, axes, shape=shape)
    return reduce_module(model, axes, shape=shape, kept=kept), kept


@pytest.mark.parametrize("kind", each(*(k for k in (*COUPLED, *INDEPENDENT) if k != "gpt-neox")))
def test_a_model_without_some_units_is_the_model_with_them_at_zero(kind):
    """Each layer keeps units of its own."""
    model = tiny(kind)
    axes = proven_axes(model)
    scores = unit_scores(model, "l2", axes=axes)
    smaller, kept = cut(model, {"intermediate": 20}, scores)
    layers = {layer for width, layer in kept if width == "intermediate"}
    units = {tuple(kept["intermediate", layer].tolist()) for layer in layers}
    assert len(units) == len(layers) > 1
    silenced = tiny(kind)
    tensors = silenced.state_dict()
    for axis in axes.of("intermediate"):
        gone = torch.ones(axes.shape.intermediate, dtype=torch.bool)
        gone[kept["intermediate", axis.layer]] = False
        index = axis.positions(gone.nonzero().ravel(), of=axes.shape.intermediate).flatten()
        tensors[axis.tensor].index_fill_(axis.axis, index, 0)
    assert torch.allclose(outputs(smaller, kind), outputs(silenced, kind), atol=1e-5)
    assert not torch.allclose(outputs(smaller, kind), outputs(model, kind), atol=1e-3)


@pytest.mark.parametrize("kind", each(*INDEPENDENT))
def test_a_model_without_some_heads_is_the_model_with_their_outputs_at_zero(kind):
    """Shared keys and values go with all the heads that they serve."""
    model = tiny(kind)
    axes = proven_axes(model)
    before = axes.shape
    sizes = {"heads": before.heads // 2, "key_value_heads": before.key_value_heads // 2}
    smaller, kept = cut(model, sizes, unit_scores(model, "l1", axes=axes))
    silenced = tiny(kind)
    for axis in axes.of("heads"):
        if axis.axis == 1:  # the layer that heads end in
            gone = torch.ones(before.heads, dtype=torch.bool)
            gone[kept["heads", axis.layer]] = False
            index = axis.positions(gone.nonzero().ravel(), of=before.heads).flatten()
            silenced.state_dict()[axis.tensor].index_fill_(1, index, 0)
    assert torch.allclose(outputs(smaller, kind), outputs(silenced, kind), atol=1e-5)


@pytest.mark.parametrize("kind", each("bert", "gpt2", "llama", "vit"))
def test_a_model_without_a_layer_is_the_model_that_passes_it_by(kind):
    """As ``loss_increases`` does to measure what a layer is worth."""
    model = tiny(kind)
    axes = proven_axes(model)
    shape = dataclasses.replace(axes.shape, layers=(0, 2))
    smaller = reduce_module(model, axes, shape=shape, kept={})
    expected = float(outputs(smaller, kind).square().sum() - outputs(model, kind).square().sum())
    found = loss_increases(
        model, prefix=axes.prefix, loss=lambda: float(outputs(model, kind).square().sum())
    )
    assert found[1] == pytest.approx(expected, rel=1e-3, abs=1e-2)
    assert torch.equal(outputs(model, kind), outputs(tiny(kind), kind))


@pytest.mark.parametrize("measure", ["l1", "l2", "taylor", "fisher", "activation"])
@pytest.mark.parametrize("kind", each("bert", "gpt2", "llama", "gpt-neox"))
def test_every_measure_finds_the_units_that_do_nothing(kind, measure, tmp_path):
    """Another half of them in every layer; cutting them leaves the outputs as they were."""
    model = tiny(kind)
    axes = proven_axes(model)
    count, dead = axes.shape.intermediate, {}
    for axis in axes.of("intermediate"):
        dead.setdefault(axis.layer, torch.randperm(count)[: count // 2])
        index = axis.positions(dead[axis.layer], of=count).flatten()
        model.state_dict()[axis.tensor].index_fill_(axis.axis, index, 0)
    data = write_samples(tmp_path, kind)
    task = "token-classification" if kind == "bert" else "causal-lm"
    samples = read_samples(data, part="training", names=names_of(kind), task=task, count=8)
    scores = unit_scores(model, measure, axes=axes, losses=samples.losses(model, name=kind))
    smaller, kept = cut(model, {"intermediate": count // 2}, scores)
    for layer, gone in dead.items():
        assert not set(kept["intermediate", layer].tolist()) & set(gone.tolist())
    assert torch.allclose(outputs(smaller, kind), outputs(model, kind), atol=1e-5)


def test_fewer_heads_on_each_of_the_shared_keys_keep_the_best_of_each():
    """Two heads serve each; the one with larger weights stays, whichever it is."""
    model = tiny("llama")
    for layer, best in enumerate(((0, 3), (1, 2), (1, 3))):
        weight = model.model.layers[layer].self_attn.q_proj.weight
        with torch.no_grad():
            weight.reshape(4, 8, -1)[list(best)] *= 3
    axes = proven_axes(model)
    smaller, kept = cut(model, {"heads": 2}, unit_scores(model, "l2", axes=axes))
    assert [kept["heads", layer].tolist() for layer in range(3)] == [[0, 3], [1, 2], [1, 3]]
    assert smaller.config.num_key_value_heads == 2
    assert outputs(smaller, "llama").isfinite().all()


# Layers


def test_a_layer_that_does_nothing_is_the_one_to_go():
    """By what it turns, and by what the loss is without it."""
    model = tiny("llama")
    idle = model.model.layers[1]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    axes = proven_axes(model)

    def run() -> int:
        outputs(model, "llama")
        return 1

    influence = block_influence(model, prefix=axes.prefix, run=run)
    increase = loss_increases(
        model, prefix=axes.prefix, loss=lambda: float(outputs(model, "llama").square().mean())
    )
    assert influence[1] == pytest.approx(0, abs=1e-6) == increase[1]
    assert min(influence[0], influence[2]) > 1e-3
    kept = choose_layers(influence, count=2)
    assert kept == (0, 2)
    smaller = reduce_module(
        model, axes, shape=dataclasses.replace(axes.shape, layers=kept), kept={}
    )
    assert torch.allclose(outputs(smaller, "llama"), outputs(model, "llama"), atol=1e-6)


# Making up for what is cut


@pytest.mark.parametrize("kind", each("bert", "gpt2", "llama", "modernbert"))
def test_what_kept_units_can_tell_of_those_that_go_is_made_up_for(kind, tmp_path):
    """Units that another one repeats cost nothing: its weight takes theirs."""
    model = tiny(kind)
    axes = proven_axes(model)
    count = axes.shape.intermediate
    half = torch.arange(count // 2)
    for axis in axes.of("intermediate"):
        tensor = model.state_dict()[axis.tensor]
        if axis.axis == 0 and not (kind == "gpt2" and tensor.ndim == 2):
            index, other = (
                axis.positions(c, of=count).flatten() for c in (half, half + count // 2)
            )
            tensor[other] = tensor[index]
        elif kind == "gpt2" and axis.axis == 1:
            tensor[:, count // 2 :] = tensor[:, : count // 2]
    kept = {("intermediate", layer): half for layer in range(len(axes.shape.layers))}
    shape = dataclasses.replace(axes.shape, intermediate=count // 2)
    samples = read_samples(
        write_samples(tmp_path, kind, count=64), part="training", names=names_of(kind),
        task="feature-extraction", count=64,
    )  # fmt: skip
    tensors = refitted(model, axes, kept=kept, run=samples.run(model, name=kind))
    whole = outputs(model, kind)
    plain = outputs(reduce_module(model, axes, shape=shape, kept=kept), kind)
    refit = outputs(cut_tensors(model, axes, tensors=tensors, shape=shape, kept=kept), kind)
    assert (refit - whole).norm() < 0.05 * (plain - whole).norm()


def test_refitting_needs_no_more_memory_at_once_than_allowed(tmp_path, monkeypatch):
    """In one pass per layer it comes out the same."""
    model = tiny("bert")
    axes = proven_axes(model)
    kept = {("intermediate", layer): torch.arange(24) for layer in range(3)}
    samples = read_samples(
        write_samples(tmp_path, "bert"), part="training", names=names_of("bert"),
        task="token-classification", count=8,
    )  # fmt: skip
    run = samples.run(model, name="bert")
    together = refitted(model, axes, kept=kept, run=run)
    monkeypatch.setattr("equipoise.compress.transformer.refit._MOST_BYTES", 1)
    apart = refitted(model, axes, kept=kept, run=run)
    assert all(torch.equal(together[name], apart[name]) for name in together)
    assert not torch.equal(
        together["bert.encoder.layer.0.output.dense.weight"],
        model.state_dict()["bert.encoder.layer.0.output.dense.weight"],
    )


def test_a_refit_that_raises_the_loss_is_not_kept(tmp_path, monkeypatch):
    """And that is told; here one that spoils every weight."""
    shape = dataclasses.replace(read_shape(tiny("gpt2").config), intermediate=64)
    config = config_for("gpt2", tmp_path, shape=shape)
    plain = reduce_transformer(dataclasses.replace(config, refit=False), output=tmp_path / "a")

    def spoiled(module, _axes, *, kept, run):  # noqa: ARG001
        return {name: 9 * tensor for name, tensor in module.state_dict().items()}

    monkeypatch.setattr("equipoise.compress.transformer.reduce.refitted", spoiled)
    made = reduce_transformer(config, output=tmp_path / "b")
    assert made.loss_after == plain.loss_after
    assert "tried and not kept" in made.notes[0]
    assert plain.notes == ()


# Bad input


def test_measures_of_samples_need_data(tmp_path):
    """The model is not even proven before that is said."""
    source = save(tiny("bert"), tmp_path / "source")
    config = ReduceConfig(source=source, shape=read_shape(tiny("bert").config))
    with pytest.raises(DataError, match="'taylor' is measured on samples"):
        reduce_transformer(config, output=tmp_path)


def test_without_data_weights_alone_decide(tmp_path):
    """And a note says that nothing was refitted."""
    source = save(tiny("bert"), tmp_path / "source")
    shape = dataclasses.replace(read_shape(tiny("bert").config), intermediate=24)
    made = reduce_transformer(
        ReduceConfig(source=source, shape=shape, importance="l2"), output=tmp_path
    )
    assert made.loss_before is made.loss_after is None
    assert made.loss_samples == ""
    assert "nothing was refitted" in made.notes[0]


def test_a_source_that_is_no_transformers_directory_is_refused(tmp_path):
    """It has no config."""
    source = Source(kind="factory", name="module:a:b", factory="a:b")
    config = ReduceConfig(source=source, shape=read_shape(tiny("bert").config), importance="l1")
    with pytest.raises(SourceError, match="no transformers directory"):
        reduce_transformer(config, output=tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"names": ("input_ids", "pixels")}, "the model takes input_ids, pixels"),
        ({"names": ()}, "the model takes none"),
        ({"samples": 0}, "samples 0: at least 1"),
        ({"data": Path("nowhere")}, "no such file"),
    ],
)
def test_data_that_does_not_fit_is_refused(settings, told, tmp_path):
    """With what there is and what is needed."""
    shape = dataclasses.replace(read_shape(tiny("bert").config), intermediate=24)
    config = config_for("bert", tmp_path, shape=shape)
    with pytest.raises(DataError, match=told):
        reduce_transformer(dataclasses.replace(config, **settings), output=tmp_path)


def test_labels_of_another_number_than_rows_are_refused(tmp_path):
    """They would be those of other samples."""
    shape = dataclasses.replace(read_shape(tiny("bert").config), intermediate=24)
    config = config_for("bert", tmp_path, shape=shape)
    write_rows(tmp_path / "data" / "training_labels", [{"label": np.zeros(6, dtype=np.int64)}])
    with pytest.raises(DataError, match="8 arrays named 'label' are needed"):
        reduce_transformer(config, output=tmp_path)


def test_an_output_that_cannot_be_written_is_an_output_error(tmp_path):
    """A file stands where the directory has to be."""
    config = config_for("bert", tmp_path, shape=read_shape(tiny("bert").config))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        reduce_transformer(config, output=tmp_path / "file")


# Labels


def test_the_loss_is_told_on_samples_that_nothing_was_fitted_to(tmp_path):
    """Validation rows where there are any."""
    shape = dataclasses.replace(read_shape(tiny("bert").config), intermediate=24)
    config = config_for("bert", tmp_path, shape=shape, importance="fisher")
    data = tmp_path / "data"
    write_samples(tmp_path / "other", "bert", count=3)
    (tmp_path / "other" / "training").rename(data / "validation")

    def labels(count: int):
        return [{"label": np.full(6 + i % 5, i % 2)} for i in range(count)]

    write_rows(data / "training_labels", labels(8))
    made = reduce_transformer(config, output=tmp_path / "first")
    assert (made.loss_samples, made.loss_after) == ("", None)
    write_rows(data / "validation_labels", labels(3))
    made = reduce_transformer(config, output=tmp_path / "second")
    assert made.loss_samples == "validation"
    assert made.loss_before != made.loss_after
    assert min(made.loss_before, made.loss_after) > 0


# A real model


def _text_rows(source: Source, repository: Path):
    """Lines of this project's documents as rows, and the model's own decisions as labels."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path)
    model = AutoModelForTokenClassification.from_pretrained(source.path).eval()
    lines = [
        line
        for file in sorted((repository / "docs").glob("*.md"))
        for line in file.read_text().splitlines()
        if 40 < len(line) < 200
    ]
    for line in lines[::3][:160]:
        row = {name: value.numpy() for name, value in tokenizer(line, return_tensors="pt").items()}
        with torch.no_grad():
            logits = model(**{name: torch.from_numpy(value) for name, value in row.items()}).logits
        yield row, {"label": logits[0].argmax(-1).numpy()}


@pytest.mark.slow
@pytest.mark.skipif(not MINILM.exists(), reason="the model is not on this machine")
@pytest.mark.parametrize(
    "sizes", [{"intermediate": 512}, {"hidden": 256, "heads": 8, "key_value_heads": 8}]
)
def test_minilm_loses_less_when_refitted(sizes, tmp_path, repository):
    """On real text, by the loss of agreeing with the whole model; and it loads."""
    source = parse_source(str(MINILM))
    rows, labels = zip(*_text_rows(source, repository), strict=True)
    for part, cut_at in (("training", slice(0, 110)), ("validation", slice(110, None))):
        write_rows(tmp_path / "data" / part, rows[cut_at])
        write_rows(tmp_path / "data" / f"{part}_labels", labels[cut_at])
    config = json.loads((MINILM / "config.json").read_text())
    whole = read_shape(transformers.BertConfig(**config))
    plain, refit = (
        reduce_transformer(
            ReduceConfig(
                source=source, shape=dataclasses.replace(whole, **sizes), importance="l2",
                data=tmp_path / "data", names=tuple(rows[0]), samples=96, refit=each,
            ),
            output=tmp_path / str(each),
        )
        for each in (False, True)
    )  # fmt: skip
    assert refit.loss_before == plain.loss_before < refit.loss_after
    assert refit.loss_after < 0.7 * plain.loss_after
    loaded, info = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path / "True" / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.id2label[3] == "B-ORG"
    assert (tmp_path / "True" / "model" / "tokenizer.json").is_file()
