"""What the layers of a module are called with, seen while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from equipoise import extras
from equipoise.compress.structure import LayerShape


@dataclass(frozen=True, kw_only=True)
class Call:
    """The first call of a convolution or linear layer.

    Attributes:
        name: Dotted name of the layer.
        input: Shape of its input.
        output: Shape of its output.
        macs: Multiplications of all its calls in one run.
    """

    name: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    macs: int


def watch_calls(module: Any, run: Callable[[], object]) -> tuple[Call, ...]:
    """The convolutions and linear layers of ``module`` in the order that ``run`` calls them.

    Args:
        module: The module.
        run: Runs it once.
    """
    calls: dict[str, Call] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
            shape, made = tuple(inputs[0].shape), tuple(output.shape)
            before = calls.get(name, Call(name=name, input=shape, output=made, macs=0))
            macs = before.macs + _macs(layer, shape, made)
            calls[name] = Call(name=name, input=before.input, output=before.output, macs=macs)

        return note

    layers = [(name, layer) for name, layer in module.named_modules() if is_layer(layer)]
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(calls.values())


def is_layer(layer: Any) -> bool:
    """Whether it is a linear layer, or a convolution of any kind."""
    return isinstance(layer, extras.require("torch").nn.Linear) or is_convolution(layer)


def is_convolution(layer: Any) -> bool:
    """Whether it is a convolution of 1, 2 or 3 axes, transposed or not."""
    convolution: Any = extras.require("torch.nn.modules.conv")
    return isinstance(layer, convolution._ConvNd)  # noqa: SLF001 - the class of all convolutions


def is_depthwise(layer: Any) -> bool:
    """Whether each channel is a group of its own, so that all three numbers change together."""
    if not is_convolution(layer) or layer.groups == 1:
        return False
    return bool(layer.groups == layer.in_channels == layer.out_channels)


def _macs(layer: Any, given: tuple[int, ...], made: tuple[int, ...]) -> int:
    """Every position of the output takes one product per weight that leads to it."""
    if not is_convolution(layer):
        return math.prod(made) * int(layer.in_features)
    positions = given[2:] if layer.transposed else made[2:]
    return given[0] * math.prod(positions) * int(layer.weight.numel())


def total_macs(calls: Iterable[Call]) -> int:
    """Multiplications of one run."""
    return sum(call.macs for call in calls)


def layer_shape(layer: Any, call: Call) -> LayerShape:
    """``layer`` as a table of latencies knows it."""
    if not is_convolution(layer):
        positions = math.prod(call.input[:-1])  # of one sample, whichever axes it lies along
        return LayerShape(
            kind="linear", inputs=layer.in_features, outputs=layer.out_features, size=(positions,)
        )
    return LayerShape(
        kind="conv",
        inputs=layer.in_channels,
        outputs=layer.out_channels,
        size=call.input[2:],
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=_padding(layer, call),
        groups=layer.groups,
    )


def _padding(layer: Any, call: Call) -> tuple[int, ...]:
    """What gives an undilated convolution the same output size.

    Padding may have been done before, by a word (``same``) or beside a dilation: the number of
    positions is what the time depends on.
    """
    axes = zip(call.input[2:], call.output[2:], layer.kernel_size, layer.stride, strict=True)
    return tuple(
        max(0, math.ceil(((out - 1) * stride + kernel - size) / 2))
        for size, out, kernel, stride in axes
    )
