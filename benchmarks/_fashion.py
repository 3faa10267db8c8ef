"""The teacher on Fashion-MNIST: train it once, in half an hour on one core, and keep its weights.

    python benchmarks/_fashion.py --data DIRECTORY --output FILE [--half] [--epochs 12]

DIRECTORY holds the idx files; Debian's package dataset-fashion-mnist brings them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from _resnet import build, half
from safetensors.torch import save_file
from torch import Tensor, nn

from equipoise.data.config import DataConfig
from equipoise.data.readers.base import Sample, read

BATCH = 128


def arrays(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Pictures float32 [n, 1, 28, 28] and classes int64 [n]."""
    images = np.concatenate([sample.feeds["image"] for sample in samples])
    return torch.from_numpy(images), torch.from_numpy(np.array([s.label for s in samples]))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures mirrored, each moved by up to two pixels each way."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    rows = torch.randint(0, 5, (len(images), 1), generator=generator) + torch.arange(28)
    columns = torch.randint(0, 5, (len(images), 1), generator=generator) + torch.arange(28)
    index = torch.arange(len(images))[:, None, None]
    return padded[index, 0, rows[:, :, None], columns[:, None, :]][:, None]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of pictures whose class is right."""
    model.eval()
    pairs = zip(images.split(500), labels.split(500), strict=True)
    right = [model(x).argmax(1) == y for x, y in pairs]
    return torch.cat(right).float().mean().item()


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--half", action="store_true", help="the stock smaller network")
    options = parser.parse_args()
    found = read(f"idx:{options.data}", config=DataConfig(data=""))
    images, labels = arrays(list(found.calibration))
    tests = arrays(list(found.evaluation))
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = (half() if options.half else build()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = options.epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(options.epochs):
        begun = time.monotonic()
        model.train()
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(batch) < BATCH:
                continue
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = model(shifted(images[batch], generator))
            loss = loss_of(outputs.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        shown = accuracy(model, *tests)
        print(f"epoch {epoch + 1}: {shown:.4f}, {time.monotonic() - begun:.0f} s", flush=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.output)


if __name__ == "__main__":
    main()
