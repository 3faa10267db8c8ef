"""The stages that look at a transformer before anything is cut: widths, operators, layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise import progress
from equipoise.compress.importance import Importance
from equipoise.compress.samples import Samples, read_samples
from equipoise.compress.structure import Structure
from equipoise.compress.transformer.axes import layers_prefix
from equipoise.compress.transformer.proof import proven_axes
from equipoise.compress.transformer.reduce import open_transformer
from equipoise.compress.transformer.scores import block_influence, passed_over, unit_scores
from equipoise.compress.transformer.shapes import TransformerShape, read_shape
from equipoise.compress.transformer.structure import transformer_structure
from equipoise.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """What to look at.

    Attributes:
        source: The model.
        data: Directory with ``training`` rows and, where there are labels, ``training_labels``.
        names: Inputs of the model.
        importance: What makes a channel important.
        samples: Most training samples that are scored on.
        sequence: Positions of an input whose latency counts.
    """

    source: Source
    data: Path
    names: tuple[str, ...]
    sequence: int
    importance: Importance = "taylor"
    samples: int = 128


@dataclass(frozen=True, kw_only=True)
class TransformerReading:
    """What can be cut of a transformer.

    Attributes:
        structure: Groups ``intermediate``, ``heads`` and ``hidden``, and operators.
        shape: Its sizes.
        head_size: Features of a head.
        coupled: Whether heads go with the hidden width.
        refused: Width -> why it cannot be cut.
    """

    structure: Structure
    shape: TransformerShape
    head_size: int
    coupled: bool
    refused: dict[str, str]


def read_transformer(config: ReadConfig, *, output: Path) -> TransformerReading:  # noqa: ARG001
    """Look at the widths of a transformer; ``output`` stays empty, the record has it all.

    Raises:
        SourceError: The source is no transformers model that can be cut.
        DataError: The samples do not fit the model.
    """
    module = open_transformer(config.source)
    samples = _samples(config)
    axes = proven_axes(module, inputs=samples.first())
    losses = samples.losses(module, name=config.source.name)
    scores = unit_scores(module, config.importance, axes=axes, losses=losses)
    structure = transformer_structure(
        module, axes, scores=scores, sequence=config.sequence, inputs=samples.first()
    )
    return TransformerReading(
        structure=structure,
        shape=axes.shape,
        head_size=axes.head_size,
        coupled=axes.coupled,
        refused=dict(axes.refused),
    )


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """Whose layers to look at.

    Attributes:
        source: The model.
        data: Directory with ``training`` rows and, where there are labels, ``training_labels``.
        names: Inputs of the model.
        samples: Most training samples that the loss is measured on.
    """

    source: Source
    data: Path
    names: tuple[str, ...]
    samples: int = 64


@dataclass(frozen=True, kw_only=True)
class LayersRecord:
    """Which layers can go.

    Attributes:
        shape: Sizes of the model.
        dispensable: Layers in the order in which they can best be left out, all but one: each the
            one whose absence costs least when those before it are gone already. Empty where the
            layers share their weights.
    """

    shape: TransformerShape
    dispensable: tuple[int, ...]


def read_layers(config: LayersConfig, *, output: Path) -> LayersRecord:  # noqa: ARG001
    """Look at the layers of a transformer; ``output`` stays empty. Raises as above."""
    module = open_transformer(config.source)
    prefix = layers_prefix(module)
    order = _order(module, _samples(config), prefix=prefix, name=config.source.name)
    return LayersRecord(shape=read_shape(module.config), dispensable=order)


def _samples(config: ReadConfig | LayersConfig) -> Samples:
    return read_samples(
        config.data,
        part="training",
        names=config.names,
        task=config.source.task,
        count=config.samples,
    )


def _order(module: Any, samples: Samples, *, prefix: str, name: str) -> tuple[int, ...]:
    """Greedy by the loss where labels say what is right; by how much a layer turns states else."""
    if not prefix:
        return ()
    if samples.mean_loss(module, name=name) is None:
        scores = block_influence(module, prefix=prefix, run=samples.run(module, name=name))
        return tuple(sorted(range(len(scores)), key=lambda index: scores[index])[:-1])
    return _greedy(module, prefix=prefix, loss=lambda: samples.mean_loss(module, name=name) or 0.0)


def _greedy(module: Any, *, prefix: str, loss: Callable[[], float]) -> tuple[int, ...]:
    layers = list(module.get_submodule(prefix))
    gone: list[int] = []
    for _ in progress.track(range(len(layers) - 1), total=len(layers) - 1):
        left = [index for index in range(len(layers)) if index not in gone]
        costs = {index: _without([layers[i] for i in (*gone, index)], loss) for index in left}
        gone.append(min(left, key=lambda index: costs[index]))
    return tuple(gone)


def _without(layers: list[Any], loss: Callable[[], float]) -> float:
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(passed_over(layer))
        return loss()
