"""A small residual network for 8x8 grey images of handwritten digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(x + self.second_norm(self.second(y)))


class DigitNet(nn.Module):
    """image float32 [batch, 1, 8, 8] in 0..1 -> logits [batch, 10]."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.wide = Residual(channels)
        self.narrow = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.narrow_norm = nn.BatchNorm2d(2 * channels)
        self.deep = Residual(2 * channels)
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(image)))
        x = self.wide(x)
        x = torch.relu(self.narrow_norm(self.narrow(x)))
        x = self.deep(x)
        return self.head(x.mean(dim=(2, 3)))


def build() -> DigitNet:
    """The network, untrained."""
    return DigitNet()
