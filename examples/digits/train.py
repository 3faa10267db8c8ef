"""Train the digit network in under a minute: python examples/digits/train.py --output FILE."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from examples.digits.model import build
from safetensors.torch import save_file
from torch import Tensor, nn

from equipoise.data.readers import digits

EPOCHS = 24
BATCH = 64


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel each way."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([padded[i, :, y : y + 8, x : x + 8] for i, (y, x) in enumerate(offsets)])


def train(seed: int = 0) -> tuple[nn.Module, float]:
    """Train on one half of the digits; return the network and its accuracy on the other half."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.from_numpy(array) for array in digits.load())
    inside, outside = (torch.from_numpy(part) for part in digits.split(labels.numpy()))
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    steps = EPOCHS * (len(inside) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(EPOCHS):
        order = inside[torch.randperm(len(inside), generator=generator)]
        for batch in order.split(BATCH)[: len(inside) // BATCH]:
            loss = loss_of(model(shifted(images[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        right = model(images[outside]).argmax(1) == labels[outside]
    return model, right.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    output = parser.parse_args().output
    model, accuracy = train()
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), output)
    print(f"{accuracy:.2%} of the held-out digits are right; weights in {output}")


if __name__ == "__main__":
    main()
