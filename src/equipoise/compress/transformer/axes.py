"""Which axes of which tensors a size of the config governs.

No table of architectures: the model is built on PyTorch's ``meta`` device from the config with one
size changed, and whatever axis of the ``state_dict`` changes follows that size. A fused matrix
shows itself as a multiple of the change. In models whose heads divide the hidden width (BERT and
its kin) queries, keys, values and the layer behind them change with the hidden width too although
they follow the heads; ``attention.py`` finds them by running the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from equipoise import extras
from equipoise.compress.transformer.shapes import (
    TransformerShape,
    Width,
    changed,
    has_width,
    head_size,
    read_shape,
    with_layers,
)
from equipoise.errors import RecipeError, SourceError

Shapes = dict[str, tuple[int, ...]]
_EMBEDDING_WIDTHS: Final = ("embedding_size", "word_embed_proj_dim", "emb_dim")
"""Widths of embeddings, which are projected to the hidden width where they differ from it."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a tensor, or a part of it, and the width that it follows.

    Its indices are ``offset + block * width * unit + channel * unit + i`` with ``i < unit``: each
    channel has ``unit`` neighbours in each of ``blocks`` equal parts.

    Attributes:
        tensor: Name in the ``state_dict``.
        axis: Which of its axes.
        width: What governs it.
        layer: Index of the layer that the tensor is in; -1 outside of them.
        blocks: Parts of a fused matrix.
        unit: Indices per channel and block: the size of a head.
        offset: Where it begins on the axis.
    """

    tensor: str
    axis: int
    width: Width
    layer: int = -1
    blocks: int = 1
    unit: int = 1
    offset: int = 0

    def positions(self, channels: Any, *, of: int) -> Any:
        """Indices on the axis, int64 [blocks, channels, unit], of some of ``of`` channels."""
        torch = extras.require("torch")
        start = torch.arange(self.blocks)[:, None, None] * (of * self.unit) + self.offset
        return start + channels[None, :, None] * self.unit + torch.arange(self.unit)


@dataclass(frozen=True, kw_only=True)
class AxisMap:
    """Every axis of a model that a width governs.

    Attributes:
        shape: The sizes of the model.
        head_size: Features of a head, which stay as they are.
        prefix: Where the layers are: ``bert.encoder.layer``; empty where layers share weights.
        axes: In the order of the ``state_dict``.
        coupled: Whether the hidden width is the heads times the size of a head, as in BERT, so
            that both are cut together or not at all.
        refused: Width -> why it cannot be cut.
    """

    shape: TransformerShape
    head_size: int
    prefix: str
    axes: tuple[Axis, ...]
    coupled: bool
    refused: Mapping[str, str]

    def of(self, width: str, *, layer: int | None = None) -> list[Axis]:
        """The axes that follow ``width``, in one layer or anywhere."""
        return [a for a in self.axes if a.width == width and layer in (None, a.layer)]


def shapes_of(module: Any, config: Any) -> Shapes:
    """Names and shapes of the ``state_dict`` that a config makes, without memory for weights.

    Args:
        module: A model of the class to build; it is not changed.
        config: The config.

    Raises:
        SourceError: transformers cannot build it.
    """
    return {name: tuple(v.shape) for name, v in build(module, config).state_dict().items()}


def build(module: Any, config: Any, *, device: str = "meta") -> Any:
    """A new model of the class of ``module``, with the optional parts that it has.

    Raises:
        SourceError: transformers cannot build it.
    """
    torch = extras.require("torch")
    options = {} if _has_pooler(module) else {"add_pooling_layer": False}
    try:
        with torch.device(device):
            return type(module)(config, **options)
    except Exception as error:  # a config of odd sizes reaches any exception
        first = str(error).strip().partition("\n")[0]
        raise SourceError(f"transformers cannot build {type(module).__name__}: {first}") from error


def _has_pooler(module: Any) -> bool:
    """Whether there is a pooler, or the class has no choice about it."""
    import inspect

    optional = "add_pooling_layer" in inspect.signature(type(module).__init__).parameters
    return not optional or any("pooler" in name.split(".") for name in module.state_dict())


@dataclass(frozen=True, kw_only=True)
class _Change:
    """An axis that came out with another size."""

    tensor: str
    axis: int
    before: int
    factor: int


def _changes(module: Any, config: Any, sizes: Mapping[str, int], *, step: int) -> list[_Change]:
    """What changes with ``sizes``, ``step`` more than before.

    Raises:
        _CannotTellError: Tensors appear or go, or an axis changes by no multiple of the step.
    """
    before, after = shapes_of(module, config), shapes_of(module, changed(config, sizes))
    odd = sorted(before.keys() ^ after.keys())
    if odd:
        raise _CannotTellError(
            f"with another {next(iter(sizes))} the model has other tensors: {odd[0]}"
        )
    found = []
    for name, shape in before.items():
        for axis, (old, new) in enumerate(zip(shape, after[name], strict=True)):
            factor, rest = divmod(new - old, step)
            if rest or factor < 0:
                raise _CannotTellError(f"axis {axis} of {name} goes from {old} to {new}")
            if factor:
                found.append(_Change(tensor=name, axis=axis, before=old, factor=factor))
    return found


class _CannotTellError(Exception):
    """What changes does not say what follows a size."""


def find_axes(module: Any, *, attention: Iterable[tuple[str, int]]) -> AxisMap:
    """The axes of ``module`` that each width governs.

    Args:
        module: A transformers model.
        attention: Tensor and axis of what leads into the attention and out of it, along the heads;
            used where shapes alone do not tell (see ``attention.py``).

    Raises:
        SourceError: It is not one stack of layers, or transformers cannot build its like.
    """
    config = with_head_size(module)
    finder = _Finder(module, config, attention=frozenset(attention))
    axes = [axis for width in finder.widths for axis in finder.axes(width)]
    prefix = layers_prefix(module)
    return AxisMap(
        shape=read_shape(config),
        head_size=head_size(config),
        prefix=prefix,
        axes=tuple(replace(a, layer=layer_of(a.tensor, prefix)) for a in axes),
        coupled=finder.coupled,
        refused=finder.refused,
    )


def with_head_size(module: Any) -> Any:
    """The config of ``module``, with the size of a head written down where that has an effect.

    Some architectures read ``head_dim`` although their config has no such field (Phi-3); then heads
    and hidden width can be cut apart.
    """
    config = module.config
    if getattr(config, "head_dim", None) is not None:
        return config
    tried = changed(config, {"head_dim": head_size(config)})
    return tried if _independent(module, tried) else config


def _independent(module: Any, config: Any) -> bool:
    """Whether heads alone change something by the size of a head."""
    heads = read_shape(config).heads
    try:
        found = _changes(module, config, {"heads": 2 * heads}, step=heads)
    except _CannotTellError:
        return False
    return any(change.factor % head_size(config) == 0 for change in found)


class _Finder:
    """Finds axes width by width."""

    def __init__(self, module: Any, config: Any, *, attention: frozenset[tuple[str, int]]) -> None:
        self.module, self.config = module, config
        self.shape, self.size = read_shape(config), head_size(config)
        self.coupled = not _independent(module, config)
        self.attention = attention if self.coupled else frozenset()
        self.refused: dict[str, str] = {}
        names: tuple[Width, ...] = ("intermediate", "heads", "key_value_heads", "hidden")
        self.widths = [name for name in names if has_width(config, name)]
        if "intermediate" not in self.widths:
            self.refused["intermediate"] = "the config does not name the width of feed-forwards"

    def axes(self, width: Width) -> list[Axis]:
        """The axes of one width; none, with the reason in ``refused``, where it is not clear."""
        try:
            return self._hidden() if width == "hidden" else self._inner(width)
        except _CannotTellError as error:
            self.refused[width] = str(error)
            return []

    def _inner(self, width: Width) -> list[Axis]:
        now = self.shape.width(width)
        unit = 1 if width == "intermediate" else self.size
        found = _changes(self.module, self.config, {width: 2 * now}, step=now)
        return [self._axis(change, width=width, now=now, unit=unit) for change in found]

    def _axis(self, change: _Change, *, width: Width, now: int, unit: int) -> Axis:
        """One change as an axis. What is left of it belongs to other heads, which come first."""
        blocks, rest = divmod(change.factor, unit)
        if rest:  # one number per head, as in a bias of relative positions
            blocks, unit = 1, change.factor
        left = change.before - change.factor * now
        offset = left if width == "key_value_heads" else 0
        if left and width not in {"heads", "key_value_heads"}:
            raise _CannotTellError(
                f"axis {change.axis} of {change.tensor} is {change.before}, of which only"
                f" {change.factor * now} follow it"
            )
        place = {"tensor": change.tensor, "axis": change.axis}
        return Axis(**place, width=width, blocks=blocks, unit=unit, offset=offset)  # type: ignore[arg-type]

    def _hidden(self) -> list[Axis]:
        now = self.shape.hidden
        sizes = {"hidden": 2 * now}
        try:
            found = _changes(self.module, self.config, sizes, step=now)
        except _CannotTellError:
            sizes |= dict.fromkeys(embedding_widths(self.config), 2 * now)
            found = _changes(self.module, self.config, sizes, step=now)
        return [self._hidden_axis(change) for change in found]

    def _hidden_axis(self, change: _Change) -> Axis:
        if (change.tensor, change.axis) in self.attention:
            return self._axis(
                replace(change, factor=change.factor * self.size),
                width="heads", now=self.shape.heads, unit=self.size,
            )  # fmt: skip
        if change.factor * self.shape.hidden != change.before or change.factor != 1:
            raise _CannotTellError(
                f"axis {change.axis} of {change.tensor} is {change.before}, a fixed multiple of it"
            )
        return Axis(tensor=change.tensor, axis=change.axis, width="hidden")


def embedding_widths(config: Any) -> list[str]:
    """Attributes that have to be the hidden width for the model to stay as it is."""
    width = read_shape(config).hidden
    return [key for key in _EMBEDDING_WIDTHS if getattr(config, key, None) == width]


def layers_prefix(module: Any) -> str:
    """The name of the list of layers, found by building one layer more; empty when none is."""
    config = module.config
    count = len(read_shape(config).layers)
    more = with_layers(config, (*range(count), count - 1))
    new = sorted(shapes_of(module, more).keys() - shapes_of(module, config).keys())
    found = {m[1] for m in (re.match(rf"(.+?)\.{count}\.", name) for name in new) if m}
    return found.pop() if len(found) == 1 else ""


def layer_of(tensor: str, prefix: str) -> int:
    """Index of the layer that a tensor is in; -1 outside of them."""
    if not prefix or not tensor.startswith(f"{prefix}."):
        return -1
    return int(tensor.removeprefix(f"{prefix}.").partition(".")[0])


def require_cuttable(axes: AxisMap, shape: TransformerShape) -> None:
    """Check that every width that ``shape`` changes is one that can be cut.

    Raises:
        RecipeError: One cannot, with the reason.
    """
    for width in ("intermediate", "heads", "key_value_heads", "hidden"):
        if getattr(shape, width) != getattr(axes.shape, width) and width in axes.refused:
            raise RecipeError(f"{width} cannot be cut in this model: {axes.refused[width]}")
    if shape.layers != axes.shape.layers and not axes.prefix:
        raise RecipeError("layers cannot be dropped from this model: they share their weights")
    if axes.coupled and shape.hidden != shape.heads * axes.head_size:
        raise RecipeError(
            f"hidden {shape.hidden} with {shape.heads} heads: in this architecture the hidden width"
            f" is the heads times the size of a head, which is {axes.head_size}",
            hint=f"Cut both together: {shape.heads} heads go with hidden"
            f" {shape.heads * axes.head_size}.",
        )
