"""The importance of heads, of feed-forward units, of the hidden width and of whole layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from equipoise import extras
from equipoise.compress.importance import FROM_GRADIENTS, Importance, slice_scores
from equipoise.compress.transformer.axes import Axis, AxisMap
from equipoise.compress.transformer.cut import Kept
from equipoise.compress.transformer.proof import shares_heads
from equipoise.compress.transformer.shapes import TransformerShape

UnitScores = dict[tuple[str, int], Any]
"""Width and layer -> float64 [channels]; layer -1 for what all layers share."""


def unit_scores(
    module: Any, importance: Importance, *, axes: AxisMap, losses: Iterable[Any] = ()
) -> UnitScores:
    """The importance of every channel of every width: the sum over the slices that it has.

    Measures of the weights and activations have units of their own in each tensor, so each tensor's
    scores are divided by their mean before they are added: then layers compare, and the embeddings
    with their many rows do not outvote all else. Measures of the loss are all in one unit and are
    added as they are.

    Args:
        module: The model.
        importance: The measure.
        axes: Its axes.
        losses: As of ``importance.slice_scores``.

    Raises:
        DataError: The measure needs samples and there are none.
    """
    wanted: dict[str, list[int]] = defaultdict(list)
    for axis in axes.axes:
        wanted[axis.tensor].append(axis.axis)
    slices = slice_scores(module, importance, axes=wanted, losses=losses)
    total: UnitScores = {}
    for axis in axes.axes:
        if (axis.tensor, axis.axis) in slices:
            scores = _of_channels(slices[axis.tensor, axis.axis], axis, of=axes.shape)
            key = (axis.width, _layer(axis, axes))
            total[key] = total.get(key, 0) + _comparable(scores, importance)
    return total


def _layer(axis: Axis, axes: AxisMap) -> int:
    together = axis.width == "hidden" or (axis.width != "intermediate" and shares_heads(axes))
    return -1 if together else axis.layer


def _of_channels(scores: Any, axis: Axis, *, of: TransformerShape) -> Any:
    torch = extras.require("torch")
    width = of.width(axis.width)
    return scores[axis.positions(torch.arange(width), of=width)].sum((0, 2))


def _comparable(scores: Any, importance: Importance) -> Any:
    mean = scores.mean()
    return scores if importance in FROM_GRADIENTS or not mean else scores / mean


def choose_channels(scores: UnitScores, axes: AxisMap, *, shape: TransformerShape) -> Kept:
    """The channels of each width that score most, in the order that they had.

    Each layer keeps its own heads and feed-forward units, as many as every other, because a config
    has one number for all. Heads that share keys and values go together; where fewer heads are to
    share one, each keeps its best.
    """
    kept: dict[tuple[str, int], Any] = {}
    for (width, layer), values in scores.items():
        if width in {"intermediate", "hidden"}:
            kept[width, layer] = _best(values, shape.width(width))  # type: ignore[arg-type]
    for layer in {layer for width, layer in scores if width == "heads"}:
        groups = _groups(scores, layer, axes)
        chosen = _best(groups, shape.key_value_heads)
        kept["heads", layer] = _heads(scores["heads", layer], chosen, axes=axes, shape=shape)
        kept["key_value_heads", layer] = chosen
    return kept


def _best(scores: Any, count: int) -> Any:
    """Indices of the ``count`` largest scores, increasing; of equal ones the first."""
    torch = extras.require("torch")
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values


def _groups(scores: UnitScores, layer: int, axes: AxisMap) -> Any:
    """Scores of heads of keys and values, each with the heads that it serves."""
    served = scores["heads", layer].reshape(axes.shape.key_value_heads, -1).sum(1)
    return served + scores.get(("key_value_heads", layer), 0)


def _heads(scores: Any, groups: Any, *, axes: AxisMap, shape: TransformerShape) -> Any:
    torch = extras.require("torch")
    before = axes.shape.heads // axes.shape.key_value_heads
    after = shape.heads // shape.key_value_heads
    own = scores.reshape(-1, before)
    return torch.cat([group * before + _best(own[group], after) for group in groups])


def block_influence(module: Any, *, prefix: str, run: Callable[[], int]) -> tuple[float, ...]:
    """How much each layer turns the hidden states: 1 minus the cosine between its input and output.

    The mean over tokens (Men, Xu, Zhang and others, ShortGPT, 2024, equation 1). A layer that
    leaves them as they are can go.

    Args:
        module: The model.
        prefix: Where its layers are, as in ``AxisMap.prefix``.
        run: Runs the forward passes and says how many there were.
    """
    torch = extras.require("torch")
    layers = list(module.get_submodule(prefix))
    sums, counts = [0.0] * len(layers), [0] * len(layers)

    def hook(index: int) -> Callable[..., None]:
        def add(_layer: Any, inputs: Any, named: Mapping[str, Any], output: Any) -> None:
            before, after = _states(inputs, named), _first(output)
            cosines = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            sums[index] += float((1 - cosines).sum())
            counts[index] += cosines.numel()

        return add

    handles = [
        layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(total / max(1, count) for total, count in zip(sums, counts, strict=True))


def loss_increases(module: Any, *, prefix: str, loss: Callable[[], float]) -> tuple[float, ...]:
    """How much the loss rises when each layer is left out, the others as they are.

    Args:
        module: The model; it is as before afterwards.
        prefix: Where its layers are.
        loss: Computes the loss over the samples.
    """
    whole = loss()
    found = []
    for layer in module.get_submodule(prefix):
        with passed_over(layer):
            found.append(loss() - whole)
    return tuple(found)


@contextmanager
def passed_over(layer: Any) -> Iterator[None]:
    """``layer`` does nothing while this is open."""
    handle = layer.register_forward_hook(_passing, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _passing(_layer: Any, inputs: Any, named: Mapping[str, Any], output: Any) -> Any:
    """What a layer would give if it did nothing, in the form that it gives."""
    states = _states(inputs, named)
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _states(inputs: Any, named: Mapping[str, Any]) -> Any:
    return inputs[0] if inputs else named["hidden_states"]


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def choose_layers(scores: tuple[float, ...], *, count: int) -> tuple[int, ...]:
    """The ``count`` layers that score most, increasing."""
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return tuple(sorted(ranked[:count]))
