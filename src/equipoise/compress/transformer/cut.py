"""Cutting a transformers model to the channels and layers that are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

from equipoise import extras
from equipoise.compress.transformer.axes import (
    Axis,
    AxisMap,
    build,
    embedding_widths,
    layer_of,
    with_head_size,
)
from equipoise.compress.transformer.shapes import TransformerShape, changed, config_of, read_shape
from equipoise.errors import RecipeError

_SETS_HEAD_SIZE: Final = ("heads", "key_value_heads", "hidden")
"""Widths of which an architecture may work out the size of a head, unless it is written down."""

Kept = Mapping[tuple[str, int], Any]
"""Width and layer -> int64 [kept], the channels that stay, in the order that they get. What is the
same in all layers stands under layer -1; so do all widths where layers share their weights."""


def kept_of(kept: Kept, axis: Axis) -> Any:
    """The channels that stay on one axis; None when all do."""
    own = kept.get((axis.width, axis.layer))
    return kept.get((axis.width, -1)) if own is None else own


def take(tensors: Mapping[str, Any], axes: AxisMap, kept: Kept) -> dict[str, Any]:
    """The tensors of a ``state_dict`` with only the channels ``kept``, in their order."""
    parts: dict[tuple[str, int], list[Axis]] = defaultdict(list)
    for axis in axes.axes:
        parts[axis.tensor, axis.axis].append(axis)
    result = dict(tensors)
    for (name, along), found in parts.items():
        if any(kept_of(kept, part) is not None for part in found):
            index = _index(found, axes.shape, kept)
            result[name] = result[name].index_select(along, index)
    return result


def _index(parts: list[Axis], shape: TransformerShape, kept: Kept) -> Any:
    torch = extras.require("torch")
    found = []
    for part in sorted(parts, key=lambda part: part.offset):
        width = shape.width(part.width)
        chosen = kept_of(kept, part)
        channels = torch.arange(width) if chosen is None else chosen
        found.append(part.positions(channels, of=width).flatten())
    return torch.cat(found)


def renumbered(tensors: Mapping[str, Any], *, prefix: str, kept: tuple[int, ...]) -> dict[str, Any]:
    """The tensors without the layers that go, the others under their new numbers."""
    place = {old: new for new, old in enumerate(kept)}
    result = {}
    for name, tensor in tensors.items():
        layer = layer_of(name, prefix)
        if layer < 0:
            result[name] = tensor
        elif layer in place:
            rest = name.removeprefix(f"{prefix}.").partition(".")[2]
            result[f"{prefix}.{place[layer]}.{rest}"] = tensor
    return result


def reduced_config(module: Any, shape: TransformerShape) -> Any:
    """The config of ``module`` cut to ``shape``: plain transformers builds the result from it.

    Raises:
        RecipeError: transformers refuses these sizes together.
    """
    before = read_shape(module.config)
    narrower = any(getattr(shape, name) != getattr(before, name) for name in _SETS_HEAD_SIZE)
    config = with_head_size(module) if narrower else module.config
    widths = dict.fromkeys(embedding_widths(config), shape.hidden)
    return config_of(changed(config, widths), shape)


def rebuilt(module: Any, config: Any, tensors: Mapping[str, Any]) -> Any:
    """A model of the class of ``module`` with another config and exactly these weights.

    Raises:
        RecipeError: The weights are not those of the config: a layer that is built unlike the
            others came to stand in another place.
    """
    torch = extras.require("torch")
    with torch.random.fork_rng(devices=()):
        new = build(module, config, device="cpu")
    try:
        new.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise RecipeError(
            f"at this shape {type(module).__name__} has other parts: {' '.join(lines)}",
            hint="Some architectures build layer 0 unlike the others: keep it; some leave out a"
            " projection between two widths that are equal: choose another hidden width.",
        ) from error
    if getattr(module, "generation_config", None) is not None:
        new.generation_config = module.generation_config
    return new.float().eval()


def reduce_module(module: Any, axes: AxisMap, *, shape: TransformerShape, kept: Kept) -> Any:
    """A smaller model out of ``module``, which is not changed.

    Args:
        module: A transformers model.
        axes: Its axes.
        shape: The sizes of the result.
        kept: The channels that stay.

    Raises:
        RecipeError: transformers cannot build a model of this shape.
    """
    return cut_tensors(module, axes, tensors=module.state_dict(), shape=shape, kept=kept)


def cut_tensors(
    module: Any, axes: AxisMap, *, tensors: Mapping[str, Any], shape: TransformerShape, kept: Kept
) -> Any:
    """The same with ``tensors`` in place of the weights of ``module``. Raises as above."""
    config = reduced_config(module, shape)
    smaller = take(tensors, axes, kept)
    if shape.layers != axes.shape.layers:
        smaller = renumbered(smaller, prefix=axes.prefix, kept=shape.layers)
    return rebuilt(module, config, smaller)
