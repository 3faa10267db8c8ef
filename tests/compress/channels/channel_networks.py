"""Small networks of the forms that channels are cut out of; each is a factory without arguments."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Plain(nn.Module):
    """Convolutions, and linear layers behind a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(32 * 16, 24)
        self.fc2 = nn.Linear(24, 10)

    def forward(self, x):
        x = functional.relu(self.conv1(x))
        x = functional.relu(self.bn2(self.conv2(x)))
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs, outputs, stride=1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.down(x))


class Residual(nn.Module):
    """As ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.layers = nn.Sequential(Block(16, 16), Block(16, 32, 2), Block(32, 32))
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.layers(functional.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class Inverted(nn.Module):
    """Expand, a depthwise convolution, a gate for every channel, project."""

    def __init__(self, inputs, outputs, stride=1) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.expand = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        )
        self.depth = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.reduce = nn.Conv2d(hidden, hidden // 4, 1)
        self.gate = nn.Conv2d(hidden // 4, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1), nn.BatchNorm2d(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        y = functional.hardswish(self.norm(self.depth(functional.hardswish(self.expand(x)))))
        squeezed = functional.relu(self.reduce(functional.adaptive_avg_pool2d(y, 1)))
        y = self.project(y * torch.sigmoid(self.gate(squeezed)))
        return x + y if self.adds else y


class Mobile(nn.Module):
    """As MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1)
        self.blocks = nn.Sequential(Inverted(16, 16), Inverted(16, 24, stride=2))
        self.head = nn.Conv2d(24, 64, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = functional.hardswish(self.head(self.blocks(self.stem(x))))
        return self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


class Dense(nn.Module):
    """As DenseNet: every layer sees all maps before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * k) for k in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 8 * k, 8, 3, padding=1) for k in range(3))
        self.norm = nn.BatchNorm2d(40)
        self.fc = nn.Linear(40, 10)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(functional.relu(norm(x)))], 1)
        return self.fc(functional.relu(self.norm(x)).mean((2, 3)))


class Grouped(nn.Module):
    """A group norm and a convolution of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.b = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.c = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = functional.relu(self.b(functional.relu(self.norm(self.a(x)))))
        return self.fc(self.c(x).mean((2, 3)))


class Gated(nn.Module):
    """The halves of what one layer makes are multiplied: as many have to go of each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 16, 3, padding=1)
        self.glu = nn.Conv2d(16, 32, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        value, gate = self.glu(self.a(x)).chunk(2, 1)
        return self.fc((value * torch.sigmoid(gate)).mean((2, 3)))


class Upward(nn.Module):
    """A transposed convolution, beside the input; its output is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 16, 3, 2, 1)
        self.b = nn.ConvTranspose2d(16, 24, 2, 2)
        self.c = nn.Conv2d(25, 8, 3, padding="same", dilation=2)
        self.d = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        up = functional.relu(self.b(functional.relu(self.a(x))))
        return self.d(functional.relu(self.c(torch.cat([x, up], 1))))


class Odd(nn.Module):
    """What cannot be cut: added to the input, a size in the code, weights in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.d = nn.Conv2d(16, 16, 1)
        self.d.weight = nn.Parameter(torch.randn(16, 16, 1, 1))
        self.e = nn.Conv2d(16, 16, 1)
        self.e.weight = self.d.weight
        self.fc = nn.Linear(16 * 64, 10)

    def forward(self, x):
        x = x.expand(-1, 8, -1, -1)
        x = functional.relu(self.b(x + self.a(x)))
        x = self.e(self.d(functional.relu(self.c(x))))
        return self.fc(x.reshape(-1, 16 * 64))


class Shuffled(nn.Module):
    """Channels change places between layers, in a branch that adds nothing as it was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 1)
        self.c = nn.Conv2d(16, 16, 1)
        self.scale = nn.Parameter(torch.zeros(1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = functional.relu(self.a(x))
        y = self.b(x)
        n, c, h, w = y.shape
        y = y.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc((x + self.scale * self.c(y)).mean((2, 3)))


class Tokens(nn.Module):
    """A linear feed-forward part with layer norms, over tokens of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 2, 2)
        self.place = nn.Parameter(torch.randn(1, 16, 16))
        self.norm1 = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.norm2 = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2) + self.place
        x = x + self.down(functional.gelu(self.up(self.norm1(x))))
        return self.fc(self.norm2(x).mean(1))


class Attention(nn.Module):
    """Self-attention with four heads, as many image models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.head_dim = 4
        self.attn_dim = 16
        self.scale = 0.5
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, self.attn_dim))


class Attending(nn.Module):
    """Attention and a residual, over the patches of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 2, 2)
        self.attn = Attention()
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.fc((x + self.attn(x)).mean(1))


class Fixed(Attending):
    """The number of heads is its own business."""

    def forward(self, x):
        self.attn.num_heads = 4
        return super().forward(x)


class Only(nn.Module):
    """Nothing but its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1))
