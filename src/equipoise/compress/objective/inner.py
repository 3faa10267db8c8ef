"""Recorders of hidden states, attention maps and feature maps of one model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Final

from equipoise import extras
from equipoise.compress.objective.layers import attentions, named, transformer_layers
from equipoise.compress.objective.points import Point
from equipoise.compress.objective.recorder import Recorder, first_tensor
from equipoise.compress.objective.task_losses import Tensor
from equipoise.errors import SourceError

_INPUT: Final = "input"
_LAYERS: Final = "layers"
_MAPS: Final = "maps"
_IMPLEMENTATION: Final = "_attn_implementation"
"""Where a config of transformers says how attention is computed; it is not saved."""
_EAGER: Final = "eager"


def record_states(module: Any) -> Recorder:
    """A recorder of the input of the first transformer layer and of what every layer gives."""
    recorder = Recorder()
    layers = transformer_layers(module)
    for layer in layers[:1]:
        recorder.inputs_of(layer, key=_INPUT)
    for layer in layers:
        recorder.outputs_of(layer, key=_LAYERS, pick=first_tensor)
    return recorder


def states(kept: dict[str, list[Tensor]], *, module: Any) -> list[Tensor]:
    """Hidden states [batch, n, d]: before the first layer, and behind each.

    Raises:
        SourceError: The model has no transformer layers.
    """
    found = [*kept.get(_INPUT, [])[:1], *kept.get(_LAYERS, [])]
    if len(found) < 2 or any(state.ndim != 3 for state in found):
        raise SourceError(
            f"{named(module)} has no hidden states that could be compared: no list of layers of one"
            " class that take and give [batch, positions, width]",
            hint="Set hidden to 0; features compares convolutional networks.",
        )
    return found


def record_attention(module: Any) -> Recorder:
    """A recorder of attention maps.

    Fused kernels give none, so attention is computed step by step until the recorder is closed,
    and without its dropout: what that zeroes is not what the model attends to.
    """
    recorder = Recorder()
    _compute_eagerly(module, recorder)
    for layer in transformer_layers(module):
        for attention in attentions(layer):
            recorder.outputs_of(attention, key=_MAPS, pick=_square)
            _without_dropout(attention, recorder)
    return recorder


def maps(kept: dict[str, list[Tensor]], *, module: Any) -> list[Tensor]:
    """Attention maps [batch, heads, n, n], one per layer.

    Raises:
        SourceError: The model does not give them.
    """
    found = kept.get(_MAPS, [])
    if not found:
        raise SourceError(
            f"{named(module)} gives no attention maps",
            hint="Set attention to 0. Models of transformers whose self-attention returns its"
            " weights give them, such as BERT, DistilBERT, GPT-2, Llama and ViT.",
        )
    return found


def _square(output: Any) -> Tensor | None:
    """The map among what an attention module gives; T5 gives a bias of the same form before it."""
    torch = extras.require("torch")
    values = output if isinstance(output, tuple | list) else ()
    tensors = [t for t in values if isinstance(t, torch.Tensor) and t.ndim == 4]
    return next((t for t in reversed(tensors) if t.shape[-1] == t.shape[-2]), None)


def _compute_eagerly(module: Any, recorder: Recorder) -> None:
    for config in _configs(module):
        before = getattr(config, _IMPLEMENTATION)
        recorder.at_close(functools.partial(setattr, config, _IMPLEMENTATION, before))
    for config in _configs(module):
        setattr(config, _IMPLEMENTATION, _EAGER)


def _configs(module: Any) -> Iterator[Any]:
    """The configs of a model and of the models inside it, each once."""
    seen: set[int] = set()
    for inner in module.modules():
        config = getattr(inner, "config", None)
        if id(config) not in seen and hasattr(config, _IMPLEMENTATION):
            seen.add(id(config))
            yield config


def _without_dropout(attention: Any, recorder: Recorder) -> None:
    torch = extras.require("torch")
    for child in attention.modules():
        if isinstance(child, torch.nn.Dropout):
            _replace(child, "p", recorder)
    for name, value in list(vars(attention).items()):
        if "dropout" in name and isinstance(value, float):
            _replace(attention, name, recorder)


def _replace(owner: Any, name: str, recorder: Recorder) -> None:
    before = getattr(owner, name)
    recorder.at_close(functools.partial(setattr, owner, name, before))
    setattr(owner, name, 0.0)


def record_features(module: Any, *, points: list[Point]) -> Recorder:
    """A recorder of feature maps at ``points``, which :func:`features` reads."""
    recorder = Recorder()
    modules = dict(module.named_modules())
    for name in dict.fromkeys(name for name, _ in points):
        recorder.outputs_of(modules[name], key=name, pick=first_tensor)
    return recorder


def features(kept: dict[str, list[Tensor]], *, points: list[Point]) -> list[Tensor]:
    """Feature maps [batch, channels, height, width], in the order of ``points``."""
    return [kept[name][call] for name, call in points]
