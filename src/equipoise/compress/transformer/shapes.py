"""The sizes of a transformers model that its config names, and a config with others.

Every architecture names them in its own way; transformers' ``attribute_map`` gives most of them one
name, and what it leaves out stands in :data:`_KEYS`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal

from equipoise.errors import RecipeError, SourceError

Width = Literal["intermediate", "heads", "key_value_heads", "hidden"]
"""What can be made narrower. Layers are not: whole ones go or stay."""

_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "key_value_heads": ("num_key_value_heads",),
    "intermediate": (
        "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim", "ff_dim",
    ),
}  # fmt: skip
_DEFAULT_FACTOR: Final = 4
"""What an ``n_inner`` of None means: four times the hidden width, in GPT-2 and those after it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """The sizes of one transformer.

    Attributes:
        layers: Indices of the layers that are kept, increasing.
        heads: Attention heads per layer.
        key_value_heads: Heads of keys and values, which several heads share; as many as ``heads``
            where none are shared.
        intermediate: Width between the two linear layers of a feed-forward block; 0 where the
            config does not name it.
        hidden: Width of the residual stream.
    """

    layers: tuple[int, ...]
    heads: int
    key_value_heads: int
    intermediate: int
    hidden: int

    def width(self, name: Width) -> int:
        """The size called ``name``."""
        return int(getattr(self, name))


def read_shape(config: Any) -> TransformerShape:
    """The sizes that a transformers config names, with all layers kept.

    Raises:
        SourceError: It is no config of one stack of attention layers.
    """
    _require_one_stack(config)
    found = {name: _value(config, name) for name in _KEYS}
    heads = found["heads"]
    return TransformerShape(
        layers=tuple(range(found["layers"])),
        heads=heads,
        key_value_heads=found["key_value_heads"] or heads,
        intermediate=found["intermediate"],
        hidden=found["hidden"],
    )


def _require_one_stack(config: Any) -> None:
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "sub_configs", None):
        raise SourceError(
            f"a {kind} model is made of several transformers; one can be narrowed at a time",
            hint="Save the part that is needed as a model of its own, with save_pretrained.",
        )
    missing = [n for n in ("layers", "hidden", "heads") if not isinstance(_value(config, n), int)]
    missing += [
        n for n in ("layers", "hidden", "heads") if n not in missing and _key(config, n) == ""
    ]
    if missing:
        raise SourceError(
            f"the config of a {kind} model does not say its {' and '.join(missing)} as one number",
            hint="Only a stack of equal attention layers can be narrowed by its config.",
        )


def _key(config: Any, name: str) -> str:
    """The attribute of ``config`` that holds the size ``name``; empty when it has none."""
    return next((key for key in _KEYS[name] if hasattr(config, key)), "")


def _value(config: Any, name: str) -> Any:
    """The size ``name``; 0 when the config has none."""
    key = _key(config, name)
    value = getattr(config, key) if key else None
    if value is None and key == "n_inner":
        return _DEFAULT_FACTOR * config.hidden_size
    return 0 if value is None else value


def head_size(config: Any) -> int:
    """Features of one attention head."""
    given = getattr(config, "head_dim", None)
    shape = read_shape(config)
    return int(given) if given else shape.hidden // shape.heads


def has_width(config: Any, name: Width) -> bool:
    """Whether the config names the size ``name``."""
    return bool(_key(config, name))


def changed(config: Any, sizes: Mapping[Any, int]) -> Any:
    """A copy of ``config`` with other widths and everything else as it is.

    Sizes that follow from others by default are first written down, so that they stay.

    Args:
        config: A transformers config.
        sizes: Names of attributes, or of :data:`Width`, with their values.
    """
    new = copy.deepcopy(config)
    if hasattr(new, "n_inner"):
        new.n_inner = _value(config, "intermediate")
    for name, value in sizes.items():
        setattr(new, _key(new, name) if name in _KEYS else name, value)
    return new


def with_layers(config: Any, kept: tuple[int, ...]) -> Any:
    """A copy of ``config`` with the layers ``kept``, an index per layer of the result.

    Lists with an entry per layer (``layer_types`` and its like) are cut in the same way.
    """
    count = _value(config, "layers")
    new = copy.deepcopy(config)
    for key, value in vars(config).items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) == count:
            setattr(new, key, type(value)(value[index] for index in kept))
    setattr(new, _key(new, "layers"), len(kept))
    return new


def config_of(config: Any, shape: TransformerShape) -> Any:
    """``config`` with the sizes of ``shape``.

    Raises:
        RecipeError: A size that the config does not name would change, or transformers refuses the
            sizes together.
    """
    now = read_shape(config)
    names: tuple[Width, ...] = ("intermediate", "heads", "key_value_heads", "hidden")
    sizes = {name: shape.width(name) for name in names if shape.width(name) != now.width(name)}
    if "key_value_heads" in sizes and not has_width(config, "key_value_heads"):
        del sizes["key_value_heads"]  # where none are shared they are the heads
    new = with_layers(changed(config, sizes), shape.layers)
    _validate(new)
    return new


def _validate(config: Any) -> None:
    """Build the config from its own JSON form, as whoever loads it will."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # transformers and its validators raise types of their own
        first = " ".join(str(error).split())
        raise RecipeError(
            f"transformers refuses a {config.model_type} model of these sizes: {first}",
            hint="Choose sizes that fit each other, such as a hidden width that is a multiple of"
            " the heads.",
        ) from error


def require_fits(config: Any, shape: TransformerShape) -> None:
    """Check that ``shape`` can be cut out of a model with ``config``.

    Raises:
        RecipeError: It asks for more than there is, for nothing, or for heads that do not divide.
    """
    now = read_shape(config)
    _require_layers(shape.layers, now.layers)
    names: tuple[Width, ...] = ("intermediate", "heads", "key_value_heads", "hidden")
    for name in names:
        wanted, there = shape.width(name), now.width(name)
        if wanted and not there:
            raise RecipeError(f"{name} {wanted}: the config of this model does not name that size")
        if not (min(1, there) <= wanted <= there):
            raise RecipeError(
                f"{name} {wanted}: the model has {there}, so 1 to {there} are allowed"
            )
    _require_groups(shape, now)


def _require_layers(kept: tuple[int, ...], there: tuple[int, ...]) -> None:
    if not kept or sorted(set(kept)) != list(kept) or not set(kept) <= set(there):
        raise RecipeError(
            f"layers {list(kept)}: increasing indices from 0 to {len(there) - 1} are allowed, at"
            " least one"
        )


def _require_groups(shape: TransformerShape, now: TransformerShape) -> None:
    shared, before = divmod(shape.heads, shape.key_value_heads), now.heads // now.key_value_heads
    if shared[1] or shared[0] > before:
        raise RecipeError(
            f"{shape.heads} heads on {shape.key_value_heads} heads of keys and values: each of"
            f" these serves the same number of heads, at most {before} here",
            hint="Cut heads and key_value_heads by the same factor.",
        )
