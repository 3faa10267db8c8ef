"""Scores, the cut, what makes up for it, and the source that is left."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.compress.channels import narrow as narrowing
from equipoise.compress.channels.compensating import reestimate_
from equipoise.compress.channels.narrow import NarrowConfig, narrow, require_same_when_loaded
from equipoise.compress.channels.structure import (
    ChannelsConfig,
    find_channels,
    read_structure,
    samples_of,
    scores_of,
    uniform,
)
from equipoise.compress.importance import Importance
from equipoise.compress.structure import Group, LayerShape, Structure
from equipoise.data.store import Rows, write_rows
from equipoise.errors import DataError, ParityError, RecipeError, SourceError, UsageError
from equipoise.export.export import ExportConfig, export
from equipoise.sources.source import Source, parse_source
from equipoise.sources.torch_model import load_module
from equipoise.spec import TensorSpec

NETWORKS = (
    "Plain",
    "Residual",
    "Mobile",
    "Dense",
    "Grouped",
    "Gated",
    "Upward",
    "Tokens",
    "Attending",
)
MEASURES: tuple[Importance, ...] = ("l1", "l2", "activation", "taylor", "fisher")


def config(source: Source, data: Path, **changes: object) -> NarrowConfig:
    base = NarrowConfig(source=source, data=data, names=("x",), samples=48, multiple=4, widths={})
    return dataclasses.replace(base, **changes)


def picture(digits: Path) -> torch.Tensor:
    return torch.from_numpy(Rows(digits / "validation")[0]["x"])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_form_of_network_is_cut_saved_and_opened(
    name: str, source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """Widths are what was asked for, multiples of what was asked for, and can be cut again."""
    source = source_of(name)
    if name == "Upward":  # its output is a map, which the labels of the digits are none of
        source = dataclasses.replace(source, task="feature-extraction")
        digits = unlabelled(digits, tmp_path)
    chosen = config(source, digits)
    found = read_structure(chosen, output=tmp_path)
    widths = uniform(found.structure, ratio=0.5)
    made = narrow(dataclasses.replace(chosen, widths=widths), output=tmp_path)
    assert made.widths_after == widths
    assert all(w % 4 == 0 for name, w in widths.items() if name != "attn")
    assert (made.parameters_before, made.macs_before) == (found.parameters, found.macs)
    smaller = parse_source(str(tmp_path / "model"))
    module = load_module(smaller)
    assert made.parameters_after == sum(p.numel() for p in module.parameters())
    assert made.macs_after < 0.6 * made.macs_before
    again = read_structure(dataclasses.replace(chosen, source=smaller), output=tmp_path)
    assert {g.name: g.width for g in again.structure.groups} == widths
    assert (again.parameters, again.macs) == (made.parameters_after, made.macs_after)


def unlabelled(digits: Path, folder: Path) -> Path:
    for part in ("training", "validation"):
        write_rows(folder / "unlabelled" / part, Rows(digits / part)[:48])
    return folder / "unlabelled"


def test_nothing_is_changed_where_nothing_is_cut(
    source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """Neither weights nor statistics, whatever may be estimated anew."""
    source = source_of("Residual")
    made = narrow(config(source, digits, widths={"stem": 16}), output=tmp_path)
    assert made.macs_after == made.macs_before
    assert made.loss_after == made.loss_before
    before = load_module(source).state_dict()
    after = load_module(parse_source(str(tmp_path / "model"))).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_are_told_with_the_groups_that_they_follow(
    source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """Shapes as they run, indices per channel of a flattened map, depthwise convolutions."""
    found = read_structure(config(source_of("Plain"), digits), output=tmp_path)
    layers = {layer.name: layer for layer in found.structure.layers}
    assert list(layers) == ["conv1", "conv2", "fc1", "fc2"]
    assert layers["conv2"].shape == LayerShape(
        kind="conv", inputs=16, outputs=32, size=(8, 8), kernel=(3, 3), stride=(2, 2),
        padding=(1, 1),
    )  # fmt: skip
    fc1 = layers["fc1"]
    assert (fc1.input_group, fc1.input_factor, fc1.output_group) == ("conv2", 16, "fc1")
    assert (layers["conv1"].input_group, layers["fc2"].output_group) == ("", "")
    assert found.macs == 64 * 16 * 9 + 16 * 32 * 16 * 9 + 512 * 24 + 24 * 10
    mobile = read_structure(config(source_of("Mobile"), digits), output=tmp_path)
    depth = next(x for x in mobile.structure.layers if x.name == "blocks.0.depth")
    assert (depth.depthwise, depth.shape.groups) == (True, 64)
    assert depth.input_group == depth.output_group == "blocks.0.expand.0"
    heads = read_structure(config(source_of("Attending"), digits), output=tmp_path).structure
    assert [(g.name, g.width, g.multiple) for g in heads.groups] == [
        ("embed", 16, 4),
        ("attn", 4, 1),
    ]
    assert [layer.name for layer in heads.layers] == [
        "embed",
        "attn.qkv",
        "attn",
        "attn.proj",
        "fc",
    ]
    attention = heads.layers[2]
    assert attention.shape == LayerShape(
        kind="attention", inputs=16, outputs=16, size=(16,), groups=4
    )
    assert (attention.input_group, attention.input_factor) == ("attn", 4)
    assert heads.layers[1].output_factor == 12
    tokens = read_structure(config(source_of("Tokens"), digits), output=tmp_path)
    up = next(x for x in tokens.structure.layers if x.name == "up")
    assert up.shape == LayerShape(kind="linear", inputs=16, outputs=32, size=(16,))


def test_padding_of_a_dilated_convolution_keeps_its_output_size(
    source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """A table knows no dilation; a transposed convolution is no operator of it at all."""
    source = dataclasses.replace(source_of("Upward"), task="feature-extraction")
    found = read_structure(config(source, unlabelled(digits, tmp_path)), output=tmp_path)
    layers = {layer.name: layer for layer in found.structure.layers}
    assert sorted(layers) == ["a", "c", "d"]
    assert layers["c"].shape.padding == (1, 1)
    assert found.macs == 16 * 16 * 9 + 16 * 16 * 24 * 4 + 64 * 25 * 8 * 9 + 64 * 8 * 5
    assert "c: follows several groups; what it saves is not in the plan" in found.notes


# Scores


def scores(module: torch.nn.Module, source: Source, digits: Path, importance: Importance):
    chosen = config(source, digits, importance=importance, samples=16)
    samples = samples_of(chosen)
    graph = find_channels(module, names=("x",), samples=samples, source="net")
    return scores_of(module, graph, samples=samples, config=chosen)


@pytest.mark.parametrize("importance", MEASURES)
def test_channel_that_does_nothing_scores_least(
    importance: Importance, trained: Source, digits: Path
) -> None:
    """Its weights are zero on both sides of it."""
    module = load_module(trained)
    with torch.no_grad():
        module.layers[1].bn1.weight[5] = 0
        module.layers[1].bn1.bias[5] = 0
        module.layers[1].conv2.weight[:, 5] = 0
    found = scores(module, trained, digits, importance)["layers.1.conv1"]
    assert found.argmin() == 5
    assert (np.delete(found, 5) > found[5]).all()


@pytest.mark.parametrize("importance", MEASURES)
def test_scale_that_a_batch_norm_takes_back_changes_no_score(
    importance: Importance, trained: Source, digits: Path
) -> None:
    """The same function, written otherwise."""
    module = load_module(trained)
    other = copy.deepcopy(module)
    norm = other.layers[1].bn1
    with torch.no_grad():
        other.layers[1].conv1.weight[3] *= 50
        norm.running_mean[3] *= 50
        norm.running_var[3] = (norm.running_var[3] + norm.eps) * 2500 - norm.eps
    left, right = (scores(m, trained, digits, importance) for m in (module, other))
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=2e-3)


def test_scores_from_the_loss_need_labels_or_the_models_own_answer(
    trained: Source, digits: Path, tmp_path: Path
) -> None:
    """Without labels its likeliest class stands in; labels of another form are refused."""
    module = load_module(trained)
    found = scores(module, trained, unlabelled(digits, tmp_path), "fisher")
    assert all((value > 0).any() for value in found.values())
    bad = tmp_path / "bad"
    write_rows(bad / "training", Rows(digits / "training")[:48])
    write_rows(bad / "training_labels", ({"label": np.array(99)} for _ in range(48)))
    with pytest.raises(DataError, match="class 99 is not among its 10"):
        scores(module, trained, bad, "taylor")


# What makes up for the cut


def test_copies_of_channels_are_made_up_for_without_loss(
    source_of: Callable[[str], Source], digits: Path
) -> None:
    """Every other channel repeats the one before it, so half of them say all."""
    module = load_module(source_of("Plain"))
    with torch.no_grad():
        for layer in (module.conv1, module.fc1):
            layer.weight[1::2] = layer.weight[::2]
            layer.bias[1::2] = layer.bias[::2]
    chosen = config(source_of("Plain"), digits, samples=96)
    samples = samples_of(chosen)
    graph = find_channels(module, names=("x",), samples=samples, source="net")
    kept = {
        c.name: np.arange(c.width) % 2 == 0 for c in graph.couplings if c.name in {"conv1", "fc1"}
    }
    x = picture(digits)
    module.requires_grad_(requires_grad=False)
    errors = []
    for compensate in (False, True):
        plain = dataclasses.replace(chosen, compensate=compensate, reestimate=False)
        cut, notes = narrowing.narrowed(module, graph, kept=kept, samples=samples, config=plain)
        errors.append(float((cut(x) - module(x)).abs().max() / module(x).abs().max()))
    assert errors[0] > 0.1
    assert errors[1] < 0.02
    assert notes == ("weights of 2 layers were fitted to the channels that stay",)


def test_less_is_lost_with_what_makes_up_for_the_cut(
    trained: Source, digits: Path, tmp_path: Path
) -> None:
    """Each of the two, on samples that neither was fitted to."""
    chosen = config(trained, digits, samples=100)
    widths = uniform(read_structure(chosen, output=tmp_path).structure, ratio=0.75)
    losses = {}
    for compensate in (False, True):
        for reestimate in (False, True):
            made = narrow(
                dataclasses.replace(
                    chosen, widths=widths, compensate=compensate, reestimate=reestimate
                ),
                output=tmp_path,
            )
            losses[compensate, reestimate] = made.loss_after
            assert made.loss_samples == "validation"
    assert made.loss_before < 0.3
    assert losses[True, True] < losses[False, True] < losses[False, False]
    assert losses[True, True] < losses[True, False]
    assert losses[True, True] < 0.6 * losses[False, False]


def test_statistics_are_those_of_the_samples(networks: object) -> None:
    """Mean over batches; momentum, count and mode stay as they were."""
    module = networks.Plain().eval()
    batches = [torch.rand(8, 1, 8, 8) for _ in range(3)]
    reestimate_(module, run=lambda: sum(1 for x in batches if module(x) is not None))
    made = [module.conv2(torch.relu(module.conv1(x))) for x in batches]
    mean = torch.stack([m.mean((0, 2, 3)) for m in made]).mean(0)
    variance = torch.stack([m.var((0, 2, 3)) for m in made]).mean(0)
    assert torch.allclose(module.bn2.running_mean, mean, atol=1e-5)
    assert torch.allclose(module.bn2.running_var, variance, atol=1e-5)
    assert (module.bn2.momentum, module.bn2.training) == (0.1, False)
    assert int(module.bn2.num_batches_tracked) == 0


def test_statistics_of_single_samples_are_left(
    source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """One sample has no variance to go by."""
    chosen = config(source_of("Plain"), digits, samples=1, widths={"conv1": 8})
    made = narrow(chosen, output=tmp_path)
    assert "statistics of batch norms are the old ones: no two samples have one shape" in made.notes


# Settings and data that do not fit


@pytest.mark.parametrize(
    ("name", "width", "words"),
    [
        ("conv9", 8, r"unknown group of channels 'conv9'.*conv1"),
        ("fc2", 8, "unknown group of channels 'fc2'"),
        ("conv1", 6, r"has 16 channels and cannot get 6: 16, or .* multiple of 4"),
        ("conv1", 0, "cannot get 0"),
        ("conv1", -4, "cannot get -4"),
        ("conv1", 20, "cannot get 20"),
    ],
)
def test_widths_that_cannot_be(
    name: str, width: int, words: str, place: tuple[Source, Path], tmp_path: Path
) -> None:
    """Names and numbers are told; nothing is written."""
    error = UsageError if "unknown" in words else RecipeError
    with pytest.raises(error, match=words):
        narrow(config(*place, widths={name: width}), output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def place(source_of: Callable[[str], Source], digits: Path) -> tuple[Source, Path]:
    """A plain network, and data for it."""
    return source_of("Plain"), digits


def test_width_that_groups_do_not_divide(
    source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """The multiple is of both: of what was asked for and of the groups."""
    chosen = config(source_of("Grouped"), digits, multiple=6, widths={"a": 18})
    with pytest.raises(RecipeError, match=r"'a' has 32 channels and cannot get 18.* of 12"):
        narrow(chosen, output=tmp_path)
    found = read_structure(chosen, output=tmp_path)
    assert {g.name: g.multiple for g in found.structure.groups} == {"a": 12, "b": 6, "c": 6}


def test_model_without_anything_to_cut(
    source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """The reasons are told."""
    with pytest.raises(SourceError, match=r"(?s)none of its channels can be cut.*fc: .*output"):
        read_structure(config(source_of("Only"), digits), output=tmp_path)


def test_sources_whose_sizes_are_said_elsewhere(digits: Path, tmp_path: Path) -> None:
    """A config says those of transformers; programs and ONNX files cannot change."""
    for kind in ("transformers", "program", "onnx"):
        source = Source(kind=kind, name=f"some {kind}")  # type: ignore[arg-type]
        for stage in (read_structure, narrow):
            with pytest.raises(SourceError, match=f"some {kind}: .* kind '{kind}'"):
                stage(config(source, digits), output=tmp_path)


def test_data_without_the_inputs(
    source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """The name that is missing, and those that are there."""
    chosen = dataclasses.replace(config(source_of("Plain"), digits), names=("pixels",))
    with pytest.raises(DataError, match="x; the model takes pixels"):
        read_structure(chosen, output=tmp_path)
    with pytest.raises(DataError, match=r"rows\.json"):
        read_structure(config(source_of("Plain"), tmp_path), output=tmp_path)


def test_what_was_written_must_be_what_was_made(
    source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """One number less is found."""
    source = source_of("Plain")
    narrow(config(source, digits, widths={"conv1": 8}), output=tmp_path)
    module = load_module(parse_source(str(tmp_path / "model")))
    with torch.no_grad():
        module.fc2.bias[3] += 1e-3
    with pytest.raises(ParityError, match="output 'output' is another after loading"):
        require_same_when_loaded(
            module, tmp_path / "model", samples=samples_of(config(source, digits)), task=""
        )


@pytest.mark.parametrize("ratio", [0, -1, 1.5])
def test_share_out_of_range(ratio: float) -> None:
    """Names the number."""
    with pytest.raises(UsageError, match=f"ratio {ratio}"):
        uniform(Structure(groups=(), layers=()), ratio=ratio)


def test_uniform_widths_are_the_nearest_multiples() -> None:
    """At least one; all is allowed too, whether or not it is a multiple."""
    widths = [10, 12, 8, 64]
    groups = tuple(Group(name=str(w), width=w, multiple=8, scores=(0.0,) * w) for w in widths)
    found = uniform(Structure(groups=groups, layers=()), ratio=0.5)
    assert found == {"10": 8, "12": 8, "8": 8, "64": 32}
    every = uniform(Structure(groups=groups, layers=()), ratio=1)
    assert every == {"10": 10, "12": 12, "8": 8, "64": 64}


def test_multiple_below_one(
    source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """Names the number."""
    with pytest.raises(UsageError, match="multiple 0 has to be at least 1"):
        read_structure(config(source_of("Plain"), digits, multiple=0), output=tmp_path)


# What is left is a source like any other


def test_narrower_network_is_exported(trained: Source, digits: Path, tmp_path: Path) -> None:
    """Proved against the module of the directory, by an exporter's own process."""
    narrow(config(trained, digits, widths={"stem": 8, "layers.1.conv1": 16}), output=tmp_path)
    source = parse_source(str(tmp_path / "model"))
    made = tmp_path / "exported"
    made.mkdir()
    record = export(
        ExportConfig(
            source=source,
            samples=digits / "validation",
            inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 1, 8, 8)),),
            exporter="torchscript",
        ),
        output=made,
    )
    assert [spec.shape for spec in record.verified.outputs] == [("batch", 10)]
    onnx = pytest.importorskip("onnx")
    shapes = [list(i.dims) for i in onnx.load(made / "model.onnx").graph.initializer]
    assert [8, 1, 3, 3] in shapes
    assert [16, 8, 3, 3] in shapes


def test_same_source_makes_the_same_files(
    source_of: Callable[[str], Source], digits: Path, tmp_path: Path
) -> None:
    """A stage whose result is kept must not depend on the day."""
    chosen = config(source_of("Mobile"), digits, widths={"stem": 8}, importance="taylor")
    for place in ("one", "two"):
        narrow(chosen, output=tmp_path / place)
    one, two = (
        {f.name: f.read_bytes() for f in (tmp_path / place / "model").iterdir()}
        for place in ("one", "two")
    )
    assert one == two


def test_reading_needs_only_the_config_as_json(
    source_of: Callable[[str], Source], digits: Path
) -> None:
    """Stages get their settings across a process."""
    from equipoise import record

    chosen = config(source_of("Plain"), digits, widths={"conv1": 8})
    assert record.loads(NarrowConfig, record.dumps(chosen), where="x") == chosen
    plain = ChannelsConfig(source=chosen.source, data=digits, names=("x",))
    assert record.loads(ChannelsConfig, record.dumps(plain), where="x") == plain
