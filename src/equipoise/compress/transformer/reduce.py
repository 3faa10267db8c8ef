"""The stage that makes a transformers model smaller: one cut, no training.

<output>/model    a transformers directory, which plain transformers loads
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equipoise import extras
from equipoise.compress.cut_record import CutRecord
from equipoise.compress.importance import FROM_SAMPLES, Importance
from equipoise.compress.samples import Samples, read_samples
from equipoise.compress.transformer.attention import sample_inputs
from equipoise.compress.transformer.axes import AxisMap, require_cuttable
from equipoise.compress.transformer.cut import cut_tensors, reduce_module
from equipoise.compress.transformer.proof import proven_axes
from equipoise.compress.transformer.refit import refitted
from equipoise.compress.transformer.scores import choose_channels, unit_scores
from equipoise.compress.transformer.shapes import TransformerShape, read_shape, require_fits
from equipoise.errors import BackendError, DataError, SourceError
from equipoise.sources.saving import save_source
from equipoise.sources.source import Source, parse_source
from equipoise.sources.torch_model import load_module, named_outputs

MODEL: Final = "model"
_RELOADED: Final = 1e-4
"""Largest difference over largest output between the model and what is loaded from its files."""


@dataclass(frozen=True, kw_only=True)
class ReduceConfig:
    """What to cut a transformer to.

    Attributes:
        source: The model.
        shape: The sizes to cut it to; ``shapes.read_shape`` of its config has those it has.
        importance: What decides which heads, units and hidden channels go.
        data: Directory with ``training`` rows and, where there are labels, ``training_labels``;
            ``validation`` where the loss is to be measured on other samples. Without it only
            ``l1`` and ``l2`` can be used, and nothing is refitted.
        names: Inputs of the model.
        samples: Most training samples that are scored and refitted on.
        refit: Let what is kept make up for what is cut, by least squares on the samples.
    """

    source: Source
    shape: TransformerShape
    importance: Importance = "taylor"
    data: Path | None = None
    names: tuple[str, ...] = ()
    samples: int = 128
    refit: bool = True


@dataclass(frozen=True, kw_only=True)
class ReduceRecord(CutRecord):
    """What came of it.

    Attributes:
        shape_before: Sizes.
        shape_after: Sizes; its layers have new numbers.
    """

    shape_before: TransformerShape
    shape_after: TransformerShape


def reduce_transformer(config: ReduceConfig, *, output: Path) -> ReduceRecord:
    """Cut a transformer to a shape and leave it in ``output/model``.

    Raises:
        SourceError: The source is no transformers model that can be cut.
        RecipeError: The shape cannot be cut out of it, with the reason.
        DataError: The importance needs samples and there are none, or they do not fit the model.
        OutputError: ``output`` cannot be written.
    """
    module = open_transformer(config.source)
    require_fits(module.config, config.shape)
    samples = _samples(config)
    axes = proven_axes(module, inputs=samples.first() if samples else None)
    require_cuttable(axes, config.shape)
    smaller, notes = _reduced(module, axes, config=config, samples=samples)
    save_source(smaller, base=config.source, directory=output / MODEL)
    feeds = _feeds(module, samples)
    require_same_when_loaded(smaller, output / MODEL, task=config.source.task, feeds=feeds)
    return _record(config, module=module, smaller=smaller, notes=notes)


def open_transformer(source: Source) -> Any:
    """The transformers model of ``source``, whole, with its weights.

    Raises:
        SourceError: It is none, or its task shows only a part of it.
    """
    transformers = extras.require("transformers")
    if source.kind != "transformers":
        raise SourceError(
            f"{source.name} is no transformers directory, so no config says its sizes",
            hint="Other modules are pruned channel by channel.",
        )
    module = load_module(source)
    if not isinstance(module, transformers.PreTrainedModel):
        raise SourceError(
            f"{source.name}: the task {source.task!r} shows a part of the model only",
            hint="Choose a --task that takes the whole model.",
        )
    return module


def _samples(config: ReduceConfig) -> Samples | None:
    if config.data is None:
        if config.importance in FROM_SAMPLES:
            raise DataError(
                f"importance {config.importance!r} is measured on samples, and there is no data",
                hint="Give data, or use 'l1' or 'l2', which look at the weights alone.",
            )
        return None
    return _part(config, config.data, part="training")


def _part(config: ReduceConfig, data: Path, *, part: str) -> Samples:
    return read_samples(
        data, part=part, names=config.names, task=config.source.task, count=config.samples
    )


def _reduced(
    module: Any, axes: AxisMap, *, config: ReduceConfig, samples: Samples | None
) -> tuple[Any, list[str]]:
    """The smaller model, and what is to be said about it."""
    shape = config.shape
    if shape.layers != axes.shape.layers:
        module = _with_layers(module, axes, shape.layers)
        axes = proven_axes(module, inputs=samples.first() if samples else None)
        shape = dataclasses.replace(shape, layers=axes.shape.layers)
    if shape == axes.shape:
        return module, []
    name = config.source.name
    losses = samples.losses(module, name=name) if samples else ()
    scores = unit_scores(module, config.importance, axes=axes, losses=losses)
    kept = choose_channels(scores, axes, shape=shape)
    plain = reduce_module(module, axes, shape=shape, kept=kept)
    if not config.refit or samples is None:
        return plain, ["nothing was refitted: that needs data"] if config.refit else []
    tensors = refitted(module, axes, kept=kept, run=samples.run(module, name=name))
    better = cut_tensors(module, axes, tensors=tensors, shape=shape, kept=kept)
    return _better(plain, better, samples=samples, name=name)


def _with_layers(module: Any, axes: AxisMap, layers: tuple[int, ...]) -> Any:
    """Layers go first: what is left is scored and refitted as it will be."""
    shape = dataclasses.replace(axes.shape, layers=layers)
    return reduce_module(module, axes, shape=shape, kept={})


def _better(plain: Any, refit: Any, *, samples: Samples, name: str) -> tuple[Any, list[str]]:
    """The refitted model, unless the loss of the samples says otherwise."""
    before, after = (samples.mean_loss(model, name=name) for model in (plain, refit))
    if before is None or after is None or after <= before:
        return refit, []
    note = (
        f"refitting was tried and not kept: the loss of the training samples is {before:.4g}"
        f" without it and {after:.4g} with it"
    )
    return plain, [note]


def _feeds(module: Any, samples: Samples | None) -> dict[str, Any]:
    return samples.first() if samples else sample_inputs(module)


def require_same_when_loaded(
    module: Any, directory: Path, *, task: str, feeds: dict[str, Any]
) -> None:
    """Load what was written and compare its outputs with those of the model that was written.

    Raises:
        BackendError: They differ: transformers does not give back what it saved.
        SourceError: It cannot be loaded.
    """
    torch = extras.require("torch")
    loaded = load_module(parse_source(str(directory), task=task))
    with torch.no_grad():
        before, after = (named_outputs(model(**feeds)) for model in (module, loaded))
    for name, value in before.items():
        scale = float(value.abs().max()) or 1.0
        worst = float((value - after[name]).abs().max()) / scale
        if not worst <= _RELOADED:
            raise BackendError(
                f"{directory}: output {name!r} is another after loading, by {worst:.2g} of its"
                " largest value"
            )


def _record(config: ReduceConfig, *, module: Any, smaller: Any, notes: list[str]) -> ReduceRecord:
    before, after = read_shape(module.config), read_shape(smaller.config)
    part, samples = _judging(config)
    name = config.source.name
    return ReduceRecord(
        parameters_before=count_parameters(module),
        parameters_after=count_parameters(smaller),
        shape_before=before,
        shape_after=after,
        loss_before=samples.mean_loss(module, name=name) if samples else None,
        loss_after=samples.mean_loss(smaller, name=name) if samples else None,
        loss_samples=part if samples and samples.labels is not None else "",
        notes=(*notes, *_notes(config, before)),
    )


def count_parameters(module: Any) -> int:
    """Numbers in the weights, each once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _judging(config: ReduceConfig) -> tuple[str, Samples | None]:
    """The samples that the loss is measured on: those that nothing was fitted to, where any are."""
    if config.data is None:
        return "", None
    part = "validation" if (config.data / "validation").is_dir() else "training"
    return part, _part(config, config.data, part=part)


def _notes(config: ReduceConfig, before: TransformerShape) -> list[str]:
    if config.shape.hidden != before.hidden and "embedding" in config.source.task:
        return [f"embeddings are {config.shape.hidden} wide, before {before.hidden}"]
    return []
