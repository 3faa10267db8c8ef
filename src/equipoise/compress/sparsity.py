"""The stage that sets weights to zero and leaves all sizes as they are.

    <output>/model    a source of the same sizes

Few runtimes gain from it: TensorRT has kernels for two zeros in every four weights along the input
channels of linear layers and convolutions, at each position of a kernel; zeros anywhere else are
multiplied like any other number. Whether the target gains is measured by whoever asks for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from equipoise import extras
from equipoise.compress.channels.narrow import require_same_when_loaded
from equipoise.compress.importance import is_layer, is_transposed, mean_squares, spread_over
from equipoise.compress.samples import Samples, read_samples
from equipoise.errors import DataError, SourceError, UsageError
from equipoise.sources.saving import save_source
from equipoise.sources.source import Source
from equipoise.sources.torch_model import load_module

MODEL: Final = "model"
_GROUP: Final = 4
_ZEROS: Final = 2


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """What to set to zero.

    Attributes:
        source: The model.
        data: Directory with ``training`` rows and, where there are labels, ``training_labels``.
        names: Inputs of the model.
        pattern: ``2:4``: the lesser two of every four weights along the inputs. ``unstructured``:
            the least of each layer, wherever they are.
        share: Of the weights of each layer that become zero; of ``unstructured`` alone.
        importance: ``magnitude`` of the weight, or that times the root mean square of its input
            over samples (Wanda: Sun, Liu, Bair, Kolter 2024, equation 1).
        samples: Most samples that inputs are seen on.
    """

    source: Source
    data: Path
    names: tuple[str, ...]
    pattern: Literal["2:4", "unstructured"] = "2:4"
    share: float = 0.5
    importance: Literal["magnitude", "activation"] = "activation"
    samples: int = 64


@dataclass(frozen=True, kw_only=True)
class SparsifyRecord:
    """What came of it.

    Attributes:
        layers: Names of the layers that have zeros now.
        zeros: Weights of theirs that are zero.
        weights: Weights of theirs.
        parameters: Numbers in all weights of the model.
        loss_before: Mean loss of the task; None without labels.
        loss_after: The same of the result, before any training.
        loss_samples: The part of the data that it was measured on; empty when it was not.
        notes: Layers that were left as they are, and why.
    """

    layers: tuple[str, ...]
    zeros: int
    weights: int
    parameters: int
    loss_before: float | None
    loss_after: float | None
    loss_samples: str
    notes: tuple[str, ...]


def sparsify(config: SparsifyConfig, *, output: Path) -> SparsifyRecord:
    """Set weights to zero and leave the model in ``output/model``.

    Raises:
        UsageError: ``share`` is out of range.
        SourceError: No layer can have the pattern.
        DataError: The data has not got the model's inputs.
        ParityError: What was written does not give the outputs of what was made.
        OutputError: ``output`` cannot be written.
    """
    if not 0 < config.share < 1:
        raise UsageError(f"share {config.share} has to lie between 0 and 1")
    module = load_module(config.source)
    samples = _samples(config, part="training")
    sparse = copy.deepcopy(module)
    masks, notes = sparsity_masks(sparse, config=config, samples=samples)
    zero_(sparse, masks)
    save_source(sparse, base=config.source, directory=output / MODEL)
    require_same_when_loaded(sparse, output / MODEL, samples=samples, task=config.source.task)
    part = "validation" if (config.data / "validation").is_dir() else "training"
    judged = _samples(config, part=part)
    before, after = (judged.mean_loss(m, name=config.source.name) for m in (module, sparse))
    return SparsifyRecord(
        layers=tuple(masks),
        zeros=sum(int((sparse.get_submodule(n).weight == 0).sum()) for n in masks),
        weights=sum(mask.numel() for mask in masks.values()),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        loss_before=before,
        loss_after=after,
        loss_samples=part if before is not None else "",
        notes=notes,
    )


def _samples(config: SparsifyConfig, *, part: str) -> Samples:
    return read_samples(
        config.data,
        part=part,
        names=config.names,
        task=config.source.task,
        count=config.samples,
    )


def zero_(module: Any, masks: dict[str, Any]) -> None:
    """Set the weights of layers to zero where their mask is false. In place.

    Args:
        module: The module.
        masks: Layer -> bool of the shape of its weight. Training has to set them again after every
            step if the zeros are to stay.
    """
    torch = extras.require("torch")
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_submodule(name).weight.mul_(mask)


def sparsity_masks(
    module: Any, *, config: SparsifyConfig, samples: Samples
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Which weights stay, and notes on layers without the pattern.

    Raises:
        SourceError: No layer can have it.
    """
    score = _scores(module, config=config, samples=samples)
    masks: dict[str, Any] = {}
    notes = []
    for name, layer in _layers(module):
        inputs = layer.weight.shape[0 if is_transposed(layer) else 1]
        if config.pattern == "2:4" and inputs % _GROUP:
            notes.append(f"{name}: {inputs} inputs (of a group) do not divide by {_GROUP}")
        else:
            masks[name] = _mask(layer, score(name, layer), config=config)
    if not masks:
        raise SourceError(
            "\n  ".join([f"{config.source.name}: no layer can be {config.pattern} sparse:", *notes])
        )
    return masks, tuple(notes)


def _layers(module: Any) -> Iterator[tuple[str, Any]]:
    """Layers by name, each once, but those whose weight is also an embedding's."""
    torch = extras.require("torch")
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    for name, layer in module.named_modules():
        if is_layer(layer) and id(layer.weight) not in embedded:
            yield name, layer


def _scores(module: Any, *, config: SparsifyConfig, samples: Samples) -> Callable[[str, Any], Any]:
    """A function that scores every weight of a layer, in the shape of the weight."""
    if config.importance == "magnitude":
        return lambda _, layer: layer.weight.detach().abs().double()
    squares = mean_squares(module, samples.run(module, name=config.source.name))

    def score(name: str, layer: Any) -> Any:
        weight = layer.weight.detach().double()
        if name not in squares:
            raise DataError(f"layer {name!r} is never run by the samples, so it has no inputs")
        return weight.abs() * spread_over(layer, squares[name].sqrt(), weight=weight)

    return score


def _mask(layer: Any, scores: Any, *, config: SparsifyConfig) -> Any:
    """What stays: bool of the shape of the weight."""
    if config.pattern == "unstructured":
        return _largest(scores.flatten(), 1 - config.share).reshape(scores.shape)
    inputs = 0 if is_transposed(layer) else 1
    last = scores.movedim(inputs, -1)
    fours = last.reshape(-1, _GROUP)
    order = fours.argsort(dim=1, descending=True, stable=True)
    kept = fours.new_zeros(fours.shape, dtype=extras.require("torch").bool)
    kept.scatter_(1, order[:, : _GROUP - _ZEROS], value=True)
    return kept.reshape(last.shape).movedim(-1, inputs)


def _largest(scores: Any, share: float) -> Any:
    """The largest ``share`` of the scores, of equal ones the first: bool [scores]."""
    torch = extras.require("torch")
    kept = torch.zeros(len(scores), dtype=torch.bool)
    order = scores.argsort(descending=True, stable=True)
    kept[order[: math.ceil(share * len(scores))]] = True
    return kept
