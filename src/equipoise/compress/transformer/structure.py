"""A transformer as the widths and operators that a table of latencies knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from equipoise import extras
from equipoise.compress.importance import input_rows, is_layer, is_transposed
from equipoise.compress.structure import Group, Layer, LayerShape, Structure
from equipoise.compress.transformer.attention import sample_inputs
from equipoise.compress.transformer.axes import Axis, AxisMap, layer_of
from equipoise.compress.transformer.scores import UnitScores
from equipoise.compress.transformer.shapes import TransformerShape
from equipoise.errors import DataError

_HEADS: Final = ("heads", "key_value_heads")


def transformer_structure(
    module: Any,
    axes: AxisMap,
    *,
    scores: UnitScores,
    sequence: int,
    inputs: Mapping[str, Any] | None = None,
) -> Structure:
    """The groups ``intermediate``, ``heads`` and ``hidden`` of a transformer, and its operators.

    Heads that share keys and values are one channel of ``heads``, which goes with all that it
    serves. Where the hidden width is the heads times the size of a head (BERT) there is no group
    ``heads``: attention follows ``hidden``, whose multiple is then the size of a head. Layers are
    linear layers and attention, as they run; embeddings and convolutions are not among them.

    Args:
        module: A transformers model.
        axes: Its axes.
        scores: Importance of its channels.
        sequence: Positions of an input.
        inputs: What the model runs on; made up for text and pictures when None.

    Raises:
        DataError: ``sequence`` is not positive.
        SourceError: There is nothing to run the model on.
    """
    if sequence < 1:
        raise DataError(f"sequence {sequence}: an input has at least 1 position")
    feeds = sample_inputs(module) if inputs is None else inputs
    follows = {(a.tensor, a.axis): a for a in axes.axes if not a.offset}
    layers: list[Layer] = []
    for name, rows in _calls(module, feeds):
        layer = module.get_submodule(name)
        positions = 1 if rows == 1 else sequence
        layers += _operators(name, layer, axes=axes, follows=follows, positions=positions)
    return Structure(groups=tuple(_groups(axes, scores)), layers=tuple(layers))


def widened(
    shape: TransformerShape, axes: AxisMap, *, widths: Mapping[str, int]
) -> TransformerShape:
    """``shape`` with the ``widths`` of groups, as :func:`transformer_structure` names them."""
    each = axes.shape.heads // axes.shape.key_value_heads
    groups = widths.get("heads", shape.key_value_heads)
    hidden = widths.get("hidden", shape.hidden)
    if axes.coupled:
        groups = hidden // axes.head_size // each
    return replace(
        shape,
        intermediate=widths.get("intermediate", shape.intermediate),
        heads=groups * (shape.heads // shape.key_value_heads),
        key_value_heads=groups,
        hidden=hidden,
    )


def _calls(module: Any, feeds: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The linear layers as they run, with the positions that each runs on."""
    torch = extras.require("torch")
    found: list[tuple[str, int]] = []

    def hook(name: str) -> Callable[..., None]:
        def add(layer: Any, inputs: tuple[Any, ...]) -> None:
            found.append((name, len(input_rows(layer, inputs[0]))))

        return add

    handles = [
        layer.register_forward_pre_hook(hook(name))
        for name, layer in module.named_modules()
        if is_layer(layer) and not hasattr(layer, "kernel_size")
    ]
    try:
        with torch.no_grad():
            module(**feeds)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _operators(
    name: str,
    layer: Any,
    *,
    axes: AxisMap,
    follows: Mapping[tuple[str, int], Axis],
    positions: int,
) -> Iterator[Layer]:
    """A linear layer, after the attention where its inputs are heads."""
    weight = f"{name}.weight"
    sides = (0, 1) if is_transposed(layer) else (1, 0)
    inputs, outputs = (int(layer.weight.shape[side]) for side in sides)
    read, made = (follows.get((weight, side)) for side in sides)
    block = layer_of(weight, axes.prefix)
    if read is not None and read.width == "heads":
        yield _attention(name, inputs=inputs, axes=axes, positions=positions, block=block)
    input_group, input_factor = _group(read, inputs, axes)
    output_group, output_factor = _group(made, outputs, axes)
    yield Layer(
        name=name,
        shape=LayerShape(kind="linear", inputs=inputs, outputs=outputs, size=(positions,)),
        input_group=input_group,
        output_group=output_group,
        input_factor=input_factor,
        output_factor=output_factor,
        block=block,
    )


def _group(axis: Axis | None, size: int, axes: AxisMap) -> tuple[str, int]:
    """The group that an axis of ``size`` follows, and its indices per channel of that."""
    if axis is None:
        return "", 1
    name = str(axis.width)
    if name in _HEADS:
        name = "hidden" if axes.coupled else "heads"
    return name, size // _width(name, axes)


def _width(group: str, axes: AxisMap) -> int:
    shape = axes.shape
    widths = {"heads": shape.key_value_heads, "hidden": shape.hidden}
    return widths.get(group, shape.intermediate)


def _attention(name: str, *, inputs: int, axes: AxisMap, positions: int, block: int) -> Layer:
    group = "hidden" if axes.coupled else "heads"
    factor = inputs // _width(group, axes)
    return Layer(
        name=f"{name}:attention",
        shape=LayerShape(
            kind="attention",
            inputs=inputs,
            outputs=inputs,
            size=(positions,),
            groups=axes.shape.heads,
        ),
        input_group=group,
        output_group=group,
        input_factor=factor,
        output_factor=factor,
        block=block,
    )


def _groups(axes: AxisMap, scores: UnitScores) -> Iterator[Group]:
    """The widths that can be cut, most important channels first.

    Layers keep different channels, so the k-th score of a group is the sum over layers of each
    one's k-th best.
    """
    ranked = {name: _ranked(scores, name, axes) for name in ("intermediate", "heads", "hidden")}
    if axes.coupled and ranked["hidden"] and ranked["heads"]:
        spread = [
            score / axes.head_size for score in ranked["heads"] for _ in range(axes.head_size)
        ]
        ranked["hidden"] = [a + b for a, b in zip(ranked["hidden"], spread, strict=True)]
    for name, values in ranked.items():
        if not values or name in axes.refused or (name == "heads" and axes.coupled):
            continue
        multiple = axes.head_size if name == "hidden" and axes.coupled else 1
        yield Group(name=name, width=len(values), multiple=multiple, scores=tuple(values))


def _ranked(scores: UnitScores, name: str, axes: AxisMap) -> list[float]:
    total: Any = None
    for (width, layer), own in scores.items():
        if width == name:
            values = own
            if name == "heads":
                values = own.reshape(axes.shape.key_value_heads, -1).sum(1)
                values = values + scores.get(("key_value_heads", layer), 0)
            ordered = values.sort(descending=True).values
            total = ordered if total is None else total + ordered
    return [] if total is None else [float(value) for value in total]
