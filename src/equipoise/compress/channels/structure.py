"""The channels of a module as groups and layers that a table of latencies knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.compress.channels.calls import is_depthwise, layer_shape, total_macs
from equipoise.compress.channels.coupling import Coupling, Member
from equipoise.compress.channels.graph import Graph, read_graph
from equipoise.compress.channels.heads import attention_layers, head_couplings, with_heads
from equipoise.compress.channels.scoring import channel_scores
from equipoise.compress.channels.verifying import verified
from equipoise.compress.importance import FROM_SAMPLES, Importance
from equipoise.compress.samples import Samples, read_samples
from equipoise.compress.structure import Group, Layer, Structure
from equipoise.errors import SourceError, UsageError
from equipoise.sources.source import Source
from equipoise.sources.torch_model import load_module
from equipoise.spec import Array


@dataclass(frozen=True, kw_only=True)
class ChannelsConfig:
    """What to look for.

    Attributes:
        source: The model.
        data: Directory with ``training`` rows and, where there are labels, ``training_labels``.
        names: Inputs of the model.
        importance: What the scores measure.
        samples: Most samples that are scored on.
        multiple: Widths must be multiples of it.
    """

    source: Source
    data: Path
    names: tuple[str, ...]
    importance: Importance = "l2"
    samples: int = 64
    multiple: int = 8


@dataclass(frozen=True, kw_only=True)
class ChannelsRecord:
    """What can be cut.

    Attributes:
        structure: Groups and layers.
        parameters: Numbers in the weights.
        macs: Multiplications of convolutions and linear layers on one sample.
        notes: What cannot be cut, and why.
    """

    structure: Structure
    parameters: int
    macs: int
    notes: tuple[str, ...]


def read_structure(config: ChannelsConfig, *, output: Path) -> ChannelsRecord:
    """Find what of a model can be made narrower, and score it. Writes nothing.

    Raises:
        SourceError: The model does not run on the samples, or its graph cannot be followed.
        DataError: The data has not got its inputs, or the labels do not fit.
    """
    del output
    module = open_to_cut(config.source)
    samples = samples_of(config)
    graph = find_channels(module, names=config.names, samples=samples, source=config.source.name)
    scores = scores_of(module, graph, samples=samples, config=config)
    return ChannelsRecord(
        structure=structure_of(module, graph, scores=scores, multiple=config.multiple),
        parameters=count_parameters(module),
        macs=total_macs(graph.calls),
        notes=(*graph.notes, *joined_notes(graph)),
    )


def open_to_cut(source: Source) -> Any:
    """The module of a source whose layers say their own sizes.

    Raises:
        SourceError: It is of another kind.
    """
    if source.kind not in {"factory", "timm", "derived"}:
        raise SourceError(
            f"{source.name}: channels are cut of a module: or timm: source, or of what was cut"
            f" before; this is of kind {source.kind!r}",
            hint="A transformers model is made smaller by the sizes in its config; the sizes of a"
            " .pt2 program or .onnx file are fixed.",
        )
    return load_module(source)


def samples_of(config: ChannelsConfig, *, part: str = "training") -> Samples:
    """The samples of a part of the data. Raises DataError as ``read_samples``."""
    return read_samples(
        config.data,
        part=part,
        names=config.names,
        task=config.source.task,
        count=config.samples,
    )


def find_channels(module: Any, *, names: Sequence[str], samples: Samples, source: str) -> Graph:
    """The couplings of ``module`` that were seen to hold, and its layers.

    Args:
        module: In evaluation mode. It is not changed.
        names: Of its inputs.
        samples: The first of them is run.
        source: For messages.

    Raises:
        SourceError: The module does not run, its graph cannot be followed, or nothing can be cut.
    """
    tensors = list(samples.first().values())
    graph = read_graph(module, names=names, tensors=tensors, source=source)
    every = with_heads(graph.couplings, head_couplings(module))
    couplings, notes = verified(module, every, names=names, tensors=tensors)
    notes = (*graph.notes, *notes)
    if not couplings:
        raise SourceError(
            "\n  ".join([f"{source}: none of its channels can be cut:", *notes]),
            hint="Such a model can be distilled or fine-tuned, but not made narrower.",
        )
    return Graph(couplings=couplings, calls=graph.calls, norms=graph.norms, notes=notes)


def scores_of(
    module: Any, graph: Graph, *, samples: Samples, config: ChannelsConfig
) -> dict[str, Array]:
    """Name of each group -> float64 [width]. Raises DataError when labels do not fit."""
    needed = config.importance in FROM_SAMPLES

    def losses(model: Any) -> Iterable[Any]:
        return samples.losses(model, name=config.source.name) if needed else ()

    return channel_scores(
        module, graph.couplings, importance=config.importance, norms=graph.norms, losses=losses
    )


def count_parameters(module: Any) -> int:
    """Numbers in the weights, each once."""
    return sum(parameter.numel() for parameter in module.parameters())


def structure_of(
    module: Any, graph: Graph, *, scores: Mapping[str, Array], multiple: int
) -> Structure:
    """Groups and layers, as the table of latencies and the choice of widths take them.

    Raises:
        UsageError: ``multiple`` is less than 1.
    """
    if multiple < 1:
        raise UsageError(f"multiple {multiple} has to be at least 1")
    groups = tuple(
        Group(
            name=coupling.name,
            width=coupling.width,
            multiple=coupling.step(multiple),
            scores=tuple(scores[coupling.name].tolist()),
        )
        for coupling in graph.couplings
    )
    sides = _sides(graph.couplings)
    layers = []
    for call in graph.calls:
        layer = module.get_submodule(call.name)
        if getattr(layer, "transposed", False):
            continue  # no operator of a table; its multiplications are counted all the same
        both = sides.get((call.name, "depthwise"))
        read, made = (both or sides.get((call.name, side)) for side in ("inputs", "outputs"))
        layers.append(
            Layer(
                name=call.name,
                shape=layer_shape(layer, call),
                input_group=read[0] if read else "",
                output_group=made[0] if made else "",
                input_factor=read[1] if read else 1,
                output_factor=made[1] if made else 1,
                depthwise=is_depthwise(layer),
            )
        )
    return Structure(groups=groups, layers=tuple(attention_layers(graph.couplings, layers)))


def _sides(couplings: Sequence[Coupling]) -> dict[tuple[str, str], tuple[str, int]]:
    """Layer and side -> the one group that it follows, and indices per channel."""
    return {
        (member.module, member.role): (coupling.name, factor)
        for coupling in couplings
        for member in coupling.members
        if (factor := _factor(member)) is not None
    }


def _factor(member: Member) -> int | None:
    """Indices per channel; None when the axis belongs to this coupling in part only."""
    counts = set(Counter(member.channels).values())
    return counts.pop() if member.whole() and len(counts) == 1 else None


def joined_notes(graph: Graph) -> tuple[str, ...]:
    """Layers behind a concatenation, whose saving a table of layers cannot count."""
    partly = {
        member.module
        for coupling in graph.couplings
        for member in coupling.members
        if member.role in {"inputs", "outputs"} and not member.whole()
    }
    return tuple(
        f"{name}: follows several groups; what it saves is not in the plan"
        for name in sorted(partly)
    )


def uniform(structure: Structure, *, ratio: float) -> dict[str, int]:
    """Widths that keep about ``ratio`` of every group: the nearest that it may have.

    Args:
        structure: The groups.
        ratio: Share that is kept, above 0 and at most 1.

    Raises:
        UsageError: ``ratio`` is out of range.
    """
    if not 0 < ratio <= 1:
        raise UsageError(f"ratio {ratio} has to be above 0 and at most 1")
    return {group.name: _nearest(group, ratio) for group in structure.groups}


def _nearest(group: Group, ratio: float) -> int:
    allowed: list[int] = [*range(group.multiple, group.width, group.multiple), group.width]
    distances = {width: abs(width - ratio * group.width) for width in reversed(allowed)}
    return min(distances, key=distances.__getitem__)
