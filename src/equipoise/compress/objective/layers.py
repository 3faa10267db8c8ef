"""The layers of a transformer, found by what they are, not by what an architecture calls them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from equipoise import extras


def transformer_layers(module: Any) -> list[Any]:
    """The longest list of modules of one class; lists that attend come first.

    Transformers keep their layers in a ``ModuleList``, timm in a ``Sequential``. Other lists of
    one class, such as the convolutions before an audio encoder, do not attend.
    """
    found = list(_lists(module))
    attending = [layers for layers in found if next(attentions(layers[0]), None) is not None]
    return max(attending or found, key=len, default=[])


def _lists(module: Any) -> Iterator[list[Any]]:
    torch = extras.require("torch")
    for inner in module.modules():
        if isinstance(inner, torch.nn.ModuleList | torch.nn.Sequential):
            children = list(inner)
            if children and len({type(child) for child in children}) == 1:
                yield children


def attentions(layer: Any) -> Iterator[Any]:
    """The modules of a layer that attend to its own input: the innermost ones called so."""
    for name, inner in layer.named_modules():
        nested = any(_attends(child) for child in inner.modules() if child is not inner)
        crosses = any(word in name.lower() for word in ("cross", "encoder_attn", "encdec"))
        if _attends(inner) and not nested and not crosses:
            yield inner


def _attends(module: Any) -> bool:
    name = type(module).__name__
    return "Attention" in name and "Output" not in name


def spaced(count: int, *, over: int) -> list[int]:
    """Which of ``over`` layers each of ``count`` layers corresponds to, counted from 1.

    They are evenly spaced and the last ones correspond: 3 layers over 12 are the 4th, 8th and
    12th, as in TinyBERT (Jiao and others 2020, section 3.1).
    """
    return [(2 * i * over + count) // (2 * count) for i in range(1, count + 1)]


def unwrapped(module: Any) -> Any:
    """The model of transformers inside of an adapter; a module that is none of them itself."""
    inner = getattr(module, "model", None)
    adapted = type(module).__name__ == "Adapter" and inner is not None
    return inner if adapted else module


def named(module: Any) -> str:
    """The class of a model, for messages."""
    return type(unwrapped(module)).__name__
