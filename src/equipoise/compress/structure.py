"""What of a model can be made narrower, and which of its layers that makes smaller.

One form for convolutional networks and transformers, so that a table of measured latencies and the
choice of what to cut are written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One operator as a latency table knows it.

    Attributes:
        kind: ``conv``; ``linear``; ``attention``, the two products and the softmax between.
        inputs: Channels or features in; of attention, heads times the size of a head.
        outputs: Channels or features out.
        size: Spatial size of a convolution's input; ``(positions,)`` of the others.
        kernel: Of a convolution.
        stride: Of a convolution.
        padding: Of a convolution, one number per axis, the same on both sides.
        groups: Of a convolution; of attention, its heads.
    """

    kind: Literal["conv", "linear", "attention"]
    inputs: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One operator of a model, and which groups its width follows.

    Attributes:
        name: Dotted name of the module.
        shape: As it is now.
        input_group: Name of the group that its inputs belong to; empty when they are fixed.
        output_group: The same of its outputs.
        input_factor: Inputs per channel of the group: the positions that a flattened map has; the
            size of a head.
        output_factor: Outputs per channel of the group.
        depthwise: Its ``groups`` follow the width too.
        block: Index of the transformer layer that it is in; -1 outside of them.
    """

    name: str
    shape: LayerShape
    input_group: str = ""
    output_group: str = ""
    input_factor: int = 1
    output_factor: int = 1
    depthwise: bool = False
    block: int = -1


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that can only be cut together: one width.

    Attributes:
        name: Of the layer that makes them, or ``hidden``, ``intermediate``, ``heads``.
        width: Channels now.
        multiple: Widths must be multiples of it.
        scores: Importance of each channel; what is cut is what scores least.
    """

    name: str
    width: int
    multiple: int
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The groups and layers of one model, layers in the order that they run."""

    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
