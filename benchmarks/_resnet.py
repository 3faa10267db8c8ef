"""An 18-layer residual network for 1x28x28 pictures, as ``module:_resnet:build`` takes it.

The form of He, Zhang, Ren and Sun 2016, table 1, column 18-layer; its stem for 224 pixels (7x7 at
stride 2 and a pool) would leave a picture of 28 pixels with one position in the end, so it is a
3x3 at stride 2 here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)
MEAN, DEVIATION = 0.2860, 0.3530
"""Of the training pictures of Fashion-MNIST, in 0..1."""


class Block(nn.Module):
    """Two 3x3 convolutions, and a way around them that is projected where the size changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.around = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, inputs, h, w] -> [batch, outputs, h / stride, w / stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.around(x) + self.bn2(self.conv2(y)))


class ResNet18(nn.Module):
    """image float32 [batch, 1, 28, 28] in 0..1 -> logits [batch, 10]."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        blocks = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            blocks.append(Block(inputs, width, stride=1 if stage == 0 else 2))
            blocks.append(Block(width, width, stride=1))
            inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 10)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        x = torch.relu(self.bn(self.stem((image - MEAN) / DEVIATION)))
        return self.head(self.blocks(x).mean(dim=(2, 3)))


def build() -> ResNet18:
    """The network, untrained."""
    return ResNet18()


def half() -> ResNet18:
    """The stock smaller one: every layer half as wide, a quarter of the multiplications."""
    return ResNet18(tuple(width // 2 for width in WIDTHS))
